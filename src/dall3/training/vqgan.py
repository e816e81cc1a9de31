"""Train the VQGAN (arXiv 2012.09841) with perceptual and adversarial losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from dall3.errors import require
from dall3.images import make_grid, to_pil
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.scenes.world import Batch
from dall3.training.losses import PatchDiscriminator, Perceptual, adversarial_losses, ramp
from dall3.training.part import Part, Rows
from dall3.training.processes import Processes


@dataclass(frozen=True)
class VQGANLoss:
    """Settings of the loss. It is the sum of these terms and the mean absolute error of the pixels.

    perceptual_weight: weight of the perceptual distance. discriminator_weight, discriminator_channels: weight and width
    of the patch discriminator. commitment_weight: weight of the distance of the features to their codes.
    codes_from, discriminator_from: progress at which quantization and the discriminator start. codebook_decay: decay of
    the codebook's moving averages. dead: codes used less than this fraction of the mean are replaced.
    """

    perceptual_weight: float = 1.0
    discriminator_weight: float = 0.05
    discriminator_from: float = 0.5
    discriminator_channels: int = 64
    commitment_weight: float = 0.05
    codes_from: float = 0.06
    codebook_decay: float = 0.99
    dead: float = 0.1


@torch.no_grad()
def encode(vqgan: VQModel, images: Tensor) -> Tensor:
    """Encode images in [0, 1] to codes, int64 (batch, codes). Distances are computed in float32, even in autocast."""
    features = vqgan.quant_conv(vqgan.encoder(images if vqgan.config.unit_range else images * 2 - 1))
    with torch.autocast(images.device.type, enabled=False):
        return vqgan.choose(features.float()).flatten(1)


def rotate_to(features: Tensor, entries: Tensor) -> Tensor:
    """The rotation trick (arXiv 2410.06424, section 4.2).

    Returns the codebook entries (…, width). The gradient to the features is that of a constant rotation and scaling
    that maps each feature to its entry.
    """
    here, there = F.normalize(features.detach(), dim=-1), F.normalize(entries, dim=-1)
    middle = F.normalize(here + there, dim=-1)

    def along(direction: Tensor) -> Tensor:
        return (features * direction).sum(-1, keepdim=True)

    scale = entries.norm(dim=-1, keepdim=True) / features.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return scale * (features - 2 * along(middle) * middle + 2 * along(here) * there)


class Codebook(nn.Module):
    """A codebook of unit vectors updated by moving averages (arXiv 1711.00937, appendix A.1) and compared by cosine
    similarity (arXiv 2110.04627). Unused codes are replaced by features of the batch.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, count: int, width: int, decay: float, dead: float) -> None:
        super().__init__()
        self.decay, self.dead, self.started = decay, dead, False
        codes = F.normalize(torch.randn(count, width), dim=1)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(count))
        self.register_buffer("sums", codes.clone())

    def get_extra_state(self) -> dict[str, bool]:
        return {"started": self.started}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        self.started = state["started"]

    def forward(self, rows: Tensor) -> Tensor:
        """The ids, int64 (n,), of the nearest codes of unit vectors, float32 (n, width)."""
        return (rows @ self.codes.T).argmax(dim=1)

    @torch.no_grad()
    def start(self, codes: Tensor) -> None:
        """Initialize the codes, float (count, width)."""
        self.codes.copy_(codes)
        self.sums.copy_(codes)
        self.counts.fill_(1)
        self.started = True

    @torch.no_grad()
    def update(self, rows: Tensor, ids: Tensor, replace: bool) -> None:
        """Update the moving averages with rows and their ids. replace: replace unused codes."""
        used = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(rows[:, 0]))
        found = torch.zeros_like(self.sums).index_add_(0, ids, rows)
        self.counts.lerp_(used, 1 - self.decay)
        self.sums.lerp_(found, 1 - self.decay)
        mean = len(rows) / len(self.counts)
        is_dead = (self.counts < self.dead * mean) & replace
        fresh = self.some(rows)
        self.sums.copy_(torch.where(is_dead[:, None], fresh * mean, self.sums))
        self.counts.copy_(torch.where(is_dead, mean, self.counts))
        self.codes.copy_(F.normalize(self.sums, dim=1))

    def some(self, rows: Tensor) -> Tensor:
        """A random row for each code."""
        return rows[torch.randint(len(rows), (len(self.codes),), device=rows.device)]


class VQGANPart(Part):
    """Trains a `GumbelVQ`, whose codes come from a `Codebook`."""

    model: GumbelVQ

    def __init__(self, config: VQGANConfig, loss: VQGANLoss, processes: Processes) -> None:
        super().__init__(processes)
        self.settings, self.model = loss, GumbelVQ(config)
        self.model.quantize.requires_grad_(False)  # set from the moving averages
        self.codebook = Codebook(config.n_embed, config.embed_dim, loss.codebook_decay, loss.dead)
        self.discriminator = PatchDiscriminator(loss.discriminator_channels)
        # In a list, so that it is not a submodule.
        self.perceptual = [Perceptual().to(processes.device)] if loss.perceptual_weight else []

    def rows(self, batch: Batch, numbers: Sequence[int]) -> Rows:
        return {"images": batch.images}

    def start_from(self, model: nn.Module) -> None:
        super().start_from(model)
        lengths = self.model.codebook.norm(dim=1)
        unit = torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2)
        require(unit, "the codes of this VQGAN are not unit vectors; expected one that `dall3 train vqgan` trained")
        self.codebook.start(self.model.codebook)

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, model = self.settings, self.model
        images = rows["images"].to(memory_format=self.processes.layout).float() / 127.5 - 1
        features = model.quant_conv(model.encoder(images)).float()
        loss = images.new_zeros(())
        figures: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            flat = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
            if progress >= s.codes_from or self.codebook.started:
                gathered = self.processes.gather(flat.detach())
                if not self.codebook.started:
                    self.codebook.start(self.codebook.some(gathered))
                ids = self.codebook(gathered)
                codes = self.codebook.codes[self.processes.own(ids)]
                self.codebook.update(gathered, ids, replace=progress < 0.8)
                commitment = (flat - codes).square().sum(dim=1).mean()
                loss = loss + s.commitment_weight * commitment
                used = torch.zeros_like(self.codebook.counts).index_fill_(0, ids, 1).sum()
                figures |= {"codes": used, "miss": commitment.detach()}
                flat = rotate_to(flat, codes)
            quantized = flat.view(len(images), *features.shape[2:], -1).permute(0, 3, 1, 2)
        decoded = model.decoder(model.post_quant_conv(quantized)).float()
        error = decoded - images
        loss = loss + error.abs().mean()
        figures["psnr"] = -10 * torch.log10(error.detach().square().mean() / 4)
        for perceptual in self.perceptual:
            distance = perceptual((decoded + 1) / 2, (images + 1) / 2)
            loss = loss + s.perceptual_weight * distance
            figures["perceptual"] = distance.detach()
        if progress >= s.discriminator_from:
            fooled, hinge = adversarial_losses(self.discriminator, decoded, images)
            loss = loss + s.discriminator_weight * ramp(progress, s.discriminator_from) * fooled + hinge
            figures["hinge"] = hinge.detach()
        return loss, figures

    def finished(self, model: nn.Module) -> GumbelVQ:
        """The model with the codebook in upstream's form. For unit vectors the scalar product ranks the codes."""
        assert isinstance(model, GumbelVQ)
        codes = self.codebook.codes.detach()
        state: dict[str, Any] = {"proj.weight": codes[:, :, None, None], "embed.weight": codes}
        model.quantize.load_state_dict(state | {"proj.bias": torch.zeros_like(codes[:, 0])})
        return model

    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """The images, and below them their reconstructions."""
        vqgan, images = self.finished(model), rows["images"].float() / 255
        decoded = to_pil(vqgan.decode(vqgan.encode(images)))
        lines = [pair[i : i + 8] for i in range(0, len(images), 8) for pair in (to_pil(images), decoded)]
        return make_grid(lines, images.shape[-1])

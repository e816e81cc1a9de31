"""The VQGAN: pictures to a grid of codes and back (arXiv 2012.09841), with perceptual and adversarial losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from dall3.images import make_grid, to_pil
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.scenes.world import Batch
from dall3.training.family.loop import Part
from dall3.training.family.perceptual import Perceptual
from dall3.training.family.pool import Rows
from dall3.training.vqgan import PatchDiscriminator, adversarial_losses, rotate_to
from dall3.weights.folder import save_part


@dataclass(frozen=True)
class VQGANLoss:
    """codes_from, discriminator_from: the progress at which the codebook and the discriminator come in. codebook_decay:
    of the codebook's moving averages. dead: a code that is used less than this share of the mean is replaced.
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
    """Pictures in [0, 1] to codes, int64 (batch, codes). The codes are compared in float32, whatever the autocast."""
    features = vqgan.quant_conv(vqgan.encoder(images * 2 - 1))
    with torch.autocast(images.device.type, enabled=False):
        return vqgan.choose(features.float()).flatten(1)


class Codebook(nn.Module):
    """Codes that follow the features by moving averages (arXiv 1711.00937, appendix A.1), each of unit length, as the
    features are compared by direction (arXiv 2110.04627). Codes that nothing uses move to features of the batch.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, count: int, width: int, decay: float, dead: float) -> None:
        super().__init__()
        self.decay, self.dead = decay, dead
        codes = F.normalize(torch.randn(count, width), dim=1)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(count))
        self.register_buffer("sums", codes.clone())

    def forward(self, rows: Tensor) -> Tensor:
        """The ids, int64 (n,), of the codes nearest to rows of unit length, float32 (n, width)."""
        return (rows @ self.codes.T).argmax(dim=1)

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Begin with some of these rows."""
        places = torch.randint(len(rows), (len(self.codes),), device=rows.device)
        self.codes.copy_(rows[places])
        self.sums.copy_(rows[places])
        self.counts.fill_(1)

    @torch.no_grad()
    def update(self, rows: Tensor, ids: Tensor, replace: bool) -> None:
        """Move the codes towards the rows that chose them. replace: whether to replace those that nothing uses."""
        used = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(rows[:, 0]))
        found = torch.zeros_like(self.sums).index_add_(0, ids, rows)
        self.counts.lerp_(used, 1 - self.decay)
        self.sums.lerp_(found, 1 - self.decay)
        mean = len(rows) / len(self.counts)
        is_dead = (self.counts < self.dead * mean) & replace
        fresh = rows[torch.randint(len(rows), (len(self.codes),), device=rows.device)]
        self.sums.copy_(torch.where(is_dead[:, None], fresh * mean, self.sums))
        self.counts.copy_(torch.where(is_dead, mean, self.counts))
        self.codes.copy_(F.normalize(self.sums, dim=1))


class VQGANPart(Part):
    model: GumbelVQ
    has_codes: Tensor

    def __init__(self, config: VQGANConfig, loss: VQGANLoss, device: torch.device) -> None:
        super().__init__()
        self.settings, self.model = loss, GumbelVQ(config)
        self.model.quantize.requires_grad_(False)  # set from the moving averages
        self.codebook = Codebook(config.n_embed, config.embed_dim, loss.codebook_decay, loss.dead)
        self.discriminator = PatchDiscriminator(loss.discriminator_channels)
        self.started = False
        # In a list: not a part of what is trained and saved.
        self.frozen = [Perceptual().to(device)] if loss.perceptual_weight else []

    def rows(self, batch: Batch) -> Rows:
        return {"pictures": batch.pictures}

    def load_state_dict(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        self.started = True  # a checkpoint is written long after the codes have begun
        return super().load_state_dict(*args, **kwargs)  # type: ignore[arg-type]

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, model, pictures = self.settings, self.model, rows["pictures"]
        images = pictures.to(memory_format=torch.channels_last).float() / 127.5 - 1
        features = model.quant_conv(model.encoder(images)).float()
        loss = images.new_zeros(())
        figures: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            flat = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
            if progress >= s.codes_from:
                if not self.started:
                    self.codebook.start(flat.detach())
                    self.started = True
                ids = self.codebook(flat.detach())
                codes = self.codebook.codes[ids]
                self.codebook.update(flat.detach(), ids, replace=progress < 0.8)
                loss = loss + s.commitment_weight * (flat - codes).square().sum(dim=1).mean()
                used = torch.zeros_like(self.codebook.counts).index_fill_(0, ids, 1).sum()
                figures |= {"codes": used, "miss": (flat - codes).square().sum(dim=1).mean().detach()}
                flat = rotate_to(flat, codes)
            quantized = flat.view(len(images), *features.shape[2:], -1).permute(0, 3, 1, 2)
        decoded = model.decoder(model.post_quant_conv(quantized)).float()
        error = decoded - images
        loss = loss + error.abs().mean()
        figures["psnr"] = -10 * torch.log10(error.detach().square().mean() / 4)
        for perceptual in self.frozen:
            distance = perceptual((decoded + 1) / 2, (images + 1) / 2)
            loss = loss + s.perceptual_weight * distance
            figures["perceptual"] = distance.detach()
        if progress >= s.discriminator_from:
            fooled, hinge = adversarial_losses(self.discriminator, decoded, images)
            # It comes in slowly: at first it knows nothing.
            weight = s.discriminator_weight * min((progress - s.discriminator_from) / 0.05, 1.0)
            loss = loss + weight * fooled + hinge
            figures["hinge"] = hinge.detach()
        return loss, figures

    def finished(self, model: nn.Module) -> GumbelVQ:
        """The model with the codebook in upstream's form: codes of unit length are ranked by the product alone."""
        assert isinstance(model, GumbelVQ)
        codes = self.codebook.codes.detach()
        model.quantize.load_state_dict(
            {"proj.weight": codes[:, :, None, None], "proj.bias": torch.zeros_like(codes[:, 0]), "embed.weight": codes}
        )
        return model

    def export(self, model: nn.Module, folder: Path) -> None:
        save_part(self.finished(model), folder)

    @torch.no_grad()
    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """Pictures, and below them what is left of them in their codes."""
        vqgan, images = self.finished(model), rows["pictures"][:16].float() / 255
        decoded = to_pil(vqgan.decode(vqgan.encode(images)))
        lines = [pair[i : i + 8] for i in range(0, len(images), 8) for pair in (to_pil(images), decoded)]
        return make_grid(lines, images.shape[-1])

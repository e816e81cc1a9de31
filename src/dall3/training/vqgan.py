"""Train a GumbelVQ, which encodes images to a grid of codes and decodes them (arXiv 2012.09841)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset

from dall3.errors import require
from dall3.images import make_grid, to_pil
from dall3.models.clip import CLIP
from dall3.models.vqgan import GumbelVQ, VQGANConfig
from dall3.training.loop import Task, TrainingConfig
from dall3.weights.folder import save_part


@dataclass(frozen=True)
class VQGANTraining:
    """Settings of the loss.

    quantizer: "nearest", a codebook updated by moving averages (arXiv 1711.00937) with the rotation trick (arXiv
    2410.06424), or "gumbel" (arXiv 1611.01144).
    quantize_from: first step with quantization; before it a plain autoencoder is trained.
    commitment_weight, codebook_decay: of "nearest". dead_code_threshold: codes used less often per step are replaced.
    kl_weight: weight of the KL divergence to a uniform use of the codes, of "gumbel". gumbel_temperature, gumbel_steps:
    the temperature falls from 1 to this value over this many steps.
    edge_weight: weight of the error in the differences of neighbouring pixels.
    perceptual_weight: weight of the distance in the features of the folder's CLIP, which respond to small details.
    discriminator_weight: weight of the patch discriminator. discriminator_from: its first step.
    discriminator_channels: its width.
    crop, crops, crop_share: train on `crops` random crops of `crop` pixels per image in this fraction of the steps, on
    whole images in the others.
    decoder_only: train the decoder alone, so that the codes of a trained VQGAN keep their meaning.
    corner_weight: weight of an additional error in the top left 2×2 codes, where decoders tend to paint an artefact.
    wrong_first: with decoder_only, the fraction of images whose first code is replaced by another image's. A
    transformer draws this code first, without context, so it is often wrong.
    """

    quantizer: str = "nearest"
    quantize_from: int = 0
    commitment_weight: float = 0.25
    codebook_decay: float = 0.99
    dead_code_threshold: float = 0.1
    kl_weight: float = 5e-4
    gumbel_temperature: float = 0.1
    gumbel_steps: int = 10_000
    edge_weight: float = 1.0
    perceptual_weight: float = 0.0
    discriminator_from: int = 10**9
    discriminator_weight: float = 0.1
    discriminator_channels: int = 32
    crop: int = 64
    crops: int = 2
    crop_share: float = 0.0
    decoder_only: bool = False
    corner_weight: float = 0.0
    wrong_first: float = 0.0

    def __post_init__(self) -> None:
        if self.quantizer not in ("nearest", "gumbel"):
            raise ValueError(f"quantizer '{self.quantizer}' is not known; expected nearest or gumbel")
        if self.wrong_first and not self.decoder_only:
            raise ValueError(f"wrong_first={self.wrong_first} needs decoder_only")


class PatchDiscriminator(nn.Sequential):
    """Patch discriminator (arXiv 1611.07004) of 34-pixel patches; input float (batch, in_channels, side, side)."""

    def __init__(self, channels: int, in_channels: int = 3) -> None:
        def layer(into: int, out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(into, out, 4, stride, 1), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]

        super().__init__(
            nn.Conv2d(in_channels, channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            *layer(channels, 2 * channels, 2),
            *layer(2 * channels, 4 * channels, 1),
            nn.Conv2d(4 * channels, 1, 4, 1, 1),
        )


def adversarial_losses(discriminator: nn.Module, images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's and the discriminator's hinge losses.

    images: generated, float (batch, channels, side, side). others: real. The generator's loss has gradients to `images`
    only, the discriminator's to its parameters only.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    fooled = -functional_call(discriminator, frozen, (images,)).mean()
    real, fake = discriminator(others), discriminator(images.detach())
    return fooled, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


class PerceptualDistance:
    """Perceptual distance in the features of a CLIP's image tower: LPIPS without learned weights (arXiv 1801.03924,
    section 3), the squared distance of the features of all layers, normalized at each position.
    """

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """The mean distance of images, float (batch, 3, side, side) in [0, 1]. Only `images` receives gradients."""
        self.clip.to(images.device)
        with torch.no_grad():
            targets = self.features(others)
        pairs = zip(self.features(images), targets, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        if hasattr(self.clip.model.visual, "positional_embedding"):  # a ViT accepts its own image size only
            images = F.interpolate(images, self.clip.image_size, mode="bilinear", antialias=True)
        inputs = (images - self.clip.mean) / self.clip.std
        found = self.clip.model.visual.forward_intermediates(inputs, intermediates_only=True)["image_intermediates"]
        return [F.normalize(layer.float(), dim=1) for layer in found]


def edges(images: Tensor) -> Tensor:
    """Horizontal and vertical differences of neighbouring pixels, flattened and concatenated."""
    return torch.cat((images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)), dim=1)


def rotate_to(features: Tensor, entries: Tensor) -> Tensor:
    """The rotation trick (arXiv 2410.06424, section 4.2): the codebook entries (…, width), with the gradient to the
    features of a constant rotation and scaling that maps each feature to its entry.
    """
    here, there = F.normalize(features.detach(), dim=-1), F.normalize(entries, dim=-1)
    middle = F.normalize(here + there, dim=-1)

    def along(direction: Tensor) -> Tensor:
        return (features * direction).sum(-1, keepdim=True)

    scale = entries.norm(dim=-1, keepdim=True) / features.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return scale * (features - 2 * along(middle) * middle + 2 * along(here) * there)


class VQGANTask(Task):
    has_codes: Tensor  # bool scalar: quantization has started

    def __init__(self, config: VQGANConfig, training: VQGANTraining, clip: CLIP | None = None) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        self.settings, self.model = training, GumbelVQ(config)
        self.discriminator = PatchDiscriminator(training.discriminator_channels)
        self.perceptual = None if clip is None else PerceptualDistance(clip)
        self.register_buffer("has_codes", torch.tensor(False))
        if training.decoder_only:
            for part in (self.model.encoder, self.model.quant_conv, self.model.quantize):
                part.requires_grad_(False)
        elif training.quantizer == "nearest":
            self.model.quantize.requires_grad_(False)  # set from the moving averages in `finished`
            self.nearest = VectorQuantize(
                dim=config.embed_dim,
                codebook_size=config.n_embed,
                kmeans_init=True,
                decay=training.codebook_decay,
                threshold_ema_dead_code=training.dead_code_threshold,
                rotation_trick=False,  # `rotate_to` needs no matrix per vector
                commitment_weight=training.commitment_weight,
            )

    def start_from(self, model: nn.Module) -> None:
        super().start_from(model)
        self.has_codes.fill_(True)
        if hasattr(self, "nearest"):
            book = self.nearest._codebook
            book.embed.copy_(self.model.codebook)
            book.embed_avg.copy_(self.model.codebook)
            book.cluster_size.fill_(1)  # the file does not store how often a code was used
            book.initted.fill_(True)

    def make_data(self, config: TrainingConfig, folder: Path, device: torch.device, progress: bool) -> Dataset[Any]:
        require(
            not self.settings.decoder_only or bool(self.has_codes),
            "decoder_only needs a trained VQGAN; give its folder as `initial`",
        )
        return super().make_data(config, folder, device, progress)

    def quantize(self, features: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize features (batch, embed_dim, h, w). Returns the decoder's input, the loss, and ids (batch, h, w)."""
        if self.settings.quantizer == "nearest":
            rows = features.float().flatten(2).transpose(1, 2)
            entries, ids, loss = self.nearest(rows)
            quantized = rotate_to(rows, entries.detach()).transpose(1, 2).view_as(features)
            return quantized, loss.sum(), ids.view(-1, *features.shape[2:])
        logits = self.model.quantize["proj"](features).float()
        progress = min(step / self.settings.gumbel_steps, 1.0)
        choice = self.gumbel_softmax(logits, tau=self.settings.gumbel_temperature**progress)
        log_share = logits.log_softmax(dim=1)
        kl = (log_share.exp() * (log_share + torch.tensor(float(logits.shape[1])).log())).sum(1).mean()
        quantized = torch.einsum("b n h w, n d -> b d h w", choice, self.model.codebook)
        return quantized, self.settings.kl_weight * kl, choice.argmax(dim=1)

    def gumbel_softmax(self, logits: Tensor, tau: float) -> Tensor:
        """Straight-through Gumbel softmax over dimension 1: one-hot values with the soft gradient, noise per item."""
        device, crops = logits.device, len(logits) // len(self.items)
        shape = (crops, *logits.shape[1:])
        waits = self.per_item(lambda g: torch.empty(shape, device=device).exponential_(generator=g), device)
        noise = -waits.transpose(0, 1).flatten(0, 1).log()
        soft = ((logits + noise) / tau).softmax(dim=1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        return hard - soft.detach() + soft

    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        s, model = self.settings, self.model
        if step != s.quantize_from and torch.rand(()) < s.crop_share:  # the codebook is initialized from whole images
            images = torch.cat([random_crops(images, s.crop) for _ in range(s.crops)])
        images = images * 2 - 1
        features = model.quant_conv(model.encoder(images))
        quantizer_loss, used = features.new_zeros(()), features.new_zeros(())
        if s.decoder_only:
            features = model.embed(self.exchange_first(model.choose(features).flatten(1)))
        elif step >= s.quantize_from:
            self.has_codes.fill_(True)
            features, quantizer_loss, ids = self.quantize(features, step)
            used = torch.zeros(model.num_tokens, device=ids.device).index_fill(0, ids.flatten(), 1).sum()
        decoded = model.decoder(model.post_quant_conv(features)).float()
        error = (decoded - images).detach()
        loss = self.distance(decoded, images) + quantizer_loss
        figures = {"psnr": -10 * torch.log10(error.square().mean() / 4), "codes": used.detach()}
        if s.corner_weight:
            side = 2 * model.downsampling
            corner = self.distance(decoded[..., :side, :side], images[..., :side, :side])
            loss = loss + s.corner_weight * corner
            figures |= {"corner": corner.detach()}
        if self.perceptual is not None:
            distance = self.perceptual((decoded + 1) / 2, (images + 1) / 2)
            loss = loss + s.perceptual_weight * distance
            figures |= {"perceptual": distance.detach()}
        if step >= s.discriminator_from:
            fooled, hinge = adversarial_losses(self.discriminator, decoded, images)
            loss = loss + s.discriminator_weight * fooled + hinge
            figures |= {"hinge": hinge.detach()}
        else:
            # Distributed training waits for the gradient of every parameter in every step.
            loss = loss + 0 * sum(p.sum() for p in self.discriminator.parameters())
        return loss, figures

    def distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Reconstruction error of images in [-1, 1]: L1 and L2 of the pixels, and L1 of neighbouring differences."""
        error = decoded - images
        edge = (edges(decoded) - edges(images)).abs().mean()
        return error.abs().mean() + self.settings.edge_weight * edge + error.square().mean()

    def exchange_first(self, ids: Tensor) -> Tensor:
        """Replace the first id of a random fraction of the batch, ids (batch, positions), by the previous item's."""
        device, crops = ids.device, len(ids) // len(self.items)
        chance = self.per_item(lambda g: torch.rand(crops, generator=g, device=device), device).T.flatten()
        first = torch.where(chance < self.settings.wrong_first, ids[:, 0].roll(1), ids[:, 0])
        return torch.cat((first[:, None], ids[:, 1:]), dim=1)

    def finished(self) -> GumbelVQ:
        """The model with the codebook in upstream's form, where the code of the highest logit is the nearest one.

        |h - e|² = |h|² - 2 h·e + |e|², so a 1×1 convolution with weight 2 e and bias -|e|² ranks the codes by distance.
        """
        if hasattr(self, "nearest"):
            codebook = self.nearest.codebook.detach().float()
            state = {
                "proj.weight": 2 * codebook[:, :, None, None],
                "proj.bias": -codebook.square().sum(1),
                "embed.weight": codebook,
            }
            self.model.quantize.load_state_dict(state)
        return self.model

    def sample(self, images: Tensor, captions: list[str]) -> Image:
        model = self.finished()
        if self.has_codes:
            decoded = to_pil(model.decode(model.encode(images)))
        else:
            features = model.quant_conv(model.encoder(images * 2 - 1))
            decoded = to_pil((model.decoder(model.post_quant_conv(features)) + 1) / 2)
        rows = [pair[i : i + 8] for i in range(0, len(images), 8) for pair in (to_pil(images), decoded)]
        return make_grid(rows, images.shape[-1])

    def export(self, folder: Path) -> None:
        save_part(self.finished(), folder)


def random_crops(images: Tensor, side: int) -> Tensor:
    """Crop a square at the same random position of every image."""
    top, left = (int(torch.randint(size - side + 1, ())) for size in images.shape[2:])
    return images[..., top : top + side, left : left + side]

"""The upsampler: from pure noise to the fine picture, told a coarse picture's codes and shown it as they decode.

It predicts the picture itself at every step, by its pixels, by ImageNet's features and by a patch discriminator, so
that a few steps are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from dall3.diffusion.denoising import Denoising, denoise
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.images import enlarge, make_grid, to_pil
from dall3.models.unet import UNet, UNetConfig
from dall3.models.vqgan import VQModel
from dall3.scenes.world import Batch
from dall3.training.family.loop import Part
from dall3.training.family.perceptual import Perceptual
from dall3.training.family.pool import Rows
from dall3.training.family.vqgan import encode
from dall3.training.upsampler import end_branches_at_zero
from dall3.training.vqgan import PatchDiscriminator, adversarial_losses
from dall3.weights.folder import save_part


@dataclass(frozen=True)
class UpsamplerLoss:
    """crop: the side of the square of each picture that the perceptual distance and the discriminator look at.
    snr_limits: of the signal-to-noise ratio by which the squared error counts (arXiv 2202.00512, section 4).
    discriminator_from: the progress at which the discriminator comes in.
    """

    perceptual_weight: float = 1.0
    absolute_weight: float = 0.5
    snr_limits: tuple[float, float] = (1.0, 5.0)
    discriminator_weight: float = 0.03
    discriminator_from: float = 0.45
    discriminator_channels: int = 64
    crop: int = 160
    steps: int = 8


class UpsamplerPart(Part):
    model: UNet

    def __init__(self, config: UNetConfig, loss: UpsamplerLoss, vqgan: VQModel, device: torch.device) -> None:
        super().__init__()
        if config.diffusion.learn_sigma or not config.diffusion.predict_xstart:
            raise ValueError("this upsampler predicts pictures: predict_xstart = true, learn_sigma = false")
        self.settings, self.model = loss, UNet(config)
        end_branches_at_zero(self.model)
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.discriminator = PatchDiscriminator(loss.discriminator_channels, in_channels=6)
        self.frozen = [vqgan.to(device).eval().requires_grad_(False)]
        self.perceptual = [Perceptual().to(device)] if loss.perceptual_weight else []
        self.run: Callable[..., Tensor] = self.model.forward

    def compile_parts(self) -> None:
        self.run = torch.compile(self.model.forward, dynamic=False)

    def run_eagerly(self) -> None:
        self.run = self.model.forward

    def rows(self, batch: Batch) -> Rows:
        return {"pictures": batch.pictures}

    def condition(self, images: Tensor) -> dict[str, Tensor]:
        """What the UNet is told of fine pictures (batch, 3, side, side) in [0, 1], by their codes."""
        vqgan = self.frozen[0]
        ids = encode(vqgan, F.avg_pool2d(images, 2))
        embeddings, coarse = vqgan.embed(ids), vqgan.decode(ids)
        return {"image_embeds": embeddings, "low_res": coarse.float() * 2 - 1}

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, diffusion = self.settings, self.diffusion
        images = rows["pictures"].to(memory_format=torch.channels_last).float() / 255
        device, side = images.device, images.shape[-1]
        with torch.no_grad():
            told = self.condition(images)
        x_start = images * 2 - 1
        t = torch.randint(len(diffusion), (len(images),), device=device)
        x = diffusion.add_noise(x_start, t, torch.randn_like(x_start))
        found = self.run(x, diffusion.at("timestep", t), **told).float()
        snr = torch.exp(2 * diffusion.at("half_log_snr", t)).clamp(*s.snr_limits)
        error = found - x_start
        squared = error.square().mean(dim=(1, 2, 3))
        top, left = (int(n) for n in torch.randint(side - s.crop + 1, (2,)))
        cut = (..., slice(top, top + s.crop), slice(left, left + s.crop))
        loss = (squared * snr).mean() + s.absolute_weight * error.abs().mean()
        figures = {"squared": squared.detach().mean()}
        for perceptual in self.perceptual:
            distance = perceptual((found[cut] + 1) / 2, (x_start[cut] + 1) / 2)
            loss = loss + s.perceptual_weight * distance
            figures["perceptual"] = distance.detach()
        if progress >= s.discriminator_from:
            coarse = F.interpolate(told["low_res"], side, mode="bicubic", antialias=True)[cut]
            # What a picture has beyond the enlarged coarse one, eight times as large, and that one: grain on a smooth
            # thing is no true picture's.
            pair = [torch.cat((8 * (picture[cut] - coarse), coarse), dim=1) for picture in (found, x_start)]
            fooled, hinge = adversarial_losses(self.discriminator, *pair)
            weight = s.discriminator_weight * min((progress - s.discriminator_from) / 0.05, 1.0)
            loss = loss + weight * fooled + hinge
            figures["hinge"] = hinge.detach()
        return loss, figures

    def export(self, model: nn.Module, folder: Path) -> None:
        save_part(model, folder)

    @torch.no_grad()
    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """Pictures, their coarse ones enlarged, and what diffusion makes of their codes and noise."""
        assert isinstance(model, UNet)
        images = rows["pictures"][:6].float() / 255
        told, side = self.condition(images), images.shape[-1]
        generators = [torch.Generator(images.device).manual_seed(k) for k in range(len(images))]
        settings = Denoising(num_inference_steps=self.settings.steps)
        fine = denoise(model, (3, side, side), generators, told, settings)
        lines = [images, enlarge((told["low_res"] + 1) / 2, side), (fine + 1) / 2]
        return make_grid([to_pil(line) for line in lines], side)

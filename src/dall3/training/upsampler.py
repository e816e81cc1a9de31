"""Train the upsampler, which denoises from pure noise, conditioned on codes and on the coarse image decoded from them.

It predicts the image itself. The loss combines the squared error, a perceptual distance and a patch discriminator, so
that a few denoising steps are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from dall3.diffusion.denoising import Denoising, denoise
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.errors import require
from dall3.images import enlarge, make_grid, to_pil
from dall3.models.unet import AttentionBlock, ResBlock, UNet, UNetConfig
from dall3.models.vqgan import VQModel
from dall3.scenes.world import Batch
from dall3.training.losses import PatchDiscriminator, Perceptual, adversarial_losses, ramp
from dall3.training.part import Part, Rows
from dall3.training.processes import Processes
from dall3.training.vqgan import encode


@dataclass(frozen=True)
class UpsamplerLoss:
    """Settings of the loss.

    snr_limits: bounds of the signal-to-noise ratio that weights the squared error (arXiv 2202.00512, section 4).
    absolute_weight: weight of the absolute error. crop: side in pixels of the random crop used by the perceptual
    distance and the discriminator. discriminator_from: progress at which the discriminator starts. steps: denoising
    steps of the samples.
    """

    perceptual_weight: float = 1.0
    absolute_weight: float = 0.5
    snr_limits: tuple[float, float] = (1.0, 5.0)
    discriminator_weight: float = 0.03
    discriminator_from: float = 0.45
    discriminator_channels: int = 64
    crop: int = 160
    steps: int = 8


def end_branches_at_zero(unet: UNet) -> None:
    """Initialize the last layer of each residual branch and of the UNet with zeros, as guided-diffusion does."""
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock | AttentionBlock)]
    ends = [block.out_layers[-1] if isinstance(block, ResBlock) else block.proj_out for block in blocks]
    for end in (*ends, unet.out[-1]):
        for parameter in end.parameters():
            torch.nn.init.zeros_(parameter)


class UpsamplerPart(Part):
    """Trains a `UNet` on the codes of a trained VQGAN."""

    model: UNet

    def __init__(self, config: UNetConfig, loss: UpsamplerLoss, vqgan: VQModel, processes: Processes) -> None:
        super().__init__(processes)
        predicts_images = config.diffusion.predict_xstart and not config.diffusion.learn_sigma
        require(predicts_images, "upsampler.model.diffusion: expected predict_xstart = true and learn_sigma = false")
        wanted = config.embedding_dims is not None and config.embedding_dims[0] == vqgan.config.embed_dim
        require(
            wanted and config.super_resolution,
            f"upsampler.model: expected super_resolution = true and embedding_dims = [{vqgan.config.embed_dim}, …], "
            "the width of the VQGAN's codes",
        )
        self.settings, self.model = loss, UNet(config)
        end_branches_at_zero(self.model)
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.discriminator = PatchDiscriminator(loss.discriminator_channels, in_channels=6)
        # In lists, so that they are not submodules.
        self.frozen = [vqgan.to(processes.device).eval().requires_grad_(False)]
        self.perceptual = [Perceptual().to(processes.device)] if loss.perceptual_weight else []
        self.run: Callable[..., Tensor] = self.model.forward

    def compile_parts(self) -> None:
        self.run = torch.compile(self.model.forward, dynamic=False)

    def run_eagerly(self) -> None:
        self.run = self.model.forward

    def rows(self, batch: Batch, numbers: Sequence[int]) -> Rows:
        return {"images": batch.images}

    @torch.no_grad()
    def condition(self, images: Tensor) -> dict[str, Tensor]:
        """The UNet's conditioning for images (batch, 3, side, side) in [0, 1], computed from their codes."""
        vqgan = self.frozen[0]
        side = 2 * images.shape[-1] // self.model.config.downsampling * vqgan.downsampling
        ids = encode(vqgan, F.interpolate(images, side, mode="area"))
        return {"image_embeds": vqgan.embed(ids), "low_res": vqgan.decode(ids).float() * 2 - 1}

    def forward(self, rows: Rows, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, diffusion = self.settings, self.diffusion
        images = rows["images"].to(memory_format=self.processes.layout).float() / 255
        side = images.shape[-1]
        conditioning = self.condition(images)
        x_start = images * 2 - 1
        t = (self.random(torch.rand, len(images)) * len(diffusion)).long()
        x = diffusion.add_noise(x_start, t, self.random(torch.randn, *x_start.shape))
        found = self.run(x, diffusion.at("timestep", t), **conditioning).float()
        snr = torch.exp(2 * diffusion.at("half_log_snr", t)).clamp(*s.snr_limits)
        error = found - x_start
        squared = error.square().mean(dim=(1, 2, 3))
        crop = min(s.crop, side)
        top, left = (int(n) for n in torch.randint(side - crop + 1, (2,)))
        cut = (..., slice(top, top + crop), slice(left, left + crop))
        loss = (squared * snr).mean() + s.absolute_weight * error.abs().mean()
        figures = {"squared": squared.detach().mean()}
        for perceptual in self.perceptual:
            distance = perceptual((found[cut] + 1) / 2, (x_start[cut] + 1) / 2)
            loss = loss + s.perceptual_weight * distance
            figures["perceptual"] = distance.detach()
        if progress >= s.discriminator_from:
            coarse = F.interpolate(conditioning["low_res"], side, mode="bicubic", antialias=True)[cut]
            # The discriminator sees the enlarged coarse image and the difference from it, times 8 because the
            # difference is small. It can then penalize grain on smooth surfaces.
            pair = [torch.cat((8 * (image[cut] - coarse), coarse), dim=1) for image in (found, x_start)]
            fooled, hinge = adversarial_losses(self.discriminator, *pair)
            loss = loss + s.discriminator_weight * ramp(progress, s.discriminator_from) * fooled + hinge
            figures["hinge"] = hinge.detach()
        return loss, figures

    def sheet(self, model: nn.Module, rows: Rows) -> Image:
        """The images, their enlarged coarse images, and the results of denoising."""
        assert isinstance(model, UNet)
        images = rows["images"][:6].float() / 255
        conditioning, side = self.condition(images), images.shape[-1]
        generators = [torch.Generator(images.device).manual_seed(k) for k in range(len(images))]
        settings = Denoising(num_inference_steps=self.settings.steps)
        fine = denoise(model, (3, side, side), generators, conditioning, settings)
        lines = [images, enlarge((conditioning["low_res"] + 1) / 2, side), (fine + 1) / 2]
        return make_grid([to_pil(line) for line in lines], side)

"""Train the diffusion upsampler, which is conditioned on the embeddings of an image's codes.

The variance is learned with the hybrid loss (arXiv 2102.09672, section 3.1). The network is convolutional except for
attention at low resolution, so it can be trained on crops and applied to whole images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from dall3.diffusion.denoising import Denoising, denoise
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.images import enlarge, make_grid, to_pil
from dall3.models.clip import CLIP
from dall3.models.unet import AttentionBlock, ResBlock, UNet, UNetConfig
from dall3.models.vqgan import VQModel
from dall3.training.loop import Task
from dall3.training.vqgan import PatchDiscriminator, PerceptualDistance, adversarial_losses
from dall3.weights.folder import save_part, set_default


@dataclass(frozen=True)
class UpsamplerTraining:
    """Settings of the loss.

    crop, crops, crop_share: train on `crops` random crops of `crop` pixels per image in this fraction of the steps, on
    whole images in the others. crop is a multiple of twice the size of a code in the fine image.
    snr_limits: bounds of the signal-to-noise ratio that weights the error of a predicted image (arXiv 2202.00512,
    section 4). The error of predicted noise has weight 1.
    vlb_weight: weight of the variational bound, which trains the variance.
    max_strength: fraction of the noise schedule that is trained on, from its least noisy end. Below 1 the weights
    refine enlarged coarse images with a `strength` up to this value, and cannot start from pure noise.
    coarse_share: fraction of the crops whose noise includes the difference to the enlarged coarse image, as when
    denoising started from that image at an earlier step. The network then redraws edges.
    perceptual_weight: weight of the distance between predicted and true image in the features of the folder's CLIP
    (arXiv 2401.00110 uses other features). perceptual_reductions: factors by which both are downscaled for it; the
    distance is averaged over them. 2 gives the size of coarse images, on which CLIP was trained.
    discriminator_weight: weight of the loss of a patch discriminator (arXiv 1611.07004; arXiv 2311.17042, section 3.2).
    It sees the difference between the image and the enlarged coarse one, and the latter. discriminator_from: first step
    at which its loss counts; before it only the discriminator is trained. discriminator_channels: its width.
    """

    crop: int = 128
    crops: int = 1
    crop_share: float = 1.0
    snr_limits: tuple[float, float] = (1.0, 5.0)
    vlb_weight: float = 1e-3
    max_strength: float = 1.0
    coarse_share: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_reductions: tuple[int, ...] = (2,)
    discriminator_weight: float = 0.0
    discriminator_from: int = 0
    discriminator_channels: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.max_strength <= 1:
            raise ValueError(f"max_strength={self.max_strength}; expected a share of the noise schedule, in (0, 1]")
        if not self.perceptual_reductions or min(self.perceptual_reductions) < 1:
            raise ValueError(f"perceptual_reductions={self.perceptual_reductions}; expected whole numbers from 1")


class UpsamplerTask(Task):
    def __init__(
        self, config: UNetConfig, training: UpsamplerTraining, vqgan: VQModel, clip: CLIP | None = None
    ) -> None:
        super().__init__()
        self.settings, self.model, self.frozen = training, UNet(config), [vqgan]
        end_branches_at_zero(self.model)
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.perceptual = None if clip is None else PerceptualDistance(clip)
        channels = training.discriminator_channels
        self.discriminator = PatchDiscriminator(channels, in_channels=6) if training.discriminator_weight else None
        self.run = self.model.forward

    def compile_parts(self) -> None:
        self.run = torch.compile(self.model.forward, dynamic=False)

    def encode(self, images: Tensor) -> Tensor:
        """Downscale images (batch, 3, side, side) in [0, 1] and encode them with the VQGAN."""
        vqgan, config = self.frozen[0].to(images.device), self.model.config
        coarse = 2 * images.shape[-1] // config.downsampling * vqgan.downsampling
        return vqgan.encode(F.interpolate(images, coarse, mode="area"))

    def coarse(self, ids: Tensor, side: int) -> Tensor:
        """Decode codes and enlarge the coarse images to (batch, 3, side, side) in [0, 1], where denoising starts."""
        return enlarge(self.frozen[0].decode(ids).float(), side)  # no half-precision interpolation on a CPU

    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        s, diffusion, learn_sigma = self.settings, self.diffusion, self.model.config.diffusion.learn_sigma
        with torch.no_grad():
            ids = self.encode(images)
            embeddings = self.frozen[0].embed(ids)
            is_needed = s.coarse_share or self.discriminator is not None
            coarse = self.coarse(ids, images.shape[-1]) if is_needed else images
        if torch.rand(()) < s.crop_share:
            unit = 2 * images.shape[-1] // embeddings.shape[-1]  # the embeddings' convolution has stride 2
            room = (images.shape[-1] - s.crop) // unit + 1
            places = torch.randint(room, (s.crops, 2)).tolist()
            images, coarse = (
                torch.cat([crop_at(x, place, unit, s.crop) for place in places]) for x in (images, coarse)
            )
            embeddings = torch.cat([crop_at(embeddings, place, 2, 2 * s.crop // unit) for place in places])
        x_start = images * 2 - 1
        steps, device = max(round(s.max_strength * len(diffusion)), 1), x_start.device
        crops = len(x_start) // len(captions)

        def draw(generator: torch.Generator) -> Tensor:
            """Three uniform numbers in [0, 1) and the noise, concatenated, for every crop of an image."""
            u = torch.rand(crops, 3, generator=generator, device=device)
            noise = torch.randn(crops, x_start[0].numel(), generator=generator, device=device)
            return torch.cat((u, noise), dim=1)

        drawn = self.per_item(draw, device).transpose(0, 1).flatten(0, 1)  # first crops of all images, then second ones
        noise, is_coarse = drawn[:, 3:].view_as(x_start), drawn[:, 2] < s.coarse_share
        # The step at which denoising started. The least noisy quarter is excluded, because there the difference to the
        # coarse image would be many times the noise.
        first = torch.where(is_coarse, ((0.25 + 0.75 * drawn[:, 1]) * steps).long(), steps).clamp(max=steps - 1)
        t = (drawn[:, 0] * (first + 1)).long()
        ratio = diffusion.at("sqrt_bar", first, x_start) / diffusion.at("sqrt_one_minus_bar", first, x_start)
        noise = noise + is_coarse.view(-1, 1, 1, 1) * ratio * (coarse * 2 - 1 - x_start)
        x = diffusion.add_noise(x_start, t, noise)
        output = self.run(x, diffusion.at("timestep", t), image_embeds=embeddings).float()
        prediction = diffusion.predict(output, x, t)
        if self.model.config.diffusion.predict_xstart:
            snr = torch.exp(2 * diffusion.at("half_log_snr", t))
            error = (prediction.pred_xstart - x_start).square().mean(dim=(1, 2, 3)) * snr.clamp(*s.snr_limits)
        else:
            error = (output[:, :3] - noise).square().mean(dim=(1, 2, 3))
        loss = error.mean()
        figures = {"error": loss.detach()}
        if self.perceptual is not None:
            pair = [(picture + 1) / 2 for picture in (prediction.pred_xstart, x_start)]
            reduced = ([F.avg_pool2d(picture, by) for picture in pair] for by in s.perceptual_reductions)
            distance = torch.stack([self.perceptual(*pictures) for pictures in reduced]).mean()
            loss = loss + s.perceptual_weight * distance
            figures["perceptual"] = distance.detach()
        if self.discriminator is not None:
            pair = [residual_and_coarse(picture, coarse * 2 - 1) for picture in (prediction.pred_xstart, x_start)]
            fooled, hinge = adversarial_losses(self.discriminator, *pair)
            loss = loss + s.discriminator_weight * (step >= s.discriminator_from) * fooled + hinge
            figures["hinge"] = hinge.detach()
        if learn_sigma:
            bound = variational_bound(diffusion, prediction.mean.detach(), prediction.log_variance, x_start, x, t)
            loss = loss + s.vlb_weight * len(diffusion) * bound.mean()
            figures["bound"] = bound.detach().mean()
        return loss, figures

    def sample(self, images: Tensor, captions: list[str]) -> Image:
        """Each image, its coarse image, and the result of denoising."""
        images = images[:6]
        vqgan, side = self.frozen[0], images.shape[-1]
        ids = self.encode(images)
        generators = [torch.Generator(images.device).manual_seed(k) for k in range(len(images))]
        coarse, strength = self.coarse(ids, side), self.settings.max_strength
        start = coarse * 2 - 1 if strength < 1 else None
        settings = Denoising(num_inference_steps=25, strength=strength)
        fine = denoise(self.model, (3, side, side), generators, {"image_embeds": vqgan.embed(ids)}, settings, start)
        rows = [images, coarse, (fine + 1) / 2]
        return make_grid([to_pil(row) for row in rows], side)

    def export(self, folder: Path) -> None:
        save_part(self.model, folder)
        if self.settings.max_strength < 1:
            set_default(folder.parent, "strength", self.settings.max_strength)


def end_branches_at_zero(unet: UNet) -> None:
    """Initialize the last layer of each residual branch and of the UNet with zeros, as guided-diffusion does."""
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock | AttentionBlock)]
    ends = [block.out_layers[-1] if isinstance(block, ResBlock) else block.proj_out for block in blocks]
    for end in (*ends, unet.out[-1]):
        for parameter in end.parameters():
            torch.nn.init.zeros_(parameter)


def residual_and_coarse(pictures: Tensor, coarse: Tensor) -> Tensor:
    """The discriminator's input, (batch, 6, side, side): the difference to the coarse images, times 8, and those.

    pictures, coarse: (batch, 3, side, side), about [-1, 1]. The difference is scaled because it is small compared with
    the images; a discriminator on the images themselves did not learn.
    """
    return torch.cat((8 * (pictures - coarse), coarse), dim=1)


def crop_at(x: Tensor, place: list[int], unit: int, side: int) -> Tensor:
    """Crop a square of `side` whose top left corner is at `place`, (row, column) in multiples of `unit`."""
    top, left = (number * unit for number in place)
    return x[..., top : top + side, left : left + side]


def variational_bound(
    diffusion: GaussianDiffusion, mean: Tensor, log_variance: Tensor, x_start: Tensor, x: Tensor, t: Tensor
) -> Tensor:
    """The term of the variational bound at steps t, in bits per dimension: float (batch,).

    For t > 0 it is the KL divergence between q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t). For t = 0 it is the negative
    log-likelihood of the 8-bit pixel values.
    """
    true_mean, true_log_variance = diffusion.posterior_mean(x_start, x, t), diffusion.at("log_posterior", t, x)
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        - 1
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    # The normal distribution's mass in the interval of one 8-bit level; unbounded below black and above white.
    scale = torch.exp(-0.5 * log_variance)
    upper = torch.where(x_start > 0.999, 1.0, torch.special.ndtr((x_start - mean + 1 / 255) * scale))
    lower = torch.where(x_start < -0.999, 0.0, torch.special.ndtr((x_start - mean - 1 / 255) * scale))
    likelihood = -torch.log((upper - lower).clamp(min=1e-12))
    nats = torch.where((t == 0).view(-1, 1, 1, 1), likelihood, divergence)
    return nats.mean(dim=(1, 2, 3)) / torch.tensor(2.0).log()

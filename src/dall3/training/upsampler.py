"""Training the diffusion upsampler: noisy pictures back to clean ones, told the codes of the picture.

Learned variance by the hybrid loss (arXiv 2102.09672, section 3.1). The network is convolutional up to its attention
at low resolution, so it may be trained on crops and used on whole pictures.
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
    """crop: pixels a side of the random crops, `crops` from each picture, that are trained on in `crop_share` of the
    steps; a multiple of twice what a code stands for in the fine picture. snr_limits: bounds of the signal-to-noise
    ratio that weighs a step's error in the predicted picture (arXiv 2202.00512, section 4); the error in the noise is
    weighed by 1. vlb_weight: of the variational bound that trains the variance, against the error. max_strength:
    the share of the noise schedule that is trained on, from its least noisy end: below 1 the weights can refine an
    enlarged coarse picture with a `strength` up to that, and cannot start from pure noise. coarse_share: the share of
    the crops that are noised as refining does it, from the enlarged coarse picture at some earlier step; what that one
    lacks is then a part of the noise that is to be found, so that edges are drawn anew and not kept as they are.
    perceptual_weight: of the distance between the predicted picture and the true one in the features of the folder's
    CLIP (arXiv 2401.00110 trains a diffusion model so, on other features), the mean of that at the sizes that
    `perceptual_reductions` divide theirs by: 2 for coarse pictures' size, of which CLIP knows whole ones, and 1 for
    every pixel. discriminator_weight: of a patch discriminator's verdict on the predicted picture, beside the error
    (arXiv 2311.17042, section 3.2, has such a loss on few steps too); it sees what the picture has beyond the enlarged
    coarse one, and that one (arXiv 1611.07004), so that grain on a smooth thing is no true picture's. From step
    `discriminator_from` on it counts, and until then the discriminator learns alone.
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
        """Fine pictures (batch, 3, side, side) in [0, 1] to their coarse ones' codes."""
        vqgan, config = self.frozen[0].to(images.device), self.model.config
        coarse = 2 * images.shape[-1] // config.downsampling * vqgan.downsampling
        return vqgan.encode(F.interpolate(images, coarse, mode="area"))

    def coarse(self, ids: Tensor, side: int) -> Tensor:
        """Codes to what refining starts from: coarse pictures enlarged to (batch, 3, side, side), in [0, 1]."""
        return enlarge(self.frozen[0].decode(ids).float(), side)  # a CPU enlarges nothing in half precision

    def forward(self, images: Tensor, captions: list[str], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        s, diffusion, learn_sigma = self.settings, self.diffusion, self.model.config.diffusion.learn_sigma
        with torch.no_grad():
            ids = self.encode(images)
            embeddings = self.frozen[0].embed(ids)
            is_needed = s.coarse_share or self.discriminator is not None
            coarse = self.coarse(ids, images.shape[-1]) if is_needed else images
        if torch.rand(()) < s.crop_share:
            unit = 2 * images.shape[-1] // embeddings.shape[-1]  # the convolution of the embeddings has stride 2
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
            """Three shares in [0, 1) and noise, side by side, for every crop of one picture."""
            u = torch.rand(crops, 3, generator=generator, device=device)
            noise = torch.randn(crops, x_start[0].numel(), generator=generator, device=device)
            return torch.cat((u, noise), dim=1)

        drawn = self.per_item(draw, device).transpose(0, 1).flatten(0, 1)  # the first crops of all, then the second
        noise, is_coarse = drawn[:, 3:].view_as(x_start), drawn[:, 2] < s.coarse_share
        # The step at which refining began: not the last ones, where what is missing would be many times the noise.
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
        """For every picture itself, its coarse one, and what diffusion makes of the codes."""
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
    """Start every residual branch, and the prediction, at zero (arXiv 2102.09672 and guided-diffusion do so too)."""
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock | AttentionBlock)]
    ends = [block.out_layers[-1] if isinstance(block, ResBlock) else block.proj_out for block in blocks]
    for end in (*ends, unet.out[-1]):
        for parameter in end.parameters():
            torch.nn.init.zeros_(parameter)


def residual_and_coarse(pictures: Tensor, coarse: Tensor) -> Tensor:
    """What pictures have beyond the enlarged coarse ones, eight times as large, and these: (batch, 6, side, side).

    pictures, coarse: (batch, 3, side, side) about [-1, 1]. A discriminator that was shown the pictures in place of the
    residuals, which are small beside them, told nothing apart in 250 steps.
    """
    return torch.cat((8 * (pictures - coarse), coarse), dim=1)


def crop_at(x: Tensor, place: list[int], unit: int, side: int) -> Tensor:
    """The square of `side` whose corner is at `place`, (row, column) counted in units."""
    top, left = (number * unit for number in place)
    return x[..., top : top + side, left : left + side]


def variational_bound(
    diffusion: GaussianDiffusion, mean: Tensor, log_variance: Tensor, x_start: Tensor, x: Tensor, t: Tensor
) -> Tensor:
    """The term of the variational bound that belongs to steps t, in bits a channel: float (batch,).

    From step 1 on the Kullback-Leibler divergence of q(x_{t-1} | x_t, x_0) from p(x_{t-1} | x_t); at step 0 the
    likelihood of the picture's 8 bits.
    """
    true_mean, true_log_variance = diffusion.posterior_mean(x_start, x, t), diffusion.at("log_posterior", t, x)
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        - 1
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    # The normal distribution's mass over the step of 1/255 around the pixel, open to both sides at black and white.
    scale = torch.exp(-0.5 * log_variance)
    upper = torch.where(x_start > 0.999, 1.0, torch.special.ndtr((x_start - mean + 1 / 255) * scale))
    lower = torch.where(x_start < -0.999, 0.0, torch.special.ndtr((x_start - mean - 1 / 255) * scale))
    likelihood = -torch.log((upper - lower).clamp(min=1e-12))
    nats = torch.where((t == 0).view(-1, 1, 1, 1), likelihood, divergence)
    return nats.mean(dim=(1, 2, 3)) / torch.tensor(2.0).log()

"""CLIP-guided diffusion (Crowson, 2021), as in Jack000/guided-diffusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dall3.diffusion.samplers import Predict
from dall3.diffusion.schedule import GaussianDiffusion, Prediction
from dall3.models.clip import CLIP


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Half the squared great-circle distance of x and y (…, width) on the unit sphere: (…), in [0, π²/2]."""
    chord = (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).norm(dim=-1)
    return 2 * torch.arcsin(chord / 2) ** 2


def total_variation(images: Tensor) -> Tensor:
    """Total variation loss (arXiv 1412.0035): mean squared difference of adjacent pixels.

    images: (batch, 3, height, width). Returns (batch,).
    """
    padded = F.pad(images, (0, 1, 0, 1), "replicate")
    across = padded[..., :-1, 1:] - padded[..., :-1, :-1]
    down = padded[..., 1:, :-1] - padded[..., :-1, :-1]
    return (across**2 + down**2).mean(dim=(1, 2, 3))


def range_loss(images: Tensor) -> Tensor:
    """Mean squared distance of images (batch, 3, height, width) from the range [-1, 1]: (batch,)."""
    return ((images - images.clamp(-1, 1)) ** 2).mean(dim=(1, 2, 3))


def draw_cutouts(side: int, cut_size: int, cutn: int, generator: torch.Generator) -> Tensor:
    """Sample random squares in an image of `side` pixels: int64 (cutn, 3), with columns size, left, top.

    Sizes are uniform between min(side, cut_size) and side.
    """
    smallest = min(side, cut_size)
    size, left, top = torch.rand(3, cutn, generator=generator, device=generator.device)
    size = (size * (side - smallest) + smallest).long()
    room = side - size + 1
    return torch.stack((size, (left * room).long(), (top * room).long()), dim=-1)


def pooling_matrix(start: Tensor, size: Tensor, side: int, out: int) -> Tensor:
    """Average pooling of the pixels start … start + size - 1 to `out` bins, as matrices, float (cutn, out, side).

    start, size: int64 (cutn,). Bin i averages the pixels from floor(i · size / out) up to, but not including,
    ceil((i + 1) · size / out), as `adaptive_avg_pool2d` does.
    """
    bins = torch.arange(out, device=size.device)
    first = start[:, None] + bins * size[:, None] // out
    last = start[:, None] - (-(bins + 1) * size[:, None] // out)
    pixel = torch.arange(side, device=size.device)
    inside = (pixel >= first[..., None]) & (pixel < last[..., None])
    return inside.float() / (last - first)[..., None]


def cut_out(images: Tensor, cutouts: Tensor, cut_size: int) -> Tensor:
    """Crop and average-pool square images (batch, 3, side, side): (cutn · batch, 3, cut_size, cut_size).

    cutouts: int64 (cutn, 3), from `draw_cutouts`. Two matrix products pool all cut-outs at once, so that shapes stay
    static for any random sizes.
    """
    size, left, top = cutouts.unbind(-1)
    side = images.shape[-1]
    rows, columns = (pooling_matrix(start, size, side, cut_size).to(images.dtype) for start in (top, left))
    pooled = torch.einsum("bchw,kow->kbcho", images, columns)
    return torch.einsum("kbcho,kih->kbcio", pooled, rows).flatten(0, 1)


Loss = Callable[[Tensor, Tensor], Tensor]  # loss(blend, x_start): see `guided`; summed over the batch


@dataclass(frozen=True, eq=False)
class GuidanceLoss:
    """The loss of CLIP guidance: `loss(blend, x_start)`, with the arguments of `guided`.

    clip: None for the penalties alone. targets: embeddings, float (targets, embed_dim). weights: (targets,), with a sum
    of 1 or -1. scale: factor of the CLIP loss. cutn: cut-outs per call. generator: samples new cut-outs at every call,
    on the device of the images. tv_scale, range_scale: factors of the total variation loss of the blend and of the
    range loss of the predicted x_0.
    """

    clip: CLIP | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    scale: float = 0.0
    cutn: int = 0
    generator: torch.Generator | None = None
    tv_scale: float = 0.0
    range_scale: float = 0.0

    def sample_inputs(self, side: int) -> dict[str, Tensor]:
        """Inputs of the CLIP loss besides images of `side` pixels: new cut-outs, and the targets. {} without a CLIP."""
        if self.clip is None:
            return {}
        assert self.targets is not None and self.weights is not None and self.generator is not None
        cutouts = draw_cutouts(side, self.clip.image_size, self.cutn, self.generator)
        return {"cutouts": cutouts, "targets": self.targets, "weights": self.weights}

    def __call__(self, blend: Tensor, x_start: Tensor) -> Tensor:
        return self.of(blend, x_start, **self.sample_inputs(blend.shape[-1]))

    def of(self, blend: Tensor, x_start: Tensor, **inputs: Tensor) -> Tensor:
        """The loss for given `sample_inputs`. A function of tensors only, so that a CUDA graph can capture it."""
        result = self.clip_loss(blend, **inputs) if inputs else blend.new_zeros(())
        if self.tv_scale:
            result = result + total_variation(blend).sum() * self.tv_scale
        if self.range_scale:
            result = result + range_loss(x_start).sum() * self.range_scale
        return result

    def clip_loss(self, blend: Tensor, cutouts: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The weighted spherical distances of the cut-outs to the targets, averaged over the cut-outs."""
        assert self.clip is not None
        embeddings = self.clip.embed_images(cut_out((blend + 1) / 2, cutouts, self.clip.image_size))
        distances = spherical_distance(embeddings[:, None], targets[None])
        return (distances * weights).sum() / self.cutn * self.scale


def clip_loss(
    clip: CLIP, targets: Tensor, weights: Tensor, scale: float, cutn: int, generator: torch.Generator
) -> GuidanceLoss:
    """The CLIP loss without penalties. The arguments are those of `GuidanceLoss`."""
    return GuidanceLoss(clip, targets, weights, scale, cutn, generator)


def with_penalties(loss: GuidanceLoss | None, tv_scale: float, range_scale: float) -> GuidanceLoss:
    """Add the penalties of `GuidanceLoss` to a CLIP loss; None for the penalties alone."""
    return replace(loss or GuidanceLoss(), tv_scale=tv_scale, range_scale=range_scale)


@dataclass(frozen=True, eq=False)
class GuidedPredict:
    """`predict` with the guidance gradient in its predictions. Created by `guided`, which describes the fields."""

    predict: Predict
    diffusion: GaussianDiffusion
    guide_from: float
    loss: Loss

    def __call__(self, x: Tensor, i: float) -> Prediction:
        return (
            self.predict(x, i) if i < self.guide_from else add_gradient(self.predict, self.diffusion, self.loss, x, i)
        )


def guided(predict: Predict, diffusion: GaussianDiffusion, guide_from: float, loss: Loss) -> GuidedPredict:
    """Wrap `predict` so that its predictions contain the guidance gradient. Both need only one run of the UNet.

    The arguments of the loss are the blend fac · x_0 + (1 - fac) · x_t with fac = sqrt(1 - ᾱ_t), and the predicted x_0,
    both (batch, 3, height, width). Steps below `guide_from` are not guided.
    """
    return GuidedPredict(predict, diffusion, guide_from, loss)


def add_gradient(
    predict: Callable[[Tensor, Any], Prediction], diffusion: GaussianDiffusion, loss: Loss, x: Tensor, i: float | Tensor
) -> Prediction:
    """The prediction of step i with the gradient of -loss with respect to x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        prediction = predict(x, i)
        blend = torch.lerp(x, prediction.pred_xstart, diffusion.at("sqrt_one_minus_bar", i, x))
        gradient = -torch.autograd.grad(loss(blend, prediction.pred_xstart), x)[0]
    return prediction.detach(gradient)

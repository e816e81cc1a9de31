"""What pulls the picture towards the prompt: CLIP guidance (Crowson, 2021), as Jack000/guided-diffusion has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dall3.diffusion.samplers import Predict
from dall3.diffusion.schedule import GaussianDiffusion, Prediction
from dall3.models.clip import CLIP


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Half the squared great-circle distance between the directions of x and y (…, width), in [0, π²/2]: (…)."""
    chord = (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).norm(dim=-1)
    return 2 * torch.arcsin(chord / 2) ** 2


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels (arXiv 1412.0035) of images (batch, 3, h, w): (batch,)."""
    padded = F.pad(images, (0, 1, 0, 1), "replicate")
    across = padded[..., :-1, 1:] - padded[..., :-1, :-1]
    down = padded[..., 1:, :-1] - padded[..., :-1, :-1]
    return (across**2 + down**2).mean(dim=(1, 2, 3))


def range_loss(images: Tensor) -> Tensor:
    """Mean squared distance of images (batch, 3, h, w) from the range [-1, 1]: (batch,)."""
    return ((images - images.clamp(-1, 1)) ** 2).mean(dim=(1, 2, 3))


def draw_cutouts(side: int, cut_size: int, cutn: int, generator: torch.Generator) -> Tensor:
    """Random squares of a picture of `side` pixels: int64 (cutn, 3) of size, left, top. Sizes from CLIP's to all."""
    smallest = min(side, cut_size)
    size, left, top = torch.rand(3, cutn, generator=generator, device=generator.device)
    size = (size * (side - smallest) + smallest).long()
    room = side - size + 1
    return torch.stack((size, (left * room).long(), (top * room).long()), dim=-1)


def pooling_matrix(start: Tensor, size: Tensor, side: int, out: int) -> Tensor:
    """Average pooling of `size` pixels from `start` (both int64 (cutn,)) to `out`, as matrices (cutn, out, side).

    Bin i covers pixels floor(i · size / out) to ceil((i + 1) · size / out), as adaptive_avg_pool2d has it.
    """
    bins = torch.arange(out, device=size.device)
    first = start[:, None] + bins * size[:, None] // out
    last = start[:, None] - (-(bins + 1) * size[:, None] // out)
    pixel = torch.arange(side, device=size.device)
    inside = (pixel >= first[..., None]) & (pixel < last[..., None])
    return inside.float() / (last - first)[..., None]


def cut_out(images: Tensor, cutouts: Tensor, cut_size: int) -> Tensor:
    """Cut-outs (cutn, 3) of square images (batch, 3, side, side), pooled: (cutn · batch, 3, cut_size, cut_size).

    As two matrix products, so that their random sizes leave every shape static and one call serves all.
    """
    size, left, top = cutouts.unbind(-1)
    side = images.shape[-1]
    rows, columns = (pooling_matrix(start, size, side, cut_size).to(images.dtype) for start in (top, left))
    pooled = torch.einsum("bchw,kow->kbcho", images, columns)
    return torch.einsum("kbcho,kih->kbcio", pooled, rows).flatten(0, 1)


Loss = Callable[[Tensor, Tensor], Tensor]  # of what CLIP looks at and of the predicted x_0, summed over the batch


def clip_loss(
    clip: CLIP, targets: Tensor, weights: Tensor, scale: float, cutn: int, generator: torch.Generator
) -> Loss:
    """The weighted spherical distances of cut-outs to the targets (targets, width), averaged over `cutn` cut-outs.

    weights: (targets,), whose sum is 1 or -1. generator: draws the cut-outs anew each time, on the pictures' device.
    """

    def loss(blend: Tensor, x_start: Tensor) -> Tensor:
        cutouts = draw_cutouts(blend.shape[-1], clip.image_size, cutn, generator)
        embeddings = clip.embed_images(cut_out((blend + 1) / 2, cutouts, clip.image_size))
        distances = spherical_distance(embeddings[:, None], targets[None])
        return (distances * weights).sum() / cutn * scale

    return loss


def with_penalties(loss: Loss | None, tv_scale: float, range_scale: float) -> Loss:
    """A loss, or none, and the penalties for unsmoothness of what CLIP looks at and for an x_0 out of range."""

    def total(blend: Tensor, x_start: Tensor) -> Tensor:
        result = blend.new_zeros(()) if loss is None else loss(blend, x_start)
        if tv_scale:
            result = result + total_variation(blend).sum() * tv_scale
        if range_scale:
            result = result + range_loss(x_start).sum() * range_scale
        return result

    return total


def guided(predict: Predict, diffusion: GaussianDiffusion, guide_from: float, loss: Loss) -> Predict:
    """`predict` with the gradient of a loss: one UNet run makes both the step and the gradient.

    The loss sees fac · x_0 + (1 - fac) · x_t with fac = sqrt(1 - ᾱ_t), and x_0. Steps below `guide_from` are left
    unguided.
    """

    def predict_guided(x: Tensor, i: float) -> Prediction:
        if i < guide_from:
            return predict(x, i)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            prediction = predict(x, i)
            blend = torch.lerp(x, prediction.pred_xstart, diffusion.at("sqrt_one_minus_bar", i))
            gradient = -torch.autograd.grad(loss(blend, prediction.pred_xstart), x)[0]
        return prediction.detach(gradient)

    return predict_guided

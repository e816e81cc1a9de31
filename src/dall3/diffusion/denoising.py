"""The denoising loop: from pure noise, or from a noised image, to the predicted image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dall3.diffusion.captured import captured_on_cuda, unet_predict
from dall3.diffusion.samplers import (
    DIFFUSERS,
    SAMPLERS,
    Predict,
    is_known_scheduler,
    sample_with_scheduler,
    scheduler_for,
)
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.errors import require
from dall3.models.layout import set_memory_layout
from dall3.models.unet import UNet
from dall3.tokens.sampling import check_counts

Guide = Callable[[Predict, GaussianDiffusion, float], Predict]  # the float is the lowest step that is guided

IMAGE_BYTES = 9 * 2**29  # memory to denoise an image of 256 px with upstream's UNet and guidance, in half precision
MAX_BATCH_SIZE, MIN_BATCH_SIZE = 16, 4  # bounds of the default on CUDA


def default_refine_batch_size(given: int | None, device: torch.device | str) -> int:
    """Images per denoising batch: `given`, or a default for the device.

    The default is 1 on a CPU, which gains nothing from more: with guidance, two cores take 17 to 20 s for four images
    in one batch, and 12 s for four one by one. On CUDA it is a power of two from 4 to 16, by the device's total memory.
    """
    if given is not None:
        return given
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return 1 if device.type == "cpu" else MIN_BATCH_SIZE
    room = int(torch.cuda.mem_get_info(device)[1]) // IMAGE_BYTES
    return int(min(max(2 ** (max(room, 1).bit_length() - 1), MIN_BATCH_SIZE), MAX_BATCH_SIZE))


@dataclass(frozen=True)
class Denoising:
    """Settings for refining images by diffusion, for `Dall3Pipeline.upsample` and the pipeline call.

    num_inference_steps: a number, or guided-diffusion's respacing ("10,10,5", "ddim25"). scheduler: "ddim", "ddpm"
    (ancestral sampling), "dpm-solver++", or a diffusers scheduler. strength: in (0, 1], the fraction of the noise that
    is added to the initial image (the enlarged coarse image, for a UNet conditioned on codes). None: 0.5 for an
    unconditional UNet; pure noise for a conditional one, as upstream. stop_at: stop after this many steps.

    clip_guidance_scale: scale of CLIP guidance towards the prompt; 0 skips CLIP. cutn: cut-outs per step that CLIP
    embeds. tv_scale, range_scale: weights of the total variation loss and of the loss for colours out of range.
    guidance_share: in [0, 1], the fraction of the steps that are guided, from the first (noisiest) step. seamless: make
    the images tileable, with edges that continue on the opposite side; takes about 1.5 times as long.

    Raises ValueError for a value out of range and for an unknown scheduler.

    >>> Denoising(num_inference_steps=10, scheduler="dpm-solver++").clip_guidance_scale
    0.0
    """

    num_inference_steps: int | str = 25
    scheduler: Any = "ddim"
    strength: float | None = None
    stop_at: int | None = None
    clip_guidance_scale: float = 0.0
    tv_scale: float = 0.0
    range_scale: float = 0.0
    cutn: int = 16
    guidance_share: float = 1.0
    seamless: bool = False

    def __post_init__(self) -> None:
        for name in ("clip_guidance_scale", "tv_scale", "range_scale"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}; expected a number from 0")
        check_counts(cutn=self.cutn, stop_at=1 if self.stop_at is None else self.stop_at)
        require(0 <= self.guidance_share <= 1, f"guidance_share={self.guidance_share}; expected a share in [0, 1]")
        in_range = self.strength is None or 0 < self.strength <= 1
        require(in_range, f"strength={self.strength}; expected a share of the noise, in (0, 1]")
        by_name, names = isinstance(self.scheduler, str), ", ".join(f"'{name}'" for name in SAMPLERS)
        known = self.scheduler in SAMPLERS if by_name else is_known_scheduler(self.scheduler)
        name = repr(self.scheduler) if by_name else type(self.scheduler).__name__
        require(known, f"scheduler {name} is not known; expected {names} or, of diffusers, {', '.join(DIFFUSERS)}")
        counted = by_name or isinstance(self.num_inference_steps, int)
        require(counted, f"a diffusers scheduler takes a number of steps, not {self.num_inference_steps!r}")


@dataclass(frozen=True)
class Step:
    """State after one step of the denoising loop. The next step reads `x`, so in-place changes of it take effect."""

    number: int  # index of the step, from 0
    total: int  # number of steps
    timestep: int  # training timestep
    x: Tensor  # float32 (batch, 3, height, width), the noisy images
    pred_xstart: Tensor  # float32 (batch, 3, height, width), the predicted x_0, approximately in [-1, 1]


def denoise(*args: Any, **kwargs: Any) -> Tensor:
    """Run `denoising_steps` with these arguments; returns the last predicted x_0, float32 (batch, 3, height, width)."""
    for step in denoising_steps(*args, **kwargs):  # noqa: B007
        pass
    return step.pred_xstart


def denoising_steps(
    unet: UNet,
    shape: tuple[int, ...],
    generators: list[torch.Generator],
    conditioning: dict[str, Tensor],
    settings: Denoising,
    image: Tensor | None = None,
    guide: Guide | None = None,
    progress: str | None = None,
) -> Iterator[Step]:
    """The denoising loop. Yields a `Step` after every step.

    shape: (3, height, width) of one image. generators: one for each image, on the device of the UNet. conditioning:
    keyword arguments of `UNet.forward`. image: initial images, float (batch, 3, height, width) in [-1, 1], to which
    `settings.strength` of the noise is added; None to start from pure noise. guide: wraps `predict` to add guidance.
    progress: label of the progress bar; None for no bar.
    """
    device, scheduler = generators[0].device, settings.scheduler

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator, device=device) for generator in generators])

    by_name, start = isinstance(scheduler, str), noise()
    diffusion = GaussianDiffusion(unet.config.diffusion, settings.num_inference_steps if by_name else None)
    steps, order = list[Any](range(len(diffusion) - 1, -1, -1)), 1
    if not by_name:
        scheduler = scheduler_for(scheduler, diffusion, int(settings.num_inference_steps), device)
        # A second-order scheduler runs the UNet twice per step, and once in the last step.
        steps, order = scheduler.timesteps.tolist(), scheduler.order
    x, first = start if by_name else start * scheduler.init_noise_sigma, 0
    if image is not None:
        count = -(-len(steps) // order)
        first = order * (count - max(round(count * (settings.strength or 0.5)), 1))
        if by_name:
            x = diffusion.add_noise(image, steps[first], start)
        else:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            x = scheduler.add_noise(image, start, scheduler.timesteps[first : first + 1])
    steps = steps[first:]

    unguided: Predict = unet_predict(unet, diffusion, conditioning, settings.seamless)
    guided_steps = round(len(steps) * settings.guidance_share) if guide is not None else 0
    set_memory_layout(unet)
    predict = guide(unguided, diffusion, steps[guided_steps - 1]) if guide is not None and guided_steps else unguided
    total = min(len(steps), settings.stop_at or len(steps))
    captured = captured_on_cuda(predict, unguided, unet, diffusion, conditioning, settings.seamless, device)
    with captured as predict:
        if by_name:
            walk = SAMPLERS[scheduler](predict, diffusion, x, steps, noise)
        else:
            walk = sample_with_scheduler(predict, diffusion, x, steps, scheduler, generators)
        bar = tqdm(islice(walk, total), total=total, desc=progress, disable=progress is None)
        for number, (x, x_start) in enumerate(bar):
            yield Step(number, total, diffusion.timestep_map[round(steps[number])], x, x_start)

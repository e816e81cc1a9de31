"""The denoising loop: from noise, or a noised picture, to the picture that the UNet predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from dall3.diffusion.samplers import (
    DIFFUSERS,
    SAMPLERS,
    Predict,
    is_known_scheduler,
    sample_with_scheduler,
    scheduler_for,
)
from dall3.diffusion.schedule import GaussianDiffusion, Prediction
from dall3.errors import require
from dall3.models.layout import lay_out
from dall3.models.unet import UNet
from dall3.tokens.sampling import check_counts

Guide = Callable[[Predict, GaussianDiffusion, float], Predict]  # the last: the lowest step that is guided
Generators = list[torch.Generator]  # one a picture


def around_the_edges(unet: UNet) -> Callable[..., Tensor]:
    """The UNet on pictures whose opposite edges meet: it sees what lies beyond an edge, and gives back the middle."""

    def run(x: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        side, margin = x.shape[-1], unet.config.downsampling

        def widen(part: Tensor) -> Tensor:
            return F.pad(part, [margin * part.shape[-1] // side] * 4, mode="circular")

        more = {name: widen(part) for name, part in conditioning.items()}
        out: Tensor = unet(widen(x), timesteps, **more)
        return out[..., margin : margin + side, margin : margin + side]

    return run


def unet_predict(
    unet: UNet, diffusion: GaussianDiffusion, conditioning: dict[str, Tensor], seamless: bool = False
) -> Predict:
    """The UNet as `predict(x, i)`, in whatever precision its weights have; the statistics are float32."""
    dtype, run = next(unet.parameters()).dtype, around_the_edges(unet) if seamless else unet

    def predict(x: Tensor, i: float) -> Prediction:
        timesteps = torch.full((len(x),), diffusion.at("timestep", i), device=x.device)
        return diffusion.predict(run(x.to(dtype), timesteps, **conditioning).float(), x, i)

    return predict


# Pictures refined at a time. A CPU has nothing to gain from more: two cores took 17 to 20 s for four at once, guided,
# and 12 s for one after the other.
REFINED_AT_ONCE = {"cpu": 1}


def refined_at_once(given: int | None, device: torch.device | str) -> int:
    """How many pictures to refine at a time on a device: as many as are asked for, or 1 on a CPU and 4 elsewhere."""
    return REFINED_AT_ONCE.get(torch.device(device).type, 4) if given is None else given


@dataclass(frozen=True)
class Denoising:
    """How a picture is refined: what `Dall3Pipeline.upsample` and its call take.

    num_inference_steps: a number, or guided-diffusion's respacing ("10,10,5", "ddim25"). scheduler: "ddim", "ddpm"
    (ancestral), "dpm-solver++", or a diffusers scheduler. strength: in (0, 1], how far the picture that it starts from
    is noised, the coarse one enlarged where the UNet is conditioned on codes; None for 0.5 of an unconditional UNet,
    and for pure noise, as the seed has it, of one that is conditioned. stop_at: stop after so many steps.
    clip_guidance_scale: how hard CLIP pulls towards the prompt, looking at `cutn` cut-outs; 0 computes nothing of
    CLIP. tv_scale, range_scale: penalties for unsmoothness and for colours out of range. guidance_share: in [0, 1],
    the share of the steps, from the noisiest on, that are guided. seamless: opposite edges meet, so that copies of the
    picture lie side by side without a seam; costs about half as much again.
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
    """One step of the denoising loop, done. x is what the next step starts from: changed in place, it goes on so."""

    number: int  # from 0
    total: int
    timestep: int  # of the training's steps
    x: Tensor  # float32 (batch, 3, height, width)
    pred_xstart: Tensor  # the picture that it aims at, about [-1, 1]


def denoise(*args: Any, **kwargs: Any) -> Tensor:
    """The last predicted x_0 of `denoising_steps`, whose arguments it takes: float32 (batch, 3, height, width)."""
    for step in denoising_steps(*args, **kwargs):  # noqa: B007
        pass
    return step.pred_xstart


def denoising_steps(
    unet: UNet,
    shape: tuple[int, ...],
    generators: Generators,
    conditioning: dict[str, Tensor],
    settings: Denoising,
    picture: Tensor | None = None,
    guide: Guide | None = None,
    progress: str | None = None,
) -> Iterator[Step]:
    """The denoising loop: from noise, or from `picture` noised `strength` of the way, to the predicted x_0.

    shape: of one picture. generators: one a picture, on the device where the work is done. picture: float (batch, 3,
    height, width) in [-1, 1]. guide: wraps `predict`. progress: what a progress bar is called; None for no bar.
    """
    device, scheduler = generators[0].device, settings.scheduler

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator, device=device) for generator in generators])

    by_name, start = isinstance(scheduler, str), noise()
    diffusion = GaussianDiffusion(unet.config.diffusion, settings.num_inference_steps if by_name else None)
    steps, order = list[Any](range(len(diffusion) - 1, -1, -1)), 1
    if not by_name:
        scheduler = scheduler_for(scheduler, diffusion, int(settings.num_inference_steps), device)
        # A scheduler of second order takes two runs a step, and one for the last.
        steps, order = scheduler.timesteps.tolist(), scheduler.order
    x, first = start if by_name else start * scheduler.init_noise_sigma, 0
    if picture is not None:
        count = -(-len(steps) // order)
        first = order * (count - max(round(count * (settings.strength or 0.5)), 1))
        if by_name:
            x = diffusion.add_noise(picture, steps[first], start)
        else:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            x = scheduler.add_noise(picture, start, scheduler.timesteps[first : first + 1])
    steps = steps[first:]

    predict = unet_predict(unet, diffusion, conditioning, settings.seamless)
    guided_steps = round(len(steps) * settings.guidance_share) if guide is not None else 0
    lay_out(unet)
    if guide is not None and guided_steps:
        predict = guide(predict, diffusion, steps[guided_steps - 1])
    if by_name:
        walk = SAMPLERS[scheduler](predict, diffusion, x, steps, noise)
    else:
        walk = sample_with_scheduler(predict, diffusion, x, steps, scheduler, generators)
    total = min(len(steps), settings.stop_at or len(steps))
    bar = tqdm(islice(walk, total), total=total, desc=progress, disable=progress is None)
    for number, (x, x_start) in enumerate(bar):
        yield Step(number, total, diffusion.timestep_map[round(steps[number])], x, x_start)

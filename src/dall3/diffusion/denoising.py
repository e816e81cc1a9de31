"""Gaussian diffusion (arXiv 2006.11239, 2102.09672): the noise schedule, one step's statistics, and the samplers.

Every sampler has one signature, `(predict, diffusion, x, steps, noise)`, and yields (x, predicted x_0) a step.
`predict(x, i)` runs the UNet at step i; guidance is a function around it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from dall3.errors import require
from dall3.models.layout import lay_out
from dall3.models.unet import DiffusionConfig, UNet
from dall3.tokens.sampling import check_counts


@dataclass
class Prediction:
    """p(x_{t-1} | x_t) and the picture that it aims at: float tensors (batch, 3, height, width)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor
    gradient: Tensor | None = None  # of the log-probability of what guides, by x_t


Predict = Callable[[Tensor, int], Prediction]
Guide = Callable[[Predict, "GaussianDiffusion", int], Predict]  # the last: the lowest step that is guided
Sampler = Callable[..., Iterator[tuple[Tensor, Tensor]]]
Generators = list[torch.Generator]  # one a picture


def beta_schedule(name: str, steps: int) -> np.ndarray:
    """Variances of the noise added at each step, float64 (steps,). name: "linear" or "cosine" (arXiv 2102.09672)."""
    if name == "linear":
        return np.linspace(0.1 / steps, 20 / steps, steps, dtype=np.float64)
    edges = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in zip(edges, edges[1:], strict=False)])


def space_timesteps(total: int, spacing: int | str) -> list[int]:
    """Which of `total` steps to take, ascending.

    spacing: a number ("25") or numbers for equal parts of the process ("10,10,5"), spread evenly over each with both
    ends kept; or "ddim20", every k-th step from 0, as the DDIM paper has it. Raises ValueError when it does not fit.
    """
    text = str(spacing)
    if text.startswith("ddim") and text[4:].isdigit():
        for stride in range(1, total):
            if len(range(0, total, stride)) == int(text[4:]):
                return list(range(0, total, stride))
        raise ValueError(f"no whole stride takes exactly {text[4:]} of {total} steps; try '{text[4:]}' without 'ddim'")
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"steps '{spacing}' not understood; expected 25, '10,10,5' or 'ddim20'") from None
    steps: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = total // len(counts) + int(i < total % len(counts))
        if not 0 < count <= size:
            raise ValueError(f"cannot take {count} of {size} steps; steps must be from 1 to {size}")
        spread = (size - 1) / max(count - 1, 1)
        place = 0.0  # added up, not multiplied: rounding must fall as the original's does
        for _ in range(count):
            steps.add(start + round(place))
            place += spread
        start += size
    return sorted(steps)


class GaussianDiffusion:
    """The noise schedule over some of the training's steps. Step i counts those taken; 0 is the least noisy."""

    def __init__(self, config: DiffusionConfig, spacing: int | str | None = None) -> None:
        self.config = config
        total = config.diffusion_steps
        self.timestep_map = space_timesteps(total, total if spacing is None else spacing)
        bar = np.cumprod(1 - beta_schedule(config.noise_schedule, total))[self.timestep_map]
        before = np.append(1.0, bar[:-1])
        betas = 1 - bar / before
        posterior = betas * (1 - before) / (1 - bar)
        # The variance of the last step is 0, whose logarithm does not exist; its neighbour's stands in.
        log_posterior = np.log(np.append(posterior[1:2] if len(posterior) > 1 else betas[:1], posterior[1:]))
        self.betas, self.alphas_cumprod = betas, bar
        scale = 1000 / config.diffusion_steps if config.rescale_timesteps else 1
        self._tables = {
            "timestep": np.array(self.timestep_map) * scale,
            "sqrt_bar": np.sqrt(bar),
            "sqrt_one_minus_bar": np.sqrt(1 - bar),
            "sqrt_recip_bar": np.sqrt(1 / bar),
            "sqrt_recip_bar_minus_one": np.sqrt(1 / bar - 1),
            "bar_before": before,
            "mean_of_xstart": betas * np.sqrt(before) / (1 - bar),
            "mean_of_x": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
            "log_posterior": log_posterior,
            "log_beta": np.log(betas),
            "log_fixed": np.log(np.append(np.exp(log_posterior[:1]), betas[1:])),
            # DPM-Solver's clock, half the log of the signal-to-noise ratio
            "half_log_snr": 0.5 * np.log(bar / (1 - bar)),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.timestep_map)

    def at(self, name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
        """A table's values at steps t, int64 (batch,), as float32 with the dimensions of `like`."""
        if t.device not in self._on_device:
            tables = {key: torch.from_numpy(table).float().to(t.device) for key, table in self._tables.items()}
            self._on_device[t.device] = tables
        values = self._on_device[t.device][name][t]
        return values if like is None else values.view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x_0): pictures in [-1, 1] noised to steps t (batch,)."""
        return self.at("sqrt_bar", t, x_start) * x_start + self.at("sqrt_one_minus_bar", t, x_start) * noise

    def predict(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool = False) -> Prediction:
        """What the UNet's output (batch, 6 or 3, height, width) at x and steps t (batch,) says of the step before.

        With learned variance the second half of the channels tells where it lies between the posterior's and beta.
        """
        if self.config.learn_sigma:
            output, place = output.chunk(2, dim=1)
            share = (place + 1) / 2
            log_variance = share * self.at("log_beta", t, x) + (1 - share) * self.at("log_posterior", t, x)
        else:
            log_variance = self.at("log_fixed", t, x).expand_as(x)
        x_start = output if self.config.predict_xstart else self.x_start_from_noise(x, t, output)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        return Prediction(self.posterior_mean(x_start, x, t), log_variance.exp(), log_variance, x_start)

    def posterior_mean(self, x_start: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return self.at("mean_of_xstart", t, x) * x_start + self.at("mean_of_x", t, x) * x

    def x_start_from_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.at("sqrt_recip_bar", t, x) * x - self.at("sqrt_recip_bar_minus_one", t, x) * noise

    def noise_from_x_start(self, x: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        return (self.at("sqrt_recip_bar", t, x) * x - x_start) / self.at("sqrt_recip_bar_minus_one", t, x)

    def guided_mean(self, prediction: Prediction) -> Tensor:
        """The mean, moved along the gradient by the variance (arXiv 2105.05233, algorithm 1)."""
        if prediction.gradient is None:
            return prediction.mean
        return prediction.mean + prediction.variance * prediction.gradient

    def guided_score(self, prediction: Prediction, x: Tensor, t: Tensor) -> Prediction:
        """The prediction with the gradient added to its score (arXiv 2105.05233, algorithm 2), for DDIM and solvers."""
        if prediction.gradient is None:
            return prediction
        noise = self.noise_from_x_start(x, t, prediction.pred_xstart)
        x_start = self.x_start_from_noise(x, t, noise - self.at("sqrt_one_minus_bar", t, x) * prediction.gradient)
        return replace(prediction, pred_xstart=x_start, mean=self.posterior_mean(x_start, x, t))


def steps_like(x: Tensor, i: int) -> Tensor:
    return torch.full((x.shape[0],), i, dtype=torch.int64, device=x.device)


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
    unet: UNet,
    diffusion: GaussianDiffusion,
    conditioning: dict[str, Tensor],
    clip_denoised: bool = False,
    seamless: bool = False,
) -> Predict:
    """The UNet as `predict(x, i)`, in whatever precision its weights have; the statistics are float32."""
    dtype, run = next(unet.parameters()).dtype, around_the_edges(unet) if seamless else unet

    def predict(x: Tensor, i: int) -> Prediction:
        t = steps_like(x, i)
        output = run(x.to(dtype), diffusion.at("timestep", t), **conditioning).float()
        return diffusion.predict(output, x, t, clip_denoised)

    return predict


def sample_ddpm(
    predict: Predict, diffusion: GaussianDiffusion, x: Tensor, steps: list[int], noise: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ancestral sampling (arXiv 2006.11239)."""
    for i in steps:
        prediction = predict(x, i)
        x = diffusion.guided_mean(prediction)
        if i > 0:
            x = x + torch.exp(0.5 * prediction.log_variance) * noise()
        yield x, prediction.pred_xstart


def sample_ddim(
    predict: Predict, diffusion: GaussianDiffusion, x: Tensor, steps: list[int], noise: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """DDIM without noise, η = 0 (arXiv 2010.02502)."""
    for i in steps:
        t = steps_like(x, i)
        x_start = diffusion.guided_score(predict(x, i), x, t).pred_xstart
        bar = diffusion.at("bar_before", t, x)
        x = bar.sqrt() * x_start + (1 - bar).sqrt() * diffusion.noise_from_x_start(x, t, x_start)
        yield x, x_start


def sample_dpm_solver(
    predict: Predict, diffusion: GaussianDiffusion, x: Tensor, steps: list[int], noise: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++ (2M): second order, one UNet run a step, first order at the ends (arXiv 2211.01095, alg. 2)."""
    previous, previous_h = None, None
    for i in steps:
        t = steps_like(x, i)
        x_start = diffusion.guided_score(predict(x, i), x, t).pred_xstart
        if i == 0:
            yield x_start, x_start
            return
        h = diffusion.at("half_log_snr", t - 1, x) - diffusion.at("half_log_snr", t, x)
        target = x_start
        # The step to 0 leaps so far in signal-to-noise that a second-order one overshoots.
        if i > 1 and previous is not None and previous_h is not None:
            target = x_start + (x_start - previous) * h / (2 * previous_h)
        shrink = diffusion.at("sqrt_one_minus_bar", t - 1, x) / diffusion.at("sqrt_one_minus_bar", t, x)
        x = shrink * x - diffusion.at("sqrt_bar", t - 1, x) * torch.expm1(-h) * target
        previous, previous_h = x_start, h
        yield x, x_start


SAMPLERS: dict[str, Sampler] = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm-solver++": sample_dpm_solver}


def sample_with_scheduler(
    predict: Predict, diffusion: GaussianDiffusion, x: Tensor, steps: list[int], scheduler: Any, noise: Generators
) -> Iterator[tuple[Tensor, Tensor]]:
    """The last of a diffusers scheduler's steps, as many as given; it is told the noise (prediction_type "epsilon").

    `diffusion` has all of the training's steps.

    x is the scheduler's own: scaled by its `init_noise_sigma`, or noised by its `add_noise`.
    """
    extra = {"generator": noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned") and diffusion.config.learn_sigma
    for timestep, i in zip(scheduler.timesteps[-len(steps) :], steps, strict=True):
        x_in, t = scheduler.scale_model_input(x, timestep), steps_like(x, i)
        prediction = diffusion.guided_score(predict(x_in, i), x_in, t)
        output = diffusion.noise_from_x_start(x_in, t, prediction.pred_xstart)
        if learned:
            low, high = diffusion.at("log_posterior", t, x), diffusion.at("log_beta", t, x)
            output = torch.cat((output, 2 * (prediction.log_variance - low) / (high - low) - 1), dim=1)
        x = scheduler.step(output, timestep, x, **extra).prev_sample
        yield x, prediction.pred_xstart


# Pictures refined at a time. A CPU has nothing to gain from more: two cores took 17 to 20 s for four at once, guided,
# and 12 s for one after the other.
REFINED_AT_ONCE = {"cpu": 1}


def refined_at_once(given: int | None, device: torch.device | str) -> int:
    """How many pictures to refine at a time on a device: as many as are asked for, or 1 on a CPU and 4 elsewhere."""
    return REFINED_AT_ONCE.get(torch.device(device).type, 4) if given is None else given


@dataclass(frozen=True)
class Refinement:
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
        # Of diffusers' schedulers, those that can be put on the noise schedule that the UNet was trained on.
        known = self.scheduler in SAMPLERS if by_name else "trained_betas" in getattr(self.scheduler, "config", {})
        others = "a diffusers scheduler that takes trained_betas"
        require(known, f"scheduler {self.scheduler!r} is not known; expected {names} or {others}")
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
    settings: Refinement,
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
    if by_name:
        steps = list(range(len(diffusion) - 1, -1, -1))
    else:
        training = {"trained_betas": diffusion.betas.tolist(), "num_train_timesteps": len(diffusion)}
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type="epsilon", **training)
        scheduler.set_timesteps(settings.num_inference_steps, device=device)
        steps = [round(step) for step in scheduler.timesteps.tolist()]
    x, first = start if by_name else start * scheduler.init_noise_sigma, 0
    if picture is not None:
        first = len(steps) - max(round(len(steps) * (settings.strength or 0.5)), 1)
        if by_name:
            x = diffusion.add_noise(picture, steps_like(x, steps[first]), start)
        else:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            x = scheduler.add_noise(picture, start, scheduler.timesteps[first : first + 1])
    steps = steps[first:]

    predict = unet_predict(unet, diffusion, conditioning, seamless=settings.seamless)
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
        yield Step(number, total, diffusion.timestep_map[steps[number]], x, x_start)

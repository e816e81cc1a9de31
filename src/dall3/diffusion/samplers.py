"""Diffusion samplers.

Every sampler has the signature `(predict, diffusion, x, steps, noise)` and yields (x, predicted x_0) after each step.
`predict(x, i)` runs the UNet at step i; guidance wraps this function. steps: indices into the steps of `diffusion`,
descending. `noise()` draws noise of the shape of x. Coefficients of the schedule are Python floats.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dall3.diffusion.schedule import GaussianDiffusion, Prediction

Predict = Callable[[Tensor, float], Prediction]  # of x and the step, which some diffusers schedulers make fractional
Walk = Iterator[tuple[Tensor, Tensor]]  # x and the predicted x_0 after each step
Sampler = Callable[[Predict, GaussianDiffusion, Tensor, list[int], Callable[[], Tensor]], Walk]


def sample_ddpm(
    predict: Predict, diffusion: GaussianDiffusion, x: Tensor, steps: list[int], noise: Callable[[], Tensor]
) -> Walk:
    """DDPM: ancestral sampling (arXiv 2006.11239)."""
    for i in steps:
        prediction = predict(x, i)
        x = diffusion.guided_mean(prediction)
        if i > 0:
            x = torch.addcmul(x, torch.exp(0.5 * prediction.log_variance), noise())
        yield x, prediction.pred_xstart


def sample_ddim(
    predict: Predict, diffusion: GaussianDiffusion, x: Tensor, steps: list[int], noise: Callable[[], Tensor]
) -> Walk:
    """Deterministic DDIM, η = 0 (arXiv 2010.02502)."""
    for i in steps:
        x_start = diffusion.guided_score(predict(x, i)).pred_xstart
        before = diffusion.at("bar_before", i)
        shrink = math.sqrt(1 - before) / diffusion.at("sqrt_one_minus_bar", i)
        x = torch.add(shrink * x, x_start, alpha=math.sqrt(before) - shrink * diffusion.at("sqrt_bar", i))
        yield x, x_start


def sample_dpm_solver(
    predict: Predict, diffusion: GaussianDiffusion, x: Tensor, steps: list[int], noise: Callable[[], Tensor]
) -> Walk:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order, with one UNet run per step.

    The first step and the step to i = 0 are first order.
    """
    previous, previous_h = None, 0.0
    for i in steps:
        x_start = diffusion.guided_score(predict(x, i)).pred_xstart
        if i == 0:
            yield x_start, x_start
            return
        h = diffusion.at("half_log_snr", i - 1) - diffusion.at("half_log_snr", i)
        target = x_start
        # The step to i = 0 changes the signal-to-noise ratio so much that a second-order step overshoots.
        if i > 1 and previous is not None:
            target = torch.lerp(previous, x_start, 1 + h / (2 * previous_h))
        shrink = diffusion.at("sqrt_one_minus_bar", i - 1) / diffusion.at("sqrt_one_minus_bar", i)
        x = torch.add(shrink * x, target, alpha=-diffusion.at("sqrt_bar", i - 1) * math.expm1(-h))
        previous, previous_h = x_start, h
        yield x, x_start


SAMPLERS: dict[str, Sampler] = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm-solver++": sample_dpm_solver}

# diffusers schedulers that accept the UNet's noise schedule. The others are for distilled or inverted models, need
# another argument, or use a timestep scale of their own.
DIFFUSERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LMSDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler"),
)


def is_known_scheduler(scheduler: Any) -> bool:
    """Whether the class of a diffusers scheduler, or one of its base classes, is in DIFFUSERS."""
    return any(kind.__name__ in DIFFUSERS for kind in type(scheduler).__mro__)


def scheduler_for(scheduler: Any, diffusion: GaussianDiffusion, num_steps: int, device: torch.device) -> Any:
    """Copy a diffusers scheduler, with epsilon prediction, the UNet's noise schedule and `num_steps` timesteps."""
    training = {"trained_betas": diffusion.betas.tolist(), "num_train_timesteps": len(diffusion)}
    made = type(scheduler).from_config(scheduler.config, prediction_type="epsilon", **training)
    made.set_timesteps(num_steps, device=device)
    return made


def sample_with_scheduler(
    predict: Predict,
    diffusion: GaussianDiffusion,
    x: Tensor,
    steps: list[float],
    scheduler: Any,
    noise: list[torch.Generator],
) -> Walk:
    """Run the last `len(steps)` steps of a diffusers scheduler made by `scheduler_for`.

    diffusion: with all training steps. x: initial sample, scaled by the scheduler's `init_noise_sigma` or noised by its
    `add_noise`. steps: the timesteps as Python numbers. noise: one generator for each image.
    """
    extra = {"generator": noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned") and diffusion.config.learn_sigma
    for timestep, i in zip(scheduler.timesteps[-len(steps) :], steps, strict=True):
        x_in = scheduler.scale_model_input(x, timestep)
        prediction = diffusion.guided_score(predict(x_in, i))
        output = diffusion.noise_from_x_start(x_in, i, prediction.pred_xstart)
        if learned and prediction.variance_share is not None:
            output = torch.cat((output, 2 * prediction.variance_share - 1), dim=1)
        x = scheduler.step(output, timestep, x, **extra).prev_sample
        yield x, prediction.pred_xstart

"""Gaussian diffusion (arXiv 2006.11239, 2102.09672): the noise schedule and the statistics of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from torch import Tensor

from dall3.models.unet import DiffusionConfig


def beta_schedule(name: str, steps: int) -> np.ndarray:
    """Betas, the variances of the noise added at each step: float64 (steps,).

    name: "linear" (arXiv 2006.11239) or "cosine" (arXiv 2102.09672).
    """
    if name == "linear":
        return np.linspace(0.1 / steps, 20 / steps, steps, dtype=np.float64)
    edges = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in zip(edges, edges[1:], strict=False)])


def space_timesteps(total: int, spacing: int | str) -> list[int]:
    """Select a subset of the training steps 0 … total - 1, in ascending order (guided-diffusion, `respace.py`).

    spacing: a number of steps (25 or "25"); numbers for equal sections of the process ("10,10,5"), each spaced evenly
    with both ends included; or "ddim20", every k-th step from 0, as in the DDIM paper. Raises ValueError if the spacing
    cannot be parsed or does not fit.

    >>> space_timesteps(1000, 5)
    [0, 250, 500, 749, 999]
    """
    text = str(spacing)
    if text.startswith("ddim") and text[4:].isdigit():
        for stride in range(1, total):
            if len(range(0, total, stride)) == int(text[4:]):
                return list(range(0, total, stride))
        raise ValueError(f"no integer stride takes {text[4:]} of {total} steps; try '{text[4:]}' without 'ddim'")
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
        place = 0.0  # accumulated instead of multiplied, to round as upstream does
        for _ in range(count):
            steps.add(start + round(place))
            place += spread
        start += size
    return sorted(steps)


@dataclass(frozen=True)
class Prediction:
    """The distribution p(x_{t-1} | x_t), from the predicted x_0. Mean and variance are computed on access.

    All tensors are float32 (batch, 3, height, width).
    """

    diffusion: GaussianDiffusion
    x: Tensor  # x_t
    t: float | Tensor  # the step, or a tensor (batch,), one for each image
    pred_xstart: Tensor  # the predicted x_0
    variance_share: Tensor | None = None  # learned log-variance between that of the posterior (0) and beta (1)
    gradient: Tensor | None = None  # guidance: gradient of the log-probability with respect to x_t

    @property
    def mean(self) -> Tensor:
        return self.diffusion.posterior_mean(self.pred_xstart, self.x, self.t)

    @property
    def log_variance(self) -> Tensor:
        if self.variance_share is None:
            return torch.zeros_like(self.x) + self.diffusion.at("log_fixed", self.t, self.x)
        low, high = (self.diffusion.at(name, self.t, self.x) for name in ("log_posterior", "log_beta"))
        return self.variance_share * high + (1 - self.variance_share) * low

    @property
    def variance(self) -> Tensor:
        return self.log_variance.exp()

    def detach(self, gradient: Tensor | None = None) -> Prediction:
        """A copy that is detached from the autograd graph and holds the guidance gradient."""
        share = None if self.variance_share is None else self.variance_share.detach()
        x, x_start = self.x.detach(), self.pred_xstart.detach()
        return replace(self, x=x, pred_xstart=x_start, variance_share=share, gradient=gradient)


class GaussianDiffusion:
    """The noise schedule of a subset of the training steps. Step 0 is the least noisy.

    spacing: the subset, as in `space_timesteps`; None for all training steps. Methods take a step t, which is an index
    into the subset: a number for the whole batch, or a tensor (batch,), int64 or float32, one for each image.
    Coefficients are a float for a number and a float32 tensor for a tensor. Fractional steps, which some diffusers
    schedulers use, interpolate the tables.

    >>> diffusion = GaussianDiffusion(DiffusionConfig(), 25)
    >>> len(diffusion), diffusion.timestep_map[-1]
    (25, 999)
    """

    def __init__(self, config: DiffusionConfig, spacing: int | str | None = None) -> None:
        self.config = config
        total = config.diffusion_steps
        self.timestep_map = space_timesteps(total, total if spacing is None else spacing)
        bar = np.cumprod(1 - beta_schedule(config.noise_schedule, total))[self.timestep_map]
        before = np.append(1.0, bar[:-1])
        betas = 1 - bar / before
        posterior = betas * (1 - before) / (1 - bar)
        # The posterior variance of step 0 is 0 and has no logarithm; that of step 1 replaces it.
        log_posterior = np.log(np.append(posterior[1:2] if len(posterior) > 1 else betas[:1], posterior[1:]))
        self.betas, self.alphas_cumprod = betas, bar
        self.timestep_scale = 1000 / config.diffusion_steps if config.rescale_timesteps else 1.0
        tables = {
            "timestep": np.array(self.timestep_map) * self.timestep_scale,
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
            # lambda of DPM-Solver: half the logarithm of the signal-to-noise ratio
            "half_log_snr": 0.5 * np.log(bar / (1 - bar)),
        }
        self._tables: dict[str, list[float]] = {name: table.tolist() for name, table in tables.items()}
        self._on_device: dict[tuple[torch.device, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self.timestep_map)

    @overload
    def at(self, name: str, t: float, like: Tensor | None = None) -> float: ...
    @overload
    def at(self, name: str, t: Tensor, like: Tensor | None = None) -> Tensor: ...
    def at(self, name: str, t: float | Tensor, like: Tensor | None = None) -> float | Tensor:
        """Look up a table at step t.

        Returns a float for a number, and a tensor for a tensor: (batch,), or (batch, 1, …) with the dimensions of
        `like`.
        """
        if not isinstance(t, Tensor):
            table, below = self._tables[name], int(t)
            return table[below] + (table[below + 1] - table[below]) * (t - below) if t > below else table[below]
        if (t.device, name) not in self._on_device:
            values = torch.tensor(self._tables[name], dtype=torch.float32, device="cpu")
            self._on_device[t.device, name] = values.to(t.device)
        table_on_device = self._on_device[t.device, name]
        values = table_on_device[t.long()]
        if t.is_floating_point():
            above = table_on_device[(t.long() + 1).clamp_max(len(table_on_device) - 1)]
            values = torch.lerp(values, above, t - t.floor())
        return values if like is None else values.view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x_start: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """Sample q(x_t | x_0): add noise to images x_start in [-1, 1]. noise: standard normal, the shape of x_start."""
        return self.at("sqrt_bar", t, x_start) * x_start + self.at("sqrt_one_minus_bar", t, x_start) * noise

    def predict(self, output: Tensor, x: Tensor, t: float | Tensor) -> Prediction:
        """Convert the UNet's output (batch, 6 or 3, height, width) for x at step t to a prediction."""
        share = None
        if self.config.learn_sigma:
            output, variance = output.chunk(2, dim=1)
            share = (variance + 1) / 2
        x_start = output if self.config.predict_xstart else self.x_start_from_noise(x, t, output)
        return Prediction(self, x, t, x_start, share)

    def posterior_mean(self, x_start: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return self.at("mean_of_xstart", t, x) * x_start + self.at("mean_of_x", t, x) * x

    def x_start_from_noise(self, x: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """Convert the noise in x at step t to the predicted x_0."""
        return self.at("sqrt_recip_bar", t, x) * x - self.at("sqrt_recip_bar_minus_one", t, x) * noise

    def noise_from_x_start(self, x: Tensor, t: float | Tensor, x_start: Tensor) -> Tensor:
        """Convert the predicted x_0 to the noise in x at step t."""
        return (self.at("sqrt_recip_bar", t, x) * x - x_start) / self.at("sqrt_recip_bar_minus_one", t, x)

    def guided_mean(self, prediction: Prediction) -> Tensor:
        """The mean plus variance · gradient (arXiv 2105.05233, algorithm 1), for ancestral sampling."""
        if prediction.gradient is None:
            return prediction.mean
        return prediction.mean + prediction.variance * prediction.gradient

    def guided_score(self, prediction: Prediction) -> Prediction:
        """Add the gradient to the score (arXiv 2105.05233, algorithm 2), for DDIM and other ODE solvers."""
        if prediction.gradient is None:
            return prediction
        # epsilon - sqrt(1 - ᾱ) · gradient, expressed in x_0
        bar_term = self.at("sqrt_recip_bar_minus_one", prediction.t, prediction.x)
        pull = bar_term * self.at("sqrt_one_minus_bar", prediction.t, prediction.x)
        return replace(prediction, pred_xstart=prediction.pred_xstart + pull * prediction.gradient)

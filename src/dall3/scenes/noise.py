"""Tileable three-dimensional noise, computed once as volumes and then sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Array = NDArray[np.float32]

SIDE = 64  # voxels along each side of a volume
Noise = tuple[Callable[..., Array], tuple[float, ...]]  # a function that computes a volume, and its arguments


def with_gradient(values: Array) -> Array:
    """Append the gradient per period to periodic values (SIDE, SIDE, SIDE): (SIDE³, 4)."""
    slopes = [(np.roll(values, -1, axis) - np.roll(values, 1, axis)) * (SIDE / 2) for axis in range(3)]
    return np.stack([values, *slopes], axis=-1).reshape(-1, 4).astype(np.float32)


@cache
def fractal(low: int, high: int, falloff: float, seed: int = 1, slopes: bool = False) -> Array:
    """Fractal noise of mean 0 and standard deviation 1: (SIDE³, 1), with `slopes` and its gradient (SIDE³, 4).

    White noise with a spectrum of frequency^-falloff between `low` and `high` cycles per period (spectral synthesis,
    Peitgen and Saupe, The Science of Fractal Images, 1988).
    """
    white = np.fft.rfftn(np.random.default_rng(seed).standard_normal((SIDE, SIDE, SIDE)))
    waves = np.fft.fftfreq(SIDE, 1 / SIDE)
    radius = np.sqrt(waves[:, None, None] ** 2 + waves[None, :, None] ** 2 + np.arange(SIDE // 2 + 1) ** 2)
    inside = (radius >= low) & (radius <= high)
    values = np.fft.irfftn(
        white * np.where(inside, np.maximum(radius, 1) ** -falloff, 0), s=(SIDE,) * 3, axes=(0, 1, 2)
    )
    values = (values / values.std()).astype(np.float32)
    return with_gradient(values) if slopes else values.reshape(-1, 1)


@cache
def cells(count: int) -> tuple[Array, Array]:
    """Cellular noise (Worley, SIGGRAPH 1996) with count³ cells per period.

    Returns the distance to the nearest cell boundary with its gradient, (SIDE³, 4), and the distance to the nearest
    cell centre, (SIDE³, 1), in cell widths.
    """
    jitter = np.random.default_rng(count).random((3, count, count, count), np.float32) * np.float32(0.9)
    place = np.arange(SIDE, dtype=np.float32) * np.float32(count / SIDE)
    home = np.floor(place).astype(int)
    first = np.full((SIDE,) * 3, 9, np.float32)
    second = first.copy()
    for step in np.ndindex(3, 3, 3):
        cell = [home + move - 1 for move in step]
        i, j, k = np.ix_(*[along % count for along in cell])
        centre = jitter[:, i, j, k]
        x, y, z = (axis + gap for axis, gap in zip(centre, np.ix_(*[along - place for along in cell]), strict=True))
        distance = np.sqrt(x * x + y * y + z * z, dtype=np.float32)
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    return with_gradient((second - first) / 2), first.reshape(-1, 1)


def walls(count: int) -> Array:
    """The distance to the nearest cell boundary of `cells`, with its gradient."""
    return cells(count)[0]


@cache
def billows() -> Array:
    """Heights (SIDE³, 1) of mean 0 of cauliflower-like billows: cellular noise at three scales."""
    total = sum(weight * cells(count)[1] for count, weight in ((5, -1.0), (10, -0.5), (20, -0.25)))
    return np.ascontiguousarray(total - np.mean(total), np.float32)


@cache
def on_device(make: Callable[..., Array], arguments: tuple[float, ...], device: torch.device) -> Tensor:
    """A volume on a device, (1, channels, SIDE + 1, SIDE + 1, SIDE + 1), whose first voxels are repeated at the end."""
    values = make(*arguments).reshape(SIDE, SIDE, SIDE, -1)
    wrapped = np.pad(values, ((0, 1), (0, 1), (0, 1), (0, 0)), mode="wrap")
    return torch.from_numpy(np.ascontiguousarray(wrapped.transpose(3, 0, 1, 2)))[None].to(device)


def look_up(noise: Noise, points: Tensor, frequency: float | tuple[float, float, float]) -> Tensor:
    """Sample a noise at points (3, b, k), trilinearly, with `frequency` periods per unit: (channels, b, k)."""
    each = frequency if isinstance(frequency, tuple) else (frequency,) * 3
    x, y, z = (points[i] * each[i] for i in range(3))
    # grid_sample takes coordinates in [-1, 1], the last axis first.
    place = torch.stack([z - z.floor(), y - y.floor(), x - x.floor()], dim=-1).mul_(2).sub_(1)
    values = functional.grid_sample(
        on_device(*noise, points.device), place[None, None], padding_mode="border", align_corners=True
    )
    return values[0, :, 0]

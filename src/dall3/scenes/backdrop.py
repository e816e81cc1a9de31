"""The background: a studio backdrop that curves into the ground, with the object's shadow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dall3.scenes.camera import Cameras
from dall3.scenes.noise import Array
from dall3.scenes.scene import BACKGROUNDS, Scene
from dall3.scenes.shapes import DISTANCES, bound, dot

TRANSLUCENT = ("cloud", "water", "ice")


def linear(colour: tuple[int, int, int]) -> Array:
    """Convert an 8-bit colour to linear light, float (3,) in [0, 1], with a gamma of 2."""
    return np.square(np.array(colour, np.float32) / np.float32(255))


@cache
def light(colour: tuple[int, int, int], device: torch.device) -> Tensor:
    """Convert an 8-bit colour to linear light on a device: float (3, 1, 1) in [0, 1]."""
    return torch.from_numpy(linear(colour)).reshape(3, 1, 1).to(device)


def lerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Interpolate linearly between start and end, (3, ...) each, by t (...) in [0, 1]."""
    return start + (end - start) * t


def mix(a: tuple[int, int, int], b: tuple[int, int, int], t: Tensor) -> Tensor:
    """Interpolate between two 8-bit colours by t (b, k) in [0, 1]: linear light (3, b, k)."""
    return lerp(light(a, t.device), light(b, t.device), t)


def smooth_step(low: float, high: float, x: Tensor) -> Tensor:
    """A smooth step from 0 at `low` to 1 at `high` (GLSL's smoothstep). With low > high it falls."""
    t = ((x - low) * (1 / (high - low))).clamp_(0, 1)
    return t * t * (3 - 2 * t)


def soft_shadow(shape: str, p: Tensor, light: Tensor, hardness: float = 5.0) -> Tensor:
    """The fraction of light from directions `light` (3, n, 1) that reaches points (3, n, k), estimated from how closely
    shadow rays pass the object (Quilez, "Soft shadows in raymarched SDFs", iquilezles.org/articles/rmshadows).
    """
    distance, radius = DISTANCES[shape], bound(shape)
    along = dot(light, p)
    near = dot(p, p) - along * along < (radius + 0.8) ** 2
    t = (-along - radius).clamp_(min=0.02)
    open_part = torch.ones_like(t)
    for _ in range(18):
        d = distance(p + light * t)
        open_part = torch.minimum(open_part, 0.5 + hardness * d / (t + 0.6))
        t = t + d.clamp_(0.08, 0.5)
    return torch.where(near, smooth_step(0, 1, open_part), 1)


def centres(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image coordinates (x, y) of the centres of count² samples, row by row, each (count²,)."""
    along = (torch.arange(count, device=device) + 0.5) / count
    return along.repeat(count), along.repeat_interleave(count)


def draw_backdrops(scenes: Sequence[Scene], groups: Sequence[tuple[str, slice]], cameras: Cameras, size: int) -> Tensor:
    """Render images without their objects: linear light (n, 3, size, size). groups: runs of scenes of one shape."""
    device, half = cameras.scale.device, (size + 1) // 2
    wall = np.stack([linear(BACKGROUNDS[s.background]) for s in scenes], axis=1)
    floor = np.where(wall.max(0) > 0.1, wall * np.float32(0.80), wall * np.float32(1.6) + np.float32(0.02))
    shade = np.array([[0.45 if s.material in TRANSLUCENT else 0.75 for s in scenes]], np.float32)
    numbers = torch.from_numpy(np.concatenate([wall, floor, shade])[..., None]).to(device, non_blocking=True)
    wall_light, floor_light, darkness = numbers[:3], numbers[3:6], numbers[6]

    x, y = centres(half, device)
    every = cameras.take(torch.arange(len(scenes), device=device))
    rays = every.rays(x, y)
    falling = dot(every.vertical, rays)
    height = dot(every.vertical, every.eye) - every.ground
    t = torch.where(falling < -0.02, height / (-falling).clamp_(min=0.02), 60)
    p = every.eye + rays * t
    level = every.forward - every.vertical * dot(every.vertical, every.forward)
    behind = dot(level / dot(level, level).sqrt(), p)
    ground = 1 - smooth_step(1.5, 7.0, behind)
    lit = torch.empty_like(t)
    for shape, run in groups:
        q = p[:, run]
        touching = torch.exp(-5 * DISTANCES[shape](q).clamp_(min=0))
        dark = darkness[run]
        lit[run] = (1 - dark * (1 - soft_shadow(shape, q, every.light[:, run]))) * (1 - 0.6 * dark * touching)
    lit = 1 - torch.where(dot(p, p) < 30, 1 - lit, 0) * ground
    vignette = 1.03 - 0.16 * ((x - 0.5) ** 2 + (y - 0.45) ** 2)
    lights = (wall_light + (floor_light - wall_light) * ground) * (lit * vignette)
    images = lights.transpose(0, 1).reshape(-1, 3, half, half)
    wide = functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    return wide[..., :size, :size].contiguous()

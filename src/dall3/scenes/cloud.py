"""Clouds: a density that rises towards the inside of a solid, rendered by ray marching from front to back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dall3.scenes.camera import Cameras
from dall3.scenes.noise import billows, look_up
from dall3.scenes.shapes import DISTANCES, bound, delicacy, dot
from dall3.scenes.trace import Blocks

REACH = 0.12  # how far wisps extend from the solid
STEPS = 20


def draw_clouds(
    runs: Sequence[tuple[str, slice]], blocks: Blocks, cameras: Cameras, shifts: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Premultiplied light (3, b, k) and coverage (b, k) in blocks of images `samples` wide.

    runs: shapes with their slices of blocks. shifts: offsets into the noise per image, (3, n).
    """
    light = shifts.new_zeros(3, len(blocks.which), blocks.coordinates(slice(0, 1), samples)[0].shape[1])
    cover = torch.zeros_like(light[0])
    for shape, run in runs:
        camera = cameras.take(blocks.which[run])
        rays = camera.rays(*blocks.coordinates(run, samples))
        light[:, run], cover[run] = march(shape, camera, rays, shifts[:, blocks.which[run], None])
    return light, cover


def march(shape: str, camera: Cameras, rays: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """March rays (3, b, k) through the cloud of a shape. Returns premultiplied light (3, b, k) and coverage (b, k)."""
    distance, height = DISTANCES[shape], 0.2 * delicacy(shape)

    def depth_inside(p: Tensor) -> Tensor:
        return look_up((billows, ()), p + shift, 0.42)[0] * height - distance(p) + 0.02

    middle = -dot(camera.eye, rays)
    apart = dot(camera.eye, camera.eye) - middle * middle
    half = ((bound(shape) + REACH) ** 2 - apart).clamp_(min=0).sqrt_()
    t, step = middle - half, half * (2 / STEPS)
    clear, where = torch.ones_like(t), torch.zeros_like(t)
    for _ in range(STEPS):
        inside = depth_inside(camera.eye + rays * t)
        opacity = 1 - torch.exp(-(inside * 9).clamp_(0, 6) * step * 5)
        where += clear * opacity * t
        clear = clear * (1 - opacity)
        t = t + step
    cover = 1 - clear
    p = camera.eye + rays * (where / cover.clamp(min=1e-3))
    here = depth_inside(p)

    def open_towards(direction: Tensor, reach: float) -> Tensor:
        return (0.5 - (depth_inside(p + direction * reach) - here) * (0.45 / reach)).clamp_(0, 1)

    sky, lit = 0.45 + 0.55 * open_towards(camera.vertical, 0.2), open_towards(camera.light, 0.16)
    colour = torch.stack([sky * a + lit * b for a, b in ((0.34, 0.68), (0.40, 0.66), (0.52, 0.62))])
    cover = torch.where(cover > 0.004, cover, 0)
    return colour * cover, cover

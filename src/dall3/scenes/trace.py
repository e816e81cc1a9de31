"""Sphere tracing: find the blocks of samples that may show the object, and intersect their rays with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dall3.scenes.camera import DISTANCE, Cameras
from dall3.scenes.shapes import DISTANCES, bound

BLOCK = 8  # samples per side of a block
COARSE_STEPS, STEPS, SECANT_STEPS = 24, 10, 4
TOUCH = 0.005  # distance at which a ray hits the surface


@dataclass
class Blocks:
    """Blocks of BLOCK² samples in images of `across`² blocks.

    which: image number of each block, (b,). place: index of the block in its image, row by row, (b,). start: distance
    along the rays that is empty, (b, 1). counts: number of blocks per image.
    """

    across: int
    which: Tensor
    place: Tensor
    start: Tensor
    counts: list[int]

    @property
    def index(self) -> Tensor:
        """The indices of the blocks among all blocks of all images, (b,)."""
        return self.which * self.across**2 + self.place

    def coordinates(self, run: slice, samples: int) -> tuple[Tensor, Tensor]:
        """Image coordinates (x, y) of a slice of blocks, (blocks, BLOCK²) each. samples: width of the images."""
        inside = torch.arange(BLOCK, device=self.place.device) + 0.5
        place = self.place[run, None]
        column, row = place % self.across, place // self.across
        x = (column * BLOCK + inside.repeat(BLOCK)) / samples
        y = (row * BLOCK + inside.repeat_interleave(BLOCK)) / samples
        return x, y


def find_blocks(groups: Sequence[tuple[str, slice]], cameras: Cameras, samples: int, reach: float = 0.0) -> Blocks:
    """Find the blocks of images `samples` wide whose rays may come within `reach` of the object.

    One cone per block is marched (Crassin et al., "Interactive Indirect Illumination Using Voxel Cone Tracing", 2011).
    groups: slices of images of one shape. Synchronizes with the device once, for the counts.
    """
    device, n = cameras.scale.device, len(cameras.scale)
    across = -(-samples // BLOCK)
    along = (torch.arange(across, device=device) + 0.5) * (BLOCK / samples)
    every = cameras.take(torch.arange(n, device=device))
    rays = every.rays(along.repeat(across), along.repeat_interleave(across))
    spread = (0.7072 * BLOCK / samples) / every.scale
    t = torch.empty_like(rays[0])
    seen = torch.empty_like(t, dtype=torch.bool)
    for shape, run in groups:
        radius, towards, width = bound(shape) + reach, rays[:, run], spread[run]
        far = torch.full_like(towards[0], DISTANCE - radius)
        for _ in range(COARSE_STEPS):
            near = DISTANCES[shape](every.eye[:, run] + towards * far) - reach - width * far
            far = far + near.clamp_(min=0)
        t[run], seen[run] = far, far < DISTANCE + radius
    counts = seen.sum(1).tolist()
    found = seen.reshape(-1).nonzero()[:, 0]
    return Blocks(across, found // across**2, found % across**2, t.reshape(-1)[found, None], counts)


def trace(shape: str, origin: Tensor, rays: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersect unit rays (3, b, k) from origin (3, b, 1) with the solid, starting at distance start (b, 1).

    Returns distances (b, k), points (3, b, k), and whether the rays hit, bool (b, k).
    """
    distance = DISTANCES[shape]
    p = origin + rays * start
    t = start.expand_as(p[0]).clone()
    before, step = t, t
    for k in range(STEPS + SECANT_STEPS):
        d = distance(p)
        if k < STEPS:
            # Limit the step, so that rays that miss the object do not overflow.
            step = d.clamp(max=1)
        else:
            # On grazing rays the distance shrinks slowly and nearly linearly: use a secant step.
            step = torch.where(before > d, d * step / (before - d).clamp_(min=1e-6), d).clamp_(-0.05, 0.3)
        before = d
        t += step
        p.addcmul_(rays, step)
    return t, p, distance(p).abs() < TOUCH

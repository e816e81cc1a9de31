"""From the eye to the objects: the blocks of a picture's samples that show something, and where their rays meet it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dall3.scenes.camera import DISTANCE, Cameras
from dall3.scenes.shapes import DISTANCES, bound

BLOCK = 8  # samples, across and down
COARSE_STEPS, STEPS, SECANT_STEPS = 24, 10, 4
TOUCH = 0.005  # how near a ray comes to have met the surface


@dataclass
class Blocks:
    """Squares of BLOCK² samples in pictures of `across`² of them.

    which: their pictures, (b,). place: their numbers in their pictures, row by row, (b,). start: how far along their
    rays there is nothing yet, (b, 1). counts: how many each picture has.
    """

    across: int
    which: Tensor
    place: Tensor
    start: Tensor
    counts: list[int]

    @property
    def index(self) -> Tensor:
        """The blocks' numbers among those of all pictures, (b,)."""
        return self.which * self.across**2 + self.place

    def coordinates(self, run: slice, samples: int) -> tuple[Tensor, Tensor]:
        """Picture coordinates (x, y), (blocks of the run, BLOCK²) each, of pictures `samples` wide."""
        inside = torch.arange(BLOCK, device=self.place.device) + 0.5
        place = self.place[run, None]
        column, row = place % self.across, place // self.across
        x = (column * BLOCK + inside.repeat(BLOCK)) / samples
        y = (row * BLOCK + inside.repeat_interleave(BLOCK)) / samples
        return x, y


def find_blocks(groups: Sequence[tuple[str, slice]], cameras: Cameras, samples: int, reach: float = 0.0) -> Blocks:
    """The blocks of pictures `samples` wide whose rays may come within `reach` of the object.

    One cone a block is marched (Crassin et al., "Interactive Indirect Illumination Using Voxel Cone Tracing", 2011).
    groups: the runs of pictures of one shape. It waits for the device once, for the counts.
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
    """Where unit rays (3, b, k) from origin (3, b, 1), empty as far as start (b, 1), meet the solid.

    Returns how far along, (b, k), the points (3, b, k), and whether they do, bool (b, k).
    """
    distance = DISTANCES[shape]
    p = origin + rays * start
    t = start.expand_as(p[0]).clone()
    before, step = t, t
    for k in range(STEPS + SECANT_STEPS):
        d = distance(p)
        if k < STEPS:
            # Rays that pass the object must not run off to where numbers end.
            step = d.clamp(max=1)
        else:
            # On grazing rays the distance shrinks slowly, and nearly in proportion: follow its secant.
            step = torch.where(before > d, d * step / (before - d).clamp_(min=1e-6), d).clamp_(-0.05, 0.3)
        before = d
        t += step
        p.addcmul_(rays, step)
    return t, p, distance(p).abs() < TOUCH

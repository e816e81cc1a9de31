"""Quills, blades of grass and fibres: thin strands on a surface, drawn with a depth test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, pi

import numpy as np
import torch
from torch import Tensor

from dall3.scenes.backdrop import light
from dall3.scenes.camera import DISTANCE, WIDTHS, Cameras, outlines
from dall3.scenes.scene import SHAPES, Scene
from dall3.scenes.shapes import delicacy, dot, put, unit
from dall3.scenes.trace import BLOCK


@dataclass(frozen=True)
class Strands:
    """The appearance of strands.

    count: strands per object. length, width: in object units; `taper` narrows the tip. stray, sweep, rise: deviations
    from the normal: random, along the surface in one direction, and of the tip upwards. curl: radius of coils.
    colours: function from positions t (n, k), 0 at the root and 1 at the tip, and random tones (n, k) in [0, 1) to
    linear light (3, n, k).
    """

    count: int
    length: float
    width: float
    taper: float
    stray: float
    sweep: float
    rise: float
    curl: float
    colours: Callable[[Tensor, Tensor], Tensor]


def ramp(t: Tensor, *stops: tuple[float, tuple[int, int, int]]) -> Tensor:
    """A colour gradient: linear light (3, n, k) at t (n, k), from stops (position, 8-bit colour)."""
    value = light(stops[0][1], t.device)
    for (low, start), (high, end) in zip(stops, stops[1:], strict=False):
        step = light(end, t.device) - light(start, t.device)
        value = value + step * ((t - low) * (1 / (high - low))).clamp_(0, 1)
    return value


def quill(t: Tensor, tone: Tensor) -> Tensor:
    dark, pale = (48, 34, 26), (240, 224, 190)
    bands = ((0.22, dark), (0.32, pale), (0.52, pale), (0.60, dark), (0.78, dark), (0.86, pale), (1.0, (255, 248, 226)))
    return ramp(t + 0.10 * (tone - 0.5), *bands)


def blade(t: Tensor, tone: Tensor) -> Tensor:
    return ramp(t, (0.0, (18, 52, 10)), (0.5, (58, 134, 30)), (1.0, (150, 206, 70))) * (0.65 + 0.7 * tone)


def fibre(t: Tensor, tone: Tensor) -> Tensor:
    return ramp(t, (0.0, (220, 194, 158)), (1.0, (255, 240, 214))) * (0.85 + 0.2 * tone)


STRANDS = {
    "porcupine": Strands(
        640, length=0.56, width=0.040, taper=0.9, stray=0.16, sweep=0.8, rise=0.0, curl=0.0, colours=quill
    ),
    "grass": Strands(
        2400, length=0.24, width=0.030, taper=0.9, stray=0.45, sweep=0.0, rise=0.1, curl=0.0, colours=blade
    ),
    "wool": Strands(700, length=0.10, width=0.010, taper=0.5, stray=0.8, sweep=0.0, rise=0.0, curl=0.03, colours=fibre),
}
TURNS = 2  # per coil
NARROWEST = 1.3  # lower bound of the larger visible side of a solid, in object units


def random_numbers(scenes: Sequence[Scene], strands: Strands, device: torch.device) -> Tensor:
    """Random numbers per strand from its scene's seed, (6, n, count): tone, length and phase in [0, 1), and a normally
    distributed vector.
    """
    numbers = np.empty((len(scenes), 6, strands.count), np.float32)
    for row, scene in zip(numbers, scenes, strict=True):
        rng = np.random.default_rng(scene.seed)
        rng.random(out=row[:3], dtype=np.float32)
        rng.standard_normal(out=row[3:], dtype=np.float32)
    return torch.from_numpy(numbers).to(device, non_blocking=True).transpose(0, 1)


def cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def draw_strands(
    scenes: Sequence[Scene], cameras: Cameras, which: Tensor, depth: Tensor, across: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Draw the strands of scenes of one material and size in front of surfaces at `depth`, (n, across², BLOCK²).

    cameras, which: all cameras, and the indices of the scenes' cameras, (n,). samples: width of the images in samples.
    Returns linear light (3, n · across², BLOCK²) and a mask of the strands, bool (n · across², BLOCK²).
    """
    strands, device, n = STRANDS[scenes[0].material], depth.device, len(scenes)
    camera = cameras.take(which)
    tone, grown, phase, *stray = random_numbers(scenes, strands, device)
    every_root, every_normal = outlines(device)
    shapes = put([SHAPES.index(scene.shape) for scene in scenes], device)
    roots, normal = (part[:, shapes, : strands.count] for part in (every_root, every_normal))
    delicate = put([[delicacy(scene.shape)] for scene in scenes], device)
    comb = put([0.45, 0.8, -0.4], device).reshape(3, 1, 1)

    along = normal + strands.stray * torch.stack(stray)
    along = unit(along + strands.sweep * (comb - normal * dot(comb, normal)))
    along = along * ((0.54 + 0.46 * grown) * strands.length * delicate)
    # The maximum number of steps is the maximum length of a strand in samples; each image uses a part of them.
    path, per_unit = strands.length + 2 * pi * TURNS * strands.curl, samples * camera.scale / DISTANCE
    largest = samples * WIDTHS[scenes[0].size] / (NARROWEST + 0.96 * strands.length)
    most_steps, most_dots = max(ceil(path * largest * 1.25), 4), max(ceil(strands.width * largest * 1.2), 1)
    steps = (path * per_unit * 1.25).ceil().clamp(4, most_steps)[..., None]
    dots = (strands.width * per_unit * 1.2).ceil().clamp(1, most_dots)[..., None]
    step = torch.arange(most_steps, device=device)
    t = (step / (steps - 1)).clamp(max=1)
    p = roots[..., None] + along[..., None] * t
    if strands.rise:
        p += camera.vertical[..., None] * (strands.rise * t * t)
    if strands.curl:
        side = unit(cross(normal, normal[[1, 2, 0]] + comb))
        other = cross(normal, side)
        start, angle = 2 * pi * phase[..., None], 2 * pi * (phase[..., None] + TURNS * t)
        coil = side[..., None] * (angle.cos() - start.cos()) + other[..., None] * (angle.sin() - start.sin())
        p += strands.curl * coil
    tips = roots + along if not strands.curl else p[..., -1]
    order = dot(camera.forward, tips).argsort(dim=1, descending=True)
    rank = order.argsort(dim=1)
    facing = dot(normal, roots - camera.eye) < 0.45 * DISTANCE

    view = Cameras(*(getattr(camera, name)[..., None] for name in camera.__dataclass_fields__))
    x, y, z = view.project(p)
    x, y = x * samples, y * samples
    # Each step along a strand is a row of dots across it.
    dot_number = torch.arange(most_dots, device=device)
    offset = (dot_number + 0.5) / dots - 0.5
    width = strands.width * per_unit[..., None] * (1 - strands.taper * t)
    run, fall = x[..., -1:] - x[..., :1], y[..., -1:] - y[..., :1]
    spread = width / (run * run + fall * fall + 1e-6).sqrt()
    # Parts thinner than a sample are drawn with a probability equal to their width.
    chance = torch.sin(tone[..., None] * 1e4 + step * 78.233) * 43758.5453
    painted = (width > chance - chance.floor()) & (step < steps) & facing[..., None]
    column = (x[..., None] - (fall * spread)[..., None] * offset[:, :, None]).floor_().int()
    row = (y[..., None] + (run * spread)[..., None] * offset[:, :, None]).floor_().int()
    inside = (column >= 0) & (column < samples) & (row >= 0) & (row < samples) & painted[..., None]
    inside &= (dot_number < dots)[:, :, None]
    place = torch.div(row, BLOCK, rounding_mode="floor") * across + torch.div(column, BLOCK, rounding_mode="floor")
    place = place * BLOCK**2 + row % BLOCK * BLOCK + column % BLOCK
    place += torch.arange(n, device=device, dtype=torch.int32).reshape(n, 1, 1, 1) * (across**2 * BLOCK**2)
    place = torch.where(inside, place, 0).long()
    inside &= z[..., None] < depth.reshape(-1)[place] + 0.03
    # If several dots fall on one sample, the nearest strand's last dot is kept.
    key = (rank[..., None, None] * most_steps + step[:, None]) * most_dots + dot_number
    key = torch.where(inside, key, -1).int()
    best = torch.full((depth.numel(),), -1, dtype=torch.int32, device=device)
    best.scatter_reduce_(0, place.reshape(-1), key.reshape(-1), "amax")

    best = best.reshape(n, -1)
    shown, best = best >= 0, best.clamp(min=0).long()
    strand = order.gather(1, best // (most_steps * most_dots))
    t = (best // most_dots % most_steps / (steps[..., 0] - 1)).clamp_(max=1)
    aside = (best % most_dots + 0.5) / dots[..., 0] - 0.5
    lit = dot(camera.light, normal).clamp_(min=0) * 0.75 + 0.3 + 0.12 * dot(camera.vertical, normal)
    colour = strands.colours(t, tone.gather(1, strand)) * lit.gather(1, strand) * (1 - 0.5 * (aside + 0.2).abs())
    return colour.reshape(3, -1, BLOCK**2), shown.reshape(-1, BLOCK**2)

"""Quills, blades and fibres: many thin strands that grow from a surface, drawn from the farthest to the nearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dall3.scenes.backdrop import linear
from dall3.scenes.camera import DISTANCE, Camera
from dall3.scenes.noise import Array
from dall3.scenes.scene import Scene
from dall3.scenes.shapes import delicacy, surface_points, unit


@dataclass(frozen=True)
class Strands:
    """`count` strands of that length and root width, in object units, narrower by `taper` at the tip.

    They leave the surface along its normal but for a random `stray`, a `sweep` along it, combed one way, a `rise` of
    the tip towards the sky, and coils of radius `curl`. colours gives light (3, n, steps) for places t (steps,), 0 at
    the root and 1 at the tip, and a random tone (n, 1) in [0, 1) for each strand.
    """

    count: int
    length: float
    width: float
    taper: float
    stray: float
    sweep: float
    rise: float
    curl: float
    colours: Callable[[Array, Array], Array]


def ramp(t: Array, *stops: tuple[float, tuple[int, int, int]]) -> Array:
    """Light (3, ...) at t on a line of (place, colour 0..255) stops."""
    places = [place for place, _ in stops]
    channels = np.stack([linear(colour) for _, colour in stops], axis=1)
    return np.stack([np.interp(t, places, channel) for channel in channels]).astype(np.float32)


def quill(t: Array, tone: Array) -> Array:
    dark, pale = (48, 34, 26), (240, 224, 190)
    bands = ((0.22, dark), (0.32, pale), (0.52, pale), (0.60, dark), (0.78, dark), (0.86, pale), (1.0, (255, 248, 226)))
    return ramp(t + 0.10 * (tone - 0.5), *bands)


def blade(t: Array, tone: Array) -> Array:
    green = ramp(t, (0.0, (18, 52, 10)), (0.5, (58, 134, 30)), (1.0, (150, 206, 70)))
    return green[:, None] * (0.65 + 0.7 * tone)


def fibre(t: Array, tone: Array) -> Array:
    return ramp(t, (0.0, (220, 194, 158)), (1.0, (255, 240, 214)))[:, None] * (0.85 + 0.2 * tone)


STRANDS = {
    "porcupine": Strands(
        640, length=0.56, width=0.040, taper=0.9, stray=0.16, sweep=0.8, rise=0.0, curl=0.0, colours=quill
    ),
    "grass": Strands(
        2400, length=0.24, width=0.030, taper=0.9, stray=0.45, sweep=0.0, rise=0.1, curl=0.0, colours=blade
    ),
    "wool": Strands(700, length=0.10, width=0.010, taper=0.5, stray=0.8, sweep=0.0, rise=0.0, curl=0.03, colours=fibre),
}
COMB = np.array([[0.45], [0.8], [-0.4]], np.float32)
TURNS = 2  # of a coil


def grow(
    strands: Strands, shape: str, camera: Camera, rng: np.random.Generator, steps: int
) -> tuple[Array, Array, Array]:
    """Points (3, n, steps) along those strands that the eye may see, farthest first, the normals (3, n) at their roots
    and a random tone (n, 1) each.
    """
    roots, n = (part[:, : strands.count] for part in surface_points(shape))
    tone, length, phase = rng.random((3, strands.count, 1), np.float32)
    length = (0.54 + 0.46 * length) * np.float32(strands.length * delicacy(shape))
    along = n + np.float32(strands.stray) * rng.standard_normal((3, strands.count), np.float32)
    along = unit(along + np.float32(strands.sweep) * (COMB - n * (COMB * n).sum(0)))
    t = np.linspace(0, 1, steps, dtype=np.float32)
    p = roots[..., None] + along[..., None] * (length * t)
    p += camera.vertical[:, None, None] * (np.float32(strands.rise) * t * t)
    if strands.curl:
        side = unit(np.cross(n, n[[1, 2, 0]] + COMB, axis=0))
        other = np.cross(n, side, axis=0)
        start, angle = 2 * np.pi * phase, 2 * np.pi * (phase + TURNS * t)
        coil = side[..., None] * (np.cos(angle) - np.cos(start)) + other[..., None] * (np.sin(angle) - np.sin(start))
        p += np.float32(strands.curl) * coil
    depth = camera.forward @ p[..., -1]
    order = np.argsort(-depth)
    order = order[(n * (roots - camera.eye[:, None])).sum(0)[order] < 0.45 * DISTANCE]
    return p[:, order], n[:, order], tone[order]


def draw_strands(
    strands: Strands, scene: Scene, camera: Camera, layer: Array, depth: Array, corner: tuple[int, int], scale: int
) -> None:
    """Paint the strands into layer, light and coverage (4, height · width), where depth (height, width) lies behind.

    The layer's first sample is at `corner` (across, down) in a picture `scale` samples wide.
    """
    rng = np.random.default_rng(scene.seed)
    per_unit = scale * camera.scale / DISTANCE
    path = strands.length + 2 * np.pi * TURNS * strands.curl
    steps = max(int(np.ceil(path * per_unit * 1.25)), 4)
    p, n, tone = grow(strands, scene.shape, camera, rng, steps)
    t = np.linspace(0, 1, steps, dtype=np.float32)
    x, y, z = camera.project(p.reshape(3, -1)).reshape(p.shape)
    x, y = x * scale - corner[0], y * scale - corner[1]

    # Each step of a strand is a row of dots across it.
    dots = max(int(np.ceil(strands.width * per_unit * 1.2)), 1)
    across = (np.arange(dots, dtype=np.float32) + 0.5) / dots - 0.5
    width = np.float32(strands.width * per_unit) * (1 - np.float32(strands.taper) * t)
    run, fall = x[:, -1:] - x[:, :1], y[:, -1:] - y[:, :1]
    spread = (width / np.sqrt(run * run + fall * fall + 1e-6))[..., None] * across
    columns = np.floor(x[..., None] - fall[..., None] * spread).astype(np.int32)
    rows = np.floor(y[..., None] + run[..., None] * spread).astype(np.int32)
    inside = (columns >= 0) & (columns < depth.shape[1]) & (rows >= 0) & (rows < depth.shape[0])
    place = np.where(inside, rows * depth.shape[1] + columns, 0)
    inside &= z[..., None] < depth.reshape(-1)[place] + 0.03
    # A part thinner than a sample paints only that share of the samples it meets.
    inside &= (width > rng.random(x.shape, np.float32))[..., None]

    light = np.maximum(camera.light @ n, 0) * 0.75 + 0.3 + 0.12 * (camera.vertical @ n)
    colour = (strands.colours(t, tone) * light[:, None])[..., None] * (1 - 0.5 * np.abs(across + 0.2))
    # Farthest first: where several paint one sample, the last, which is the nearest, stays.
    place = place[inside]
    for channel in range(3):
        layer[channel, place] = colour[channel][inside]
    layer[3, place] = 1

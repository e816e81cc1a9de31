"""The studio: a backdrop that curves into the ground, and the object's shadow on it."""

from __future__ import annotations

import numpy as np

from dall3.scenes.camera import Camera
from dall3.scenes.noise import Array
from dall3.scenes.scene import BACKGROUNDS, Scene
from dall3.scenes.shapes import DISTANCES, bound


def linear(colour: tuple[int, int, int]) -> Array:
    """A colour 0..255 as light, float (3,) in [0, 1]: the display's curve is taken for a square."""
    return np.square(np.array(colour, np.float32) / np.float32(255))


def pixel_centres(size: int) -> tuple[Array, Array]:
    """Picture coordinates (x, y) of size² pixels, row by row, each (size²,)."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.tile(centres, size), np.repeat(centres, size)


def smooth_step(low: float, high: float, x: Array) -> Array:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def soft_shadow(shape: str, p: Array, light: Array, hardness: float = 5.0) -> Array:
    """How much of the light (3,) reaches points (3, n), by how closely the rays to it pass the object
    (Quilez, "Soft shadows in raymarched SDFs", iquilezles.org/articles/rmshadows).
    """
    distance, radius = DISTANCES[shape], bound(shape)
    along = light @ p
    near = np.sqrt(np.maximum((p * p).sum(0) - along * along, 0)) < radius + 0.8
    lit = np.ones(p.shape[1], np.float32)
    p, towards = p[:, near], light[:, None]
    t = np.maximum(-along[near] - radius, 0.02)
    open_part = np.ones(p.shape[1], np.float32)
    for _ in range(18):
        d = distance(p + towards * t)
        open_part = np.minimum(open_part, 0.5 + hardness * d / (t + 0.6))
        t = t + np.clip(d, 0.08, 0.5)
    lit[near] = smooth_step(0, 1, open_part)
    return lit


def enlarge(values: Array, size: int) -> Array:
    """A square of values at half the size, linear in between -> (size, size)."""
    padded = np.pad(values, 1, mode="edge")
    for _ in range(2):
        wide = np.empty((2 * (padded.shape[0] - 2), padded.shape[1]), np.float32)
        wide[0::2] = 0.75 * padded[1:-1] + 0.25 * padded[:-2]
        wide[1::2] = 0.75 * padded[1:-1] + 0.25 * padded[2:]
        padded = wide.T
    return padded[:size, :size]


def draw_backdrop(scene: Scene, camera: Camera, size: int, shade: float) -> Array:
    """The picture without its object, light (size, size, 3). shade: how dark the shadow is, 0..1."""
    colour = linear(BACKGROUNDS[scene.background])
    half = (size + 1) // 2
    rays = camera.rays(*pixel_centres(half))
    falling = camera.vertical @ rays
    height = camera.vertical @ camera.eye - camera.ground
    t = np.where(falling < -0.02, height / np.maximum(-falling, 0.02), 60.0).astype(np.float32)
    p = camera.eye[:, None] + rays * t
    level = camera.forward - camera.vertical * (camera.vertical @ camera.forward)
    behind = (level / np.sqrt(level @ level)) @ p
    ground = 1 - smooth_step(1.5, 7.0, behind)
    lit = np.ones(half * half, np.float32)
    close = np.flatnonzero((p * p).sum(0) < 30)
    touching = np.exp(-5 * np.maximum(DISTANCES[scene.shape](p[:, close]), 0))
    lit[close] = (1 - shade * (1 - soft_shadow(scene.shape, p[:, close], camera.light))) * (1 - 0.6 * shade * touching)
    x, y = pixel_centres(half)
    vignette = 1.03 - 0.16 * ((x - 0.5) ** 2 + (y - 0.45) ** 2)
    floor_colour = colour * 0.80 if colour.max() > 0.1 else colour * 1.6 + 0.02
    lit = 1 - (1 - lit) * ground
    channels = [
        (wall + (floor - wall) * ground) * lit * vignette for wall, floor in zip(colour, floor_colour, strict=True)
    ]
    return np.stack([enlarge(channel.reshape(half, half), size) for channel in channels], axis=-1)

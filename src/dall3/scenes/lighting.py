"""How a point of the surface turns light into colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dall3.scenes.backdrop import smooth_step
from dall3.scenes.camera import Camera
from dall3.scenes.noise import Array
from dall3.scenes.shapes import DISTANCES, unit


@dataclass
class Surface:
    """What a material is told of n points of the object, in its own coordinates.

    p, n, view: points, unit normals and unit directions from the eye, (3, n). picture: the scene without the object,
    light (size, size, 3).
    """

    shape: str
    p: Array
    n: Array
    view: Array
    camera: Camera
    picture: Array
    rng: np.random.Generator

    def thickness(self, directions: Array) -> Array:
        """How far unit directions (3, n) lead through the object from each point, (n,), roughly."""
        distance = DISTANCES[self.shape]
        t = np.full(self.p.shape[1], 0.06, np.float32)
        for _ in range(7):
            t += np.maximum(-distance(self.p + directions * t), 0) * np.float32(1.3)
        return t

    def seen_behind(self, points: Array) -> Array:
        """The light (3, n) of the picture where points (3, n) would appear in it."""
        size = len(self.picture)
        across, down, _ = np.clip(self.camera.project(points) * size, 0, size - 1).astype(np.int32)
        return self.picture.reshape(-1, 3).take(down * size + across, axis=0).T


@dataclass
class Look:
    """What a material says of n points: albedo (3, n) or (3, 1); normals with its bumps, (3, n), or None for the
    solid's; specular highlights of that strength and exponent; how strongly it mirrors the studio, in which tint (3, 1)
    or as the Fresnel term alone; and its own glow (3, n).
    """

    albedo: Array
    normal: Array | None = None
    specular: float | Array = 0.1
    gloss: float = 20.0
    mirror: float = 0.0
    tint: Array | None = None
    glow: Array | None = None


def bend(n: Array, slope: Array, amount: float) -> Array:
    """Unit normals (3, n) tilted against a height's slope (3, n): bump mapping (Blinn, SIGGRAPH 1978)."""
    return unit(n - slope * np.float32(amount))


def fresnel(n: Array, view: Array) -> Array:
    """The mirrored share of light by Schlick's approximation (1994), from 0.04 head on to 1 at grazing angles."""
    facing = np.clip(1 + (n * view).sum(0), 0, 1)
    square = facing * facing
    return np.float32(0.04) + np.float32(0.96) * square * square * facing


def reflect(view: Array, n: Array) -> Array:
    return view - n * (2 * (view * n).sum(0))


def studio(camera: Camera, direction: Array) -> Array:
    """The light (n,) that comes from directions (3, n): a dim room, a bright ceiling, a window beside the light."""
    height = camera.vertical @ direction
    side = camera.right @ direction
    towards = camera.light @ direction
    room = 0.25 + 0.5 * smooth_step(-0.15, 0.5, height) - 0.2 * smooth_step(-0.1, -0.7, height)
    strip = smooth_step(0.25, 0.1, np.abs(side + 0.45)) * smooth_step(-0.1, 0.2, height)
    return room + 1.3 * smooth_step(0.72, 0.9, towards) + 0.55 * strip


def shade(surface: Surface, look: Look, openness: Array) -> Array:
    """Light (3, n) that leaves the surface to the eye; openness (n,) is what the surroundings leave of the sky."""
    camera, view = surface.camera, surface.view
    n = surface.n if look.normal is None else look.normal
    facing = camera.light @ n
    fill = 0.2 * np.maximum(-(view * n).sum(0), 0)
    ambient = (0.20 + 0.16 * (camera.vertical @ n) + fill) * openness
    colour = look.albedo * (ambient + 0.88 * np.maximum(facing, 0))
    halfway = unit(camera.light[:, None] - view)
    shine = np.maximum((halfway * n).sum(0), 0) ** np.float32(look.gloss)
    colour += look.specular * shine * (facing > 0)
    if look.mirror:
        light = studio(camera, reflect(view, n)) * (0.4 + 0.6 * openness)
        tint = fresnel(n, view) if look.tint is None else look.tint
        colour += light * np.float32(look.mirror) * tint
    if look.glow is not None:
        colour += look.glow
    return colour


def expose(light: Array) -> Array:
    """Light from 0 up, brought below 1: what passes 0.7 is compressed, so that bright faces keep their shading."""
    return np.minimum(light, 0.7) + 0.3 * np.tanh(np.maximum(light - 0.7, 0) / 0.3)

"""Shading: the light that leaves a surface point towards the camera."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dall3.scenes.backdrop import smooth_step
from dall3.scenes.camera import Cameras
from dall3.scenes.shapes import DISTANCES, dot, unit


@dataclass
class Surface:
    """A material's input: surface points in object coordinates, in b blocks of k points.

    runs: shapes with their slices of blocks. p, n, view: points, unit normals and unit directions from the camera,
    (3, b, k). which: image numbers of the blocks, (b,). camera: their cameras. backdrops: the scenes without objects,
    linear light (n, 3, size, size). details: random numbers of the scenes, (numbers, b, 1), as `details` draws them.
    """

    runs: Sequence[tuple[str, slice]]
    p: Tensor
    n: Tensor
    view: Tensor
    which: Tensor
    camera: Cameras
    backdrops: Tensor
    details: Tensor

    def shifted(self) -> Tensor:
        """The points (3, b, k), offset by a random vector per scene, for noise lookups."""
        return self.p + self.details[:3]

    def by_shape(self, make: Callable[[str, slice], Tensor]) -> Tensor:
        """Call `make` for each shape's slice and concatenate the results along the blocks."""
        return torch.cat([make(shape, run) for shape, run in self.runs], dim=-2)

    def thickness(self, directions: Tensor, steps: int = 7) -> Tensor:
        """The approximate length (b, k) of the path through the object along unit directions (3, b, k)."""

        def through(shape: str, run: slice) -> Tensor:
            p, towards = self.p[:, run], directions[:, run]
            t = torch.full_like(p[0], 0.06)
            for _ in range(steps):
                t = t - DISTANCES[shape](p + towards * t).clamp_(max=0) * 1.3
            return t

        return self.by_shape(through)

    def seen_behind(self, points: Tensor) -> Tensor:
        """The light (3, b, k) of the backdrops at the projections of points (3, b, k)."""
        size = self.backdrops.shape[-1]
        across, down, _ = (self.camera.project(points) * size).nan_to_num_(0).clamp_(0, size - 1).long()
        place = (self.which[:, None] * (3 * size) + down) * size + across
        flat = self.backdrops.reshape(-1)
        return torch.stack([flat.take(place + channel * size * size) for channel in range(3)])


@dataclass
class Look:
    """A material's output at surface points.

    albedo: (3, b, k) or (3, 1, 1). normal: bump-mapped normals, (3, b, k), or None for the solid's. specular, gloss:
    strength and exponent of highlights. mirror: strength of the reflection of the studio. tint: its colour, (3, 1, 1),
    or None for the Fresnel term. glow: emitted light, (3, b, k).
    """

    albedo: Tensor
    normal: Tensor | None = None
    specular: float | Tensor = 0.1
    gloss: float = 20.0
    mirror: float = 0.0
    tint: Tensor | None = None
    glow: Tensor | None = None


def bend(n: Tensor, slope: Tensor, amount: float) -> Tensor:
    """Bump mapping (Blinn, SIGGRAPH 1978): unit normals (3, ...) tilted by the gradient of a height field (3, ...)."""
    return unit(n - slope * amount)


def fresnel(n: Tensor, view: Tensor) -> Tensor:
    """Schlick's approximation (1994) of the reflectance, from 0.04 at normal incidence to 1 at grazing angles."""
    facing = (1 + dot(n, view)).clamp_(0, 1)
    square = facing * facing
    return square * square * facing * 0.96 + 0.04


def reflect(view: Tensor, n: Tensor) -> Tensor:
    """The direction of `view`, (3, ...), after reflection at a surface with the unit normals n, (3, ...)."""
    return view - n * (2 * dot(view, n))


def studio(camera: Cameras, direction: Tensor) -> Tensor:
    """An environment map: the light (...) from directions (3, ...), of a dim room, a bright ceiling and a window."""
    height = dot(camera.vertical, direction)
    side = dot(camera.right, direction)
    towards = dot(camera.light, direction)
    room = 0.25 + 0.5 * smooth_step(-0.15, 0.5, height) - 0.2 * smooth_step(-0.1, -0.7, height)
    strip = smooth_step(0.25, 0.1, (side + 0.45).abs()) * smooth_step(-0.1, 0.2, height)
    return room + 1.3 * smooth_step(0.72, 0.9, towards) + 0.55 * strip


def shade(surface: Surface, look: Look, openness: Tensor) -> Tensor:
    """The light (3, b, k) that leaves the surface towards the camera. openness: ambient visibility, (b, k)."""
    camera, view = surface.camera, surface.view
    n = surface.n if look.normal is None else look.normal
    facing = dot(camera.light, n)
    fill = dot(view, n).clamp_(max=0) * -0.2
    ambient = (0.20 + 0.16 * dot(camera.vertical, n) + fill) * openness
    colour = look.albedo * (ambient + 0.88 * facing.clamp(min=0))
    halfway = unit(camera.light - view)
    shine = dot(halfway, n).clamp_(min=0) ** look.gloss
    colour += look.specular * torch.where(facing > 0, shine, 0)
    if look.mirror:
        light = studio(camera, reflect(view, n)) * (0.4 + 0.6 * openness)
        tint = fresnel(n, view) if look.tint is None else look.tint
        colour += light * look.mirror * tint
    if look.glow is not None:
        colour += look.glow
    return colour


def expose(light: Tensor) -> Tensor:
    """Tone mapping: compress light above 0.7 to below 1, so that bright faces keep their shading."""
    return light.clamp(max=0.7) + 0.3 * torch.tanh((light - 0.7).clamp_(min=0) / 0.3)

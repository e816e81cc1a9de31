"""Perspective cameras, the light and the ground in object coordinates; projection to the image and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dall3.scenes.noise import Array
from dall3.scenes.scene import SHAPES, Scene
from dall3.scenes.shapes import dot, surface_points, unit

DISTANCE = 6.0  # from the camera to the object's centre; objects have a radius of about 1
WIDTHS = {"small": 0.36, "medium": 0.53, "large": 0.71}  # the object's larger side relative to the image


def turns(axis: int, degrees: Array) -> Array:
    """Rotation matrices (n, 3, 3) about the axis 0, 1 or 2 (x, y, z)."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.tile(np.eye(3), (len(degrees), 1, 1))
    matrix[:, i, i] = matrix[:, j, j] = np.cos(np.radians(degrees))
    matrix[:, j, i] = np.sin(np.radians(degrees))
    matrix[:, i, j] = -matrix[:, j, i]
    return matrix.astype(np.float32)


def on_dome(azimuth: Array, elevation: Array) -> Array:
    """Unit vectors (n, 3) by azimuth, measured from the viewer to the right, and elevation above the ground."""
    a, e = np.radians(azimuth), np.radians(elevation)
    return np.stack([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], axis=1)


def axes(scenes: Sequence[Scene]) -> Array:
    """A camera's unit vectors in object coordinates, in the order of the fields of `Cameras`: (5, 3, n)."""
    angles = np.array([(s.azimuth, s.roll, s.lean, s.elevation, s.light_azimuth, s.light_elevation) for s in scenes])
    azimuth, roll, lean, elevation, light_azimuth, light_elevation = angles.reshape(-1, 6).T
    turn = turns(1, azimuth) @ turns(2, roll) @ turns(0, lean)
    back = on_dome(np.zeros_like(elevation), elevation)
    zero = np.zeros_like(elevation)
    directions = np.stack(
        [
            np.stack([zero + 1, zero, zero], 1),
            np.stack([zero, back[:, 2], -back[:, 1]], 1),
            -back,
            np.stack([zero, zero + 1, zero], 1),
            on_dome(light_azimuth, light_elevation),
        ]
    )
    return np.einsum("dni,nij->djn", directions, turn).astype(np.float32)


@cache
def outlines(device: torch.device) -> tuple[Tensor, Tensor]:
    """Surface points and normals of all shapes, (3, shapes, 2400) each."""
    points, normals = zip(*(surface_points(shape) for shape in SHAPES), strict=True)
    return torch.stack(points, dim=1).to(device), torch.stack(normals, dim=1).to(device)


@dataclass
class Cameras:
    """Perspective cameras in object coordinates. Image coordinates are in [0, 1], x to the right and y down.

    right, up, forward: axes of the image, unit (3, n). vertical, light: directions upwards and to the light, unit
    (3, n). eye: position of the camera, (3, n). ground: height of the ground relative to the object's centre, (n,).
    scale (n,), middle (2, n): scale and offset from object to image coordinates. centre: image coordinates of the
    object, (2, n).
    """

    right: Tensor
    up: Tensor
    forward: Tensor
    vertical: Tensor
    light: Tensor
    eye: Tensor
    ground: Tensor
    scale: Tensor
    middle: Tensor
    centre: Tensor

    def take(self, which: Tensor) -> Cameras:
        """Select cameras by image numbers (b,), with a trailing dimension of 1."""
        return Cameras(*(getattr(self, field.name)[..., which, None] for field in fields(self)))

    def part(self, which: slice) -> Cameras:
        """Select the cameras of a slice of images."""
        return Cameras(*(getattr(self, field.name)[..., which] for field in fields(self)))

    def project(self, p: Tensor) -> Tensor:
        """Project points (3, ...) to x, y and depth along the view, (3, ...)."""
        depth = dot(self.forward, p) + DISTANCE
        x = (dot(self.right, p) / depth - self.middle[0]) * self.scale + self.centre[0]
        y = self.centre[1] - (dot(self.up, p) / depth - self.middle[1]) * self.scale
        return torch.stack([x, y, depth])

    def rays(self, x: Tensor, y: Tensor) -> Tensor:
        """Unit directions (3, ...) from the camera through image coordinates (...)."""
        across = (x - self.centre[0]) / self.scale + self.middle[0]
        upwards = (self.centre[1] - y) / self.scale + self.middle[1]
        return unit((self.forward + self.right * across).addcmul_(self.up, upwards))


def aim(scenes: Sequence[Scene], reach: Sequence[float], device: torch.device) -> Cameras:
    """Create the cameras of scenes.

    Scale and offset follow from the object's outline, extended by `reach` for strands on the surface: its larger side
    has the relative width of the scene's size, and its centre is at the scene's offset.
    """
    n = len(scenes)
    numbers = np.concatenate(
        [
            axes(scenes).reshape(15, n),
            np.array([(*s.offset, WIDTHS[s.size]) for s in scenes], np.float32).reshape(n, 3).T,
            np.array([reach, [SHAPES.index(s.shape) for s in scenes]], np.float32),
        ]
    ).astype(np.float32)
    on_device = torch.from_numpy(numbers).to(device, non_blocking=True)
    right, up, forward, vertical, light = on_device[:15].reshape(5, 3, n)
    every_point, every_normal = outlines(device)
    shape = on_device[19].long()
    points = every_point[:, shape]
    ground = dot(vertical[..., None], points).amin(-1)
    grown = points + every_normal[:, shape] * on_device[18][:, None]
    depth = dot(forward[..., None], grown) + DISTANCE
    x, y = dot(right[..., None], grown) / depth, dot(up[..., None], grown) / depth
    low, high = torch.stack([x.amin(-1), y.amin(-1)]), torch.stack([x.amax(-1), y.amax(-1)])
    scale, middle = on_device[17] / (high - low).amax(0), (low + high) * 0.5
    return Cameras(
        right, up, forward, vertical, light, -DISTANCE * forward, ground, scale, middle, on_device[15:17] + 0.5
    )

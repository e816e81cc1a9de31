"""Where the eye, the light and the ground are, seen from the object, and the way to the picture and back."""

from __future__ import annotations

import numpy as np

from dall3.scenes.noise import Array
from dall3.scenes.scene import Scene
from dall3.scenes.shapes import surface_points, unit

DISTANCE = 6.0  # from the eye to the object's centre, whose radius is about 1
WIDTHS = {"small": 0.36, "medium": 0.53, "large": 0.71}  # the object's larger side, of the picture's


def rotation(axis: int, degrees: float) -> Array:
    """The matrix (3, 3) of a turn about x, y or z (0, 1, 2)."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(np.radians(degrees))
    matrix[j, i] = np.sin(np.radians(degrees))
    matrix[i, j] = -matrix[j, i]
    return matrix.astype(np.float32)


def on_dome(azimuth: float, elevation: float) -> Array:
    """The unit vector (3,) to a place above the ground, the azimuth measured from the viewer's side to the right."""
    a, e = np.radians(azimuth), np.radians(elevation)
    return np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], np.float32)


class Camera:
    """A perspective camera in the object's own coordinates; picture coordinates run across and down in [0, 1].

    right, up, forward: the picture's axes, unit (3,). eye: where it is. vertical, light: the ways up from the ground
    and to the light, unit (3,). ground: the height of the ground under the object's centre. window: the picture
    coordinates of the object's upper left and lower right, (2,) each.

    The picture's scale and shift follow from the object's outline, `reach` beyond its surface (for what grows on it),
    so that its larger side takes its size's share of the picture and its middle lies at the scene's offset.
    """

    def __init__(self, scene: Scene, reach: float) -> None:
        turn = rotation(1, scene.azimuth) @ rotation(2, scene.roll) @ rotation(0, scene.lean)
        back = on_dome(0, scene.elevation)
        self.right = turn.T @ np.array([1, 0, 0], np.float32)
        self.up = turn.T @ np.array([0, back[2], -back[1]], np.float32)
        self.forward = -(turn.T @ back)
        self.eye = -DISTANCE * self.forward
        self.vertical = turn.T @ np.array([0, 1, 0], np.float32)
        self.light = turn.T @ on_dome(scene.light_azimuth, scene.light_elevation)
        points, normals = surface_points(scene.shape)
        self.ground = float((self.vertical @ points).min())
        self.scale, self.middle = 1.0, np.zeros(2, np.float32)
        self.centre = 0.5 + np.array(scene.offset, np.float32)
        x, y, _ = self.project(points + np.float32(reach) * normals) - np.append(self.centre, 0)[:, None]
        low, high = np.array([x.min(), -y.max()], np.float32), np.array([x.max(), -y.min()], np.float32)
        self.scale = float(WIDTHS[scene.size] / (high - low).max())
        self.middle = (low + high) * np.float32(0.5)
        half = (high - low) * np.float32(self.scale / 2)
        self.window = (self.centre - half, self.centre + half)

    def project(self, p: Array) -> Array:
        """Points (3, n) -> across, down and depth along the view, (3, n)."""
        depth = self.forward @ p + np.float32(DISTANCE)
        x = (self.right @ p / depth - self.middle[0]) * np.float32(self.scale) + self.centre[0]
        y = self.centre[1] - (self.up @ p / depth - self.middle[1]) * np.float32(self.scale)
        return np.stack([x, y, depth])

    def rays(self, x: Array, y: Array) -> Array:
        """Unit directions (3, n) from the eye through picture coordinates, n each."""
        across = (x - self.centre[0]) / np.float32(self.scale) + self.middle[0]
        upwards = (self.centre[1] - y) / np.float32(self.scale) + self.middle[1]
        return unit(self.forward[:, None] + self.right[:, None] * across + self.up[:, None] * upwards)

"""A solid filled with cloud: no surface, but a density that rises inwards, marched through front to back."""

from __future__ import annotations

import numpy as np

from dall3.scenes.camera import Camera
from dall3.scenes.noise import Array, billows, look_up
from dall3.scenes.scene import Scene
from dall3.scenes.shapes import DISTANCES, ball_span, bound, delicacy

REACH = 0.12  # how far wisps stand out from the solid
STEPS = 20
SKY_LIGHT = np.array([[0.34], [0.40], [0.52]], np.float32)
SUN_LIGHT = np.array([[0.68], [0.66], [0.62]], np.float32)


def draw_cloud(scene: Scene, camera: Camera, rays: Array) -> Array:
    """Premultiplied light and coverage (4, n) along unit rays (3, n) from the eye."""
    distance = DISTANCES[scene.shape]
    height = np.float32(0.2 * delicacy(scene.shape))
    shift = np.random.default_rng(scene.seed).random((3, 1), np.float32) * 8

    def depth_inside(p: Array) -> Array:
        return np.float32(0.02) - distance(p) + look_up(billows(), p + shift, 0.42)[0] * height

    layer = np.zeros((4, rays.shape[1]), np.float32)
    met, t, end = ball_span(camera.eye, rays, bound(scene.shape) + REACH)
    rays, step = rays[:, met], (end - t) * np.float32(1 / STEPS)
    clear = np.ones_like(t)
    where = np.zeros_like(t)
    for _ in range(STEPS):
        inside = depth_inside(camera.eye[:, None] + rays * t)
        opacity = 1 - np.exp(-np.clip(inside * 9, 0, 6) * step * 5)
        where += clear * opacity * t
        clear *= 1 - opacity
        t += step
    cover = 1 - clear
    seen = np.flatnonzero(cover > 0.004)
    p = camera.eye[:, None] + rays[:, seen] * (where[seen] / cover[seen])
    here = depth_inside(p)

    def open_towards(direction: Array, reach: float) -> Array:
        return 0.5 - (depth_inside(p + direction[:, None] * np.float32(reach)) - here) * np.float32(0.45 / reach)

    lit = np.clip(open_towards(camera.light, 0.16), 0, 1)
    sky = np.clip(open_towards(camera.vertical, 0.2), 0, 1)
    colour = SKY_LIGHT * (0.45 + 0.55 * sky) + SUN_LIGHT * lit
    layer[:3, met[seen]] = colour * cover[seen]
    layer[3, met[seen]] = cover[seen]
    return layer

"""Pictures of scenes: sphere tracing at two samples a pixel each way, materials, strands, then one box filter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dall3.scenes.backdrop import draw_backdrop
from dall3.scenes.camera import Camera
from dall3.scenes.cloud import draw_cloud
from dall3.scenes.lighting import Surface, expose, shade
from dall3.scenes.materials import LOOKS
from dall3.scenes.noise import Array
from dall3.scenes.scene import Scene
from dall3.scenes.shapes import DISTANCES, ball_span, bound, delicacy, normals
from dall3.scenes.strands import STRANDS, draw_strands

SAMPLES = 2  # a pixel, each way
TOUCH = 0.003  # how near a ray comes before it has met the surface
MARGIN = 0.05  # of the picture's side, round the object's window, for what sticks out of it
TRANSLUCENT = ("cloud", "water", "ice")


def trace(shape: str, origin: Array, rays: Array) -> Array:
    """How far along unit rays (3, n) from origin (3,) the solid lies, (n,); infinity where they miss it."""
    distance = DISTANCES[shape]
    active, t, end = ball_span(origin, rays, bound(shape))
    hits = np.full(rays.shape[1], np.inf, np.float32)
    rays = rays[:, active]
    for _ in range(48):
        d = distance(origin[:, None] + rays * t)
        t = t + d
        touched = d < TOUCH
        hits[active[touched]] = t[touched]
        going = np.flatnonzero(~touched & (t < end))
        if going.size == 0:
            break
        if going.size < 0.8 * t.size:
            active, t, end, rays = active[going], t[going], end[going], rays[:, going]
        else:
            end = np.where(touched, -np.inf, end).astype(np.float32)
    return hits


def draw_solid(scene: Scene, camera: Camera, picture: Array, rays: Array) -> tuple[Array, Array]:
    """The object along unit rays (3, n): light and coverage (4, n), and its depth (n,), infinity where there is none.

    picture: the scene without the object, light (size, size, 3).
    """
    distance = DISTANCES[scene.shape]
    t = trace(scene.shape, camera.eye, rays)
    hit = np.flatnonzero(t < np.inf)
    view = np.ascontiguousarray(rays[:, hit])
    p = camera.eye[:, None] + view * t[hit]
    n = normals(distance, p)
    surface = Surface(scene.shape, p, n, view, camera, picture, np.random.default_rng(scene.seed))
    openness = np.clip(0.45 + distance(p + n * np.float32(0.25)) * 2.2, 0, 1)
    openness *= np.clip(0.55 + 0.6 * (camera.vertical @ p - camera.ground), 0, 1)
    layer = np.zeros((4, t.size), np.float32)
    layer[:3, hit] = shade(surface, LOOKS[scene.material](surface), openness)
    layer[3, hit] = 1
    return layer, t * (camera.forward @ rays)


def render(scene: Scene, size: int = 256) -> NDArray[np.uint8]:
    """The scene as a picture, uint8 (size, size, 3); the same scene gives the same bytes.

    Raises ValueError for a size under 16 pixels.
    """
    if size < 16:
        raise ValueError(f"size={size}; expected at least 16 pixels")
    strands = STRANDS.get(scene.material)
    camera = Camera(scene, reach=0.8 * strands.length * delicacy(scene.shape) if strands else 0.0)
    darkness = 0.45 if scene.material in TRANSLUCENT else 0.75
    picture = draw_backdrop(scene, camera, size, darkness)

    low, high = camera.window
    left, top = (max(int((edge - MARGIN) * size), 0) for edge in low)
    right, bottom = (min(int((edge + MARGIN) * size) + 1, size) for edge in high)
    samples = 1 if scene.material == "cloud" else SAMPLES
    x = np.arange(0.5, (right - left) * samples, dtype=np.float32) / (samples * size) + np.float32(left / size)
    y = np.arange(0.5, (bottom - top) * samples, dtype=np.float32) / (samples * size) + np.float32(top / size)
    rays = camera.rays(np.tile(x, y.size), np.repeat(y, x.size))
    if scene.material == "cloud":
        layer = draw_cloud(scene, camera, rays)
    else:
        layer, depth = draw_solid(scene, camera, picture, rays)
        if strands:
            corner = (left * samples, top * samples)
            draw_strands(strands, scene, camera, layer, depth.reshape(y.size, x.size), corner, size * samples)

    layer[:3] = expose(layer[:3])
    layer = layer.reshape(4, bottom - top, samples, right - left, samples).mean((2, 4))
    target = picture[top:bottom, left:right]
    target *= 1 - layer[3, ..., None]
    target += np.moveaxis(layer[:3], 0, -1)
    return (np.sqrt(np.clip(picture, 0, 1)) * 255 + 0.5).astype(np.uint8)

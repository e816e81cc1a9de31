"""The ten solids as signed distance functions (Hart, "Sphere Tracing", 1996), each about 1 in radius, y upwards.

A distance function takes points (3, n) and returns n distances, negative inside; it never exceeds the true distance,
so that a ray may always step that far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dall3.scenes.noise import Array

Distance = Callable[[Array], Array]
ROUNDING = 0.1


def unit(vectors: Array) -> Array:
    """Vectors (3, ...) at length 1."""
    return vectors / np.sqrt((vectors * vectors).sum(0))


def smooth_max(a: Array, b: Array, k: float = ROUNDING) -> Array:
    """The larger of a and b, with the crease between them rounded over the width k: it rounds a solid's edges."""
    overlap = np.maximum(k - np.abs(a - b), 0)
    return np.maximum(a, b) + overlap * overlap * (0.25 / k)


def radial(p: Array) -> Array:
    return np.sqrt(p[0] * p[0] + p[2] * p[2])


def cube(p: Array) -> Array:
    x, y, z = np.abs(p)
    return smooth_max(smooth_max(x, z), y) - 0.72


def sphere(p: Array) -> Array:
    return np.sqrt((p * p).sum(0)) - 0.9


def cylinder(p: Array) -> Array:
    return smooth_max(radial(p) - 0.66, np.abs(p[1]) - 0.78)


def cone(p: Array) -> Array:
    slant = radial(p) * 0.9 + p[1] * 0.4359 - 0.4
    return smooth_max(slant, -0.75 - p[1], 0.06)


def pyramid(p: Array) -> Array:
    slant = smooth_max(np.abs(p[0]), np.abs(p[2]), 0.05) * 0.87 + p[1] * 0.493 - 0.4
    return smooth_max(slant, -0.66 - p[1], 0.05)


def torus(p: Array) -> Array:
    ring = radial(p) - 0.66
    return np.sqrt(ring * ring + p[1] * p[1]) - 0.3


def capsule(p: Array) -> Array:
    y = p[1] - np.clip(p[1], -0.55, 0.55)
    return np.sqrt(p[0] * p[0] + y * y + p[2] * p[2]) - 0.45


def octahedron(p: Array) -> Array:
    return (np.sqrt(p * p + 0.0009).sum(0) - 1.08) * 0.57735


def egg(p: Array) -> Array:
    widen = 1 + 0.24 * p[1]
    y = p[1] * 0.74
    return (np.sqrt((p[0] * p[0] + p[2] * p[2]) * widen * widen + y * y) - 0.7) * 0.8


def star(p: Array) -> Array:
    # The plane is folded to half a point of the star; its one edge runs from the tip to the notch between two points.
    sector = 2 * np.pi / 5
    angle = np.arctan2(p[0], p[1])
    angle = np.abs(angle - sector * np.rint(angle / sector))
    radius = np.sqrt(p[0] * p[0] + p[1] * p[1])
    edge = radius * np.cos(angle - STAR_EDGE_ANGLE) - STAR_EDGE
    return smooth_max(edge, np.abs(p[2]) - 0.3, 0.06)


_tip, _notch = np.array([0.0, 1.08]), 0.5 * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
_across = np.array([_tip[1] - _notch[1], _notch[0] - _tip[0]]) / np.hypot(*(_tip - _notch))
STAR_EDGE = float(_tip @ _across)
STAR_EDGE_ANGLE = float(np.arctan2(_across[0], _across[1]))

DISTANCES: dict[str, Distance] = {
    function.__name__: function
    for function in (cube, sphere, cylinder, cone, pyramid, torus, capsule, octahedron, egg, star)
}
FACETED = ("cube", "pyramid", "octahedron", "star")


def ball_span(origin: Array, rays: Array, radius: float) -> tuple[NDArray[np.intp], Array, Array]:
    """Which unit rays (3, n) from origin (3,) meet the ball round the object, and where they enter and leave it."""
    middle = -(origin @ rays)
    apart = origin @ origin - middle * middle
    met = np.flatnonzero(apart < radius * radius)
    half = np.sqrt(radius * radius - apart[met])
    return met, middle[met] - half, middle[met] + half


def normals(distance: Distance, p: Array, step: float = 0.004) -> Array:
    """Unit normals (3, n) at points (3, n) near the surface: the distance's gradient by four evaluations."""
    total = np.zeros_like(p)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        direction = np.array(corner, np.float32)[:, None]
        total += direction * distance(p + direction * np.float32(step))
    return unit(total)


@cache
def surface_points(shape: str) -> tuple[Array, Array]:
    """Points (3, 2400) on the surface and their normals, spread so evenly that so is any number of the first ones.

    Random points drop to the surface along the gradient; then the point farthest from those chosen is always next.
    """
    distance = DISTANCES[shape]
    p = np.random.default_rng(7).uniform(-1.2, 1.2, (3, 9000)).astype(np.float32)
    for _ in range(6):
        p = p - normals(distance, p) * distance(p)
    p = p[:, np.abs(distance(p)) < 0.004]
    order = np.zeros(2400, int)
    squares = (p * p).sum(0)
    nearest = np.full(p.shape[1], np.inf, np.float32)
    for k in range(1, len(order)):
        last = order[k - 1]
        nearest = np.minimum(nearest, squares + squares[last] - 2 * (p[:, last] @ p))
        order[k] = nearest.argmax()
    p = np.ascontiguousarray(p[:, order])
    return p, normals(distance, p)


@cache
def bound(shape: str) -> float:
    """The radius of a ball about the origin that holds the solid."""
    points, _ = surface_points(shape)
    return float(np.sqrt((points * points).sum(0).max())) + 0.03


@cache
def delicacy(shape: str) -> float:
    """From 1 for a bulky solid down to 0.6 for a thin one: by how much to shorten what grows on it."""
    p = np.random.default_rng(8).uniform(-1, 1, (3, 4000)).astype(np.float32)
    return float(np.clip(0.3 - DISTANCES[shape](p).min(), 0.6, 1))


@cache
def spaced_points(shape: str, spacing: float) -> Array:
    """Points (3, n) all over the surface, at least that far from each other."""
    points, _ = surface_points(shape)
    points = points[:, :400]
    apart = ((points[:, :, None] - points[:, None]) ** 2).sum(0) + np.triu(np.full((400, 400), np.inf, np.float32))
    return np.ascontiguousarray(points[:, apart.min(1) >= spacing * spacing])


def courses(shape: str, p: Array, n: Array, height: float, length: float) -> tuple[Array, Array]:
    """Coordinates (u, v) for laying bricks of that height and length round the solid: whole numbers are the joints.

    Flat faces are laid in their own plane, round solids along their circles, with a whole number of bricks a circle.
    """
    if shape == "torus":
        turn, tube = np.arctan2(p[0], p[2]), np.arctan2(p[1], radial(p) - 0.66)
        return turn * np.float32(round(4.1 / length) / (2 * np.pi)), tube * np.float32(
            round(1.9 / height) / (2 * np.pi)
        )
    if shape == "octahedron":
        return (p[0] * np.sign(p[2]) - p[2] * np.sign(p[0])) / np.float32(1.414 * length), p[1] / np.float32(height)
    ax, ay, az = np.abs(n)
    if shape in FACETED:
        along_x = np.where(ax > az, p[2], p[0])
        flat = (ay > ax) & (ay > az) if shape != "pyramid" else n[1] < -0.8
        return np.where(flat, p[0], along_x) / np.float32(length), np.where(flat, p[2], p[1]) / np.float32(height)
    v = p[1] / np.float32(height)
    points, _ = surface_points(shape)
    row = np.floor(v).astype(int)
    rows = np.floor(points[1] / height).astype(int)
    base = min(row.min(), rows.min())
    span = max(row.max(), rows.max()) - base + 1
    circle = np.bincount(rows - base, radial(points), span) / np.maximum(np.bincount(rows - base, minlength=span), 1)
    bricks = np.maximum(np.rint(2 * np.pi * circle / length), 4).astype(np.float32)
    u = np.arctan2(p[0], p[2]) * (bricks[row - base] / np.float32(2 * np.pi))
    if shape == "cylinder":
        flat = ay > 0.8
        u, v = np.where(flat, p[0] / np.float32(length), u), np.where(flat, p[2] / np.float32(height), v)
    return u, v

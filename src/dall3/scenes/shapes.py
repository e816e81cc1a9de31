"""Solids as signed distance functions (Hart, "Sphere Tracing", 1996), with a radius of about 1 and y upwards.

A distance function maps points, float (3, ...), to distances (...), negative inside. It never exceeds the true
distance, so that a ray can step by it safely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import atan2, cos, hypot, pi, sin

import numpy as np
import torch
from torch import Tensor

Distance = Callable[[Tensor], Tensor]
ROUNDING = 0.1


def put(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Create a tensor on the device without synchronizing."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products (...) of vectors (3, ...)."""
    return (a[0] * b[0]).addcmul_(a[1], b[1]).addcmul_(a[2], b[2])


def unit(vectors: Tensor) -> Tensor:
    """Normalize vectors (3, ...)."""
    return vectors * dot(vectors, vectors).rsqrt_()


def smooth_max(a: Tensor, b: Tensor, k: float = ROUNDING) -> Tensor:
    """A smooth maximum with a transition of width k, which rounds the edges of intersections."""
    overlap = (a - b).abs_().neg_().add_(k).clamp_(min=0)
    return torch.maximum(a, b).addcmul_(overlap, overlap, value=0.25 / k)


def smooth_min(a: Tensor, b: Tensor, k: float) -> Tensor:
    return -smooth_max(-a, -b, k)


def length(x: Tensor, y: Tensor) -> Tensor:
    """The length of vectors (x, y)."""
    return (x * x).addcmul_(y, y).sqrt_()


def length3(p: Tensor) -> Tensor:
    return dot(p, p).sqrt_()


def radial(p: Tensor) -> Tensor:
    """The distance of points (3, ...) from the vertical axis."""
    return length(p[0], p[2])


def cube(p: Tensor) -> Tensor:
    x, y, z = p.abs()
    return smooth_max(smooth_max(x, z), y) - 0.72


def sphere(p: Tensor) -> Tensor:
    return length3(p) - 0.9


def cylinder(p: Tensor) -> Tensor:
    return smooth_max(radial(p) - 0.66, p[1].abs() - 0.78)


def cone(p: Tensor) -> Tensor:
    slant = radial(p) * 0.9 + p[1] * 0.4359 - 0.4
    return smooth_max(slant, -0.75 - p[1], 0.06)


def pyramid(p: Tensor) -> Tensor:
    slant = smooth_max(p[0].abs(), p[2].abs(), 0.05) * 0.87 + p[1] * 0.493 - 0.4
    return smooth_max(slant, -0.66 - p[1], 0.05)


def torus(p: Tensor) -> Tensor:
    return length(radial(p) - 0.66, p[1]) - 0.3


def capsule(p: Tensor) -> Tensor:
    y = p[1] - p[1].clamp(-0.55, 0.55)
    return length(radial(p), y) - 0.45


def octahedron(p: Tensor) -> Tensor:
    x, y, z = (p * p).add_(0.0009).sqrt_()
    return (x + y + z - 1.08) * 0.57735


def egg(p: Tensor) -> Tensor:
    return (length(radial(p) * (1 + 0.24 * p[1]), p[1] * 0.74) - 0.7) * 0.8


def star(p: Tensor) -> Tensor:
    # Fold the plane by symmetry to half of one point, whose edge runs from the tip to the notch between two points.
    sector = 2 * pi / 5
    angle = torch.atan2(p[0], p[1])
    angle = (angle - sector * (angle / sector).round_()).abs_()
    edge = length(p[0], p[1]) * (angle - STAR_EDGE_ANGLE).cos_() - STAR_EDGE
    return smooth_max(edge, p[2].abs() - 0.3, 0.06)


_tip, _notch = (0.0, 1.08), (0.5 * sin(pi / 5), 0.5 * cos(pi / 5))
_long = hypot(_notch[0] - _tip[0], _notch[1] - _tip[1])
_across = ((_tip[1] - _notch[1]) / _long, (_notch[0] - _tip[0]) / _long)
STAR_EDGE = _tip[0] * _across[0] + _tip[1] * _across[1]
STAR_EDGE_ANGLE = atan2(_across[0], _across[1])


def box(p: Tensor, middle: tuple[float, float, float], half: tuple[float, float, float], rounding: float) -> Tensor:
    """A box with rounded edges, given by its centre and half sides."""
    x, y, z = ((p[i] - middle[i]).abs_() - (half[i] - rounding) for i in range(3))
    outside = (x.clamp(min=0) ** 2).addcmul_(y.clamp(min=0), y.clamp(min=0)).addcmul_(z.clamp(min=0), z.clamp(min=0))
    return outside.sqrt_() + torch.maximum(torch.maximum(x, y), z).clamp_(max=0) - rounding


def armchair(p: Tensor) -> Tensor:
    # Mirror symmetry: one arm and one pair of legs represent both sides.
    q = torch.stack([p[0].abs(), p[1], p[2]])
    seat = box(q, (0.0, -0.27, 0.06), (0.60, 0.20, 0.56), 0.10)
    back = box(q, (0.0, 0.22, -0.50), (0.62, 0.68, 0.17), 0.16)
    arm = box(q, (0.62, -0.12, 0.02), (0.16, 0.38, 0.60), 0.14)
    legs = smooth_max(length(q[0] - 0.56, (p[2] - 0.03).abs_() - 0.46) - 0.075, (q[1] + 0.62).abs_() - 0.20, 0.03)
    return torch.minimum(torch.minimum(smooth_min(seat, back, 0.06), arm), legs)


def teapot(p: Tensor) -> Tensor:
    body = (length(radial(p), (p[1] + 0.08) * 1.18) - 0.62) * 0.85
    lid = length(radial(p), p[1] - 0.56) - 0.11
    # The spout is a tapered segment.
    x, y = p[0] - 0.42, p[1] + 0.22
    along = ((x * 0.50 + y * 0.58) / (0.50**2 + 0.58**2)).clamp_(0, 1)
    spout = (length(length(x - along * 0.50, y - along * 0.58), p[2]) - (0.16 - 0.085 * along)) * 0.9
    handle = length(length(p[0] + 0.62, p[1] + 0.04) - 0.32, p[2]) - 0.075
    foot = smooth_max(radial(p) - 0.40, (p[1] + 0.56).abs_() - 0.06, 0.04)
    pot = smooth_min(smooth_min(body, spout, 0.12), handle, 0.06)
    return torch.minimum(smooth_min(pot, lid, 0.05), foot)


DISTANCES: dict[str, Distance] = {
    function.__name__: function
    for function in (
        *(cube, sphere, cylinder, cone, pyramid, torus, capsule, octahedron, egg, star),
        *(armchair, teapot),
    )
}
FACETED = ("cube", "pyramid", "octahedron", "star", "armchair")


def normals(distance: Distance, p: Tensor, step: float = 0.004) -> Tensor:
    """Unit normals (3, ...) at points (3, ...) near the surface: the gradient of the distance from four evaluations."""
    total = torch.zeros_like(p)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        moved = torch.stack([p[i] + step * corner[i] for i in range(3)])
        value = distance(moved)
        for i in range(3):
            total[i].add_(value, alpha=corner[i])
    return unit(total)


@cache
def surface_points(shape: str) -> tuple[Tensor, Tensor]:
    """Points (3, 2400) on the surface and their normals. The points, and any prefix of them, are evenly distributed.

    Random points are projected to the surface along the gradient and ordered by farthest-point sampling.
    """
    distance = DISTANCES[shape]
    start = np.random.default_rng(7).uniform(-1.2, 1.2, (3, 9000)).astype(np.float32)
    points = torch.from_numpy(start)
    for _ in range(6):
        points = points - normals(distance, points) * distance(points)
    p = points[:, distance(points).abs() < 0.004].numpy()
    order = np.zeros(2400, int)
    squares = (p * p).sum(0)
    nearest = np.full(p.shape[1], np.inf, np.float32)
    for k in range(1, len(order)):
        last = order[k - 1]
        nearest = np.minimum(nearest, squares + squares[last] - 2 * (p[:, last] @ p))
        order[k] = nearest.argmax()
    chosen = torch.from_numpy(np.ascontiguousarray(p[:, order]))
    return chosen, normals(distance, chosen)


@cache
def bound(shape: str) -> float:
    """The radius of a bounding sphere about the origin."""
    points, _ = surface_points(shape)
    return float(dot(points, points).max().sqrt()) + 0.03


@cache
def top(shape: str) -> float:
    """The height of the solid's highest point."""
    return float(surface_points(shape)[0][1].max())


@cache
def delicacy(shape: str) -> float:
    """A factor for the length of strands on the solid, from 1 for bulky solids to 0.6 for thin ones."""
    p = np.random.default_rng(8).uniform(-1, 1, (3, 4000)).astype(np.float32)
    return float(np.clip(0.3 - float(DISTANCES[shape](torch.from_numpy(p)).min()), 0.6, 1))


@cache
def spaced_points(shape: str, spacing: float, device: torch.device) -> Tensor:
    """Points (3, n) on the whole surface with a minimum distance of `spacing`."""
    points = surface_points(shape)[0][:, : 800 if spacing < 0.3 else 400].numpy()
    count = points.shape[1]
    apart = ((points[:, :, None] - points[:, None]) ** 2).sum(0) + np.triu(np.full((count, count), np.inf, np.float32))
    return torch.from_numpy(np.ascontiguousarray(points[:, apart.min(1) >= spacing * spacing])).to(device)


def nearest_square(centres: Tensor, p: Tensor) -> Tensor:
    """Squared distances (b, k) from points (3, b, k) to the nearest of centres (3, n)."""
    x, y, z = centres[..., None, None]
    # No matrix product: TF32 rounding on a GPU would be visible.
    closeness = (x * p[0]).addcmul_(y, p[1]).addcmul_(z, p[2]).sub_(0.5 * (x * x + y * y + z * z)).amax(0)
    return dot(p, p) - 2 * closeness


LOWEST = 2.0  # upper bound of the extent of a solid below its centre


@cache
def bricks_around(shape: str, height: float, length: float, device: torch.device) -> Tensor:
    """The number of bricks around a round solid in each course, from -LOWEST upwards."""
    points = surface_points(shape)[0]
    rows = torch.floor(points[1] / height).long() + int(LOWEST / height) + 1
    courses = 2 * int(LOWEST / height) + 3
    total = torch.bincount(rows, radial(points), courses) / torch.bincount(rows, minlength=courses).clamp(min=1)
    return (2 * pi * total / length).round_().clamp_(min=4).float().to(device)


def courses(shape: str, p: Tensor, n: Tensor, height: float, length: float) -> tuple[Tensor, Tensor]:
    """Brick coordinates (u, v) of points for bricks of the given height and length. Joints are at integers.

    Flat faces use coordinates in their plane. Round solids use angles, with an integer number of bricks per course.
    """
    if shape == "torus":
        turn, tube = torch.atan2(p[0], p[2]), torch.atan2(p[1], radial(p) - 0.66)
        return turn * (round(4.1 / length) / (2 * pi)), tube * (round(1.9 / height) / (2 * pi))
    if shape == "octahedron":
        return (p[0] * p[2].sign() - p[2] * p[0].sign()) / (1.414 * length), p[1] / height
    ax, ay, az = n.abs()
    if shape in FACETED:
        along_x = torch.where(ax > az, p[2], p[0])
        flat = (ay > ax) & (ay > az) if shape != "pyramid" else n[1] < -0.8
        return torch.where(flat, p[0], along_x) / length, torch.where(flat, p[2], p[1]) / height
    v = p[1] / height
    bricks = bricks_around(shape, height, length, p.device)
    row = (v.floor().long() + int(LOWEST / height) + 1).clamp_(0, len(bricks) - 1)
    u = torch.atan2(p[0], p[2]) * (bricks[row] / (2 * pi))
    if shape == "cylinder":
        flat = ay > 0.8
        u, v = torch.where(flat, p[0] / length, u), torch.where(flat, p[2] / height, v)
    return u, v

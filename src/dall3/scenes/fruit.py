"""Fruit materials: solids that look cut from a fruit, with a rim of skin, flesh, and a stone or seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from dall3.scenes.backdrop import light, mix, smooth_step
from dall3.scenes.lighting import Look, Surface, bend
from dall3.scenes.noise import fractal, look_up, walls
from dall3.scenes.shapes import dot, nearest_square, spaced_points, top


def paint(under: Tensor, colour: tuple[int, int, int], share: Tensor) -> Tensor:
    """Blend an 8-bit colour over light (3, b, k) with opacity `share` (b, k)."""
    return under + (light(colour, share.device) - under) * share


def rim(s: Surface) -> Tensor:
    """The distance of points (b, k) from the visible outline, estimated from the solid's thickness behind them."""
    return s.thickness(s.view)


def avocado(s: Surface) -> Look:
    p = s.shifted()
    grain = look_up((fractal, (3, 16, 1.0, 1, True)), p, 0.9)
    inside = rim(s) + 0.03 * grain[0]
    skin = mix((26, 44, 20), (62, 86, 34), (0.4 + 0.3 * grain[0]).clamp_(0, 1))
    flesh = mix((150, 186, 62), (240, 228, 130), smooth_step(0.30, 0.75, inside))
    cut = smooth_step(0.20, 0.26, inside)
    # The stone is a ball in front of the solid's centre, in view coordinates.
    across, upwards = dot(s.camera.right, s.p), dot(s.camera.up, s.p) + 0.12
    off = (across * across).addcmul_(upwards, upwards) * (1 / 0.30**2)
    stone = smooth_step(1.05, 0.92, off) * cut
    ball = (1 - off).clamp_(min=0).sqrt_()
    n = s.camera.right * across + s.camera.up * upwards
    facing = n * (1 / 0.30) - s.camera.forward * ball
    normal = bend(s.n, grain[1:] * (1 - cut), 0.012)
    normal = normal + (facing - normal) * stone
    albedo = skin + (flesh - skin) * cut
    albedo = paint(albedo, (176, 168, 70), smooth_step(1.45, 1.2, off) * cut)
    albedo = paint(albedo, (126, 70, 30), stone)
    normal = normal / dot(normal, normal).sqrt().clamp_(min=1e-3)
    return Look(albedo, normal, specular=0.25, gloss=30)


def seeds(s: Surface, spacing: float) -> Tensor:
    """Squared distances (b, k) to the nearest seed."""
    return s.by_shape(lambda shape, run: nearest_square(spaced_points(shape, spacing, s.p.device), s.p[:, run]))


def strawberry(s: Surface) -> Look:
    square = seeds(s, 0.24)
    dimple = smooth_step(0.0085, 0.0015, square)
    blush = look_up((fractal, (1, 8, 1.6)), s.shifted(), 0.4)[0]
    albedo = mix((206, 18, 30), (236, 54, 44), (0.5 + 0.3 * blush).clamp_(0, 1)) * (1 - 0.45 * dimple)
    albedo = paint(albedo, (250, 214, 110), smooth_step(0.0022, 0.0014, square))
    # Leaves cover the top, with a jagged edge.
    heights = s.by_shape(lambda shape, run: s.p[1, run] / top(shape))
    turn = torch.atan2(s.p[0], s.p[2]) * (9 / 6.2831853)
    points = (turn - turn.floor() - 0.5).abs() * 0.5
    leaf = smooth_step(-0.02, 0.02, heights - 0.62 - points)
    green = mix((34, 92, 26), (96, 166, 54), (0.5 + 0.4 * blush).clamp_(0, 1))
    return Look(albedo + (green - albedo) * leaf, specular=0.45 * (1 - leaf), gloss=35, mirror=0.25)


def watermelon(s: Surface) -> Look:
    wall = look_up((walls, (10,)), s.shifted(), 0.4)[0]
    inside = rim(s)
    grain = look_up((fractal, (3, 24, 0.9)), s.shifted(), 0.7)[0]
    albedo = mix((18, 84, 34), (86, 160, 70), smooth_step(0.05, 0.12, wall))
    albedo = paint(albedo, (226, 240, 196), smooth_step(0.17, 0.21, inside))
    red = mix((222, 40, 52), (244, 92, 92), (0.5 + 0.3 * grain).clamp_(0, 1))
    albedo = albedo + (red - albedo) * smooth_step(0.28, 0.36, inside)
    albedo = paint(albedo, (34, 22, 20), smooth_step(0.0042, 0.0030, seeds(s, 0.27)) * smooth_step(0.34, 0.42, inside))
    return Look(albedo, specular=0.3, gloss=40, mirror=0.15)

"""Materials: functions from surface points to their appearance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import pi

import numpy as np
import torch
from torch import Tensor

from dall3.scenes.backdrop import lerp, light, linear, mix, smooth_step
from dall3.scenes.fruit import avocado, strawberry, watermelon
from dall3.scenes.lighting import Look, Surface, bend
from dall3.scenes.noise import fractal, look_up, walls
from dall3.scenes.scene import COLOURS, Scene
from dall3.scenes.shapes import courses, dot, nearest_square, spaced_points, unit


def plain(name: str) -> Callable[[Surface], Look]:
    """The material of a plain colour."""

    def look(surface: Surface) -> Look:
        return Look(light(COLOURS[name], surface.p.device), specular=0.25, gloss=40, mirror=0.5)

    return look


@cache
def water_absorbs(device: torch.device) -> Tensor:
    """Absorption of light in water per unit of length, (3, 1, 1)."""
    return torch.tensor([2.8, 0.9, 0.35], device=device).reshape(3, 1, 1)


def water(s: Surface) -> Look:
    p = s.shifted()
    ripple = look_up((fractal, (2, 9, 2.0, 1, True)), p, 0.3)
    n = bend(s.n, ripple[1:], 0.04)
    inwards = unit(s.view - n * 0.4)
    depth = s.thickness(inwards)
    seen = s.seen_behind(s.p + inwards * (depth + 0.8))
    absorbed = torch.exp(-depth * water_absorbs(s.p.device))
    scattered = light((8, 122, 214), s.p.device) * (1 - torch.exp(-2 * depth)) * (0.5 + 0.35 * dot(s.camera.light, n))
    web = look_up((fractal, (2, 6, 1.6, 3)), p + inwards * (0.6 * depth), 0.26)[0]
    caustics = (1 - torch.abs(web) * 1.1).clamp(min=0) ** 3
    glow = seen * absorbed * 0.85 + scattered + light((110, 225, 255), s.p.device) * (0.3 * caustics)
    return Look(torch.full((3, 1, 1), 0.01, device=s.p.device), n, specular=2.0, gloss=150, mirror=1.3, glow=glow)


def ice(s: Surface) -> Look:
    p = s.shifted()
    wall = look_up((walls, (5,)), p, 0.30)
    n = bend(s.n, wall[1:], 0.05)
    inwards = unit(s.view - n * 0.3)
    depth = s.thickness(inwards)
    deep = look_up((walls, (5,)), p + inwards * 0.25, 0.36)[0]
    frost = look_up((fractal, (2, 20, 1.3)), p + inwards * 0.2, 0.5)[0]
    cracks = (1 - wall[0] / 0.035).clamp(min=0) + 0.4 * (1 - deep / 0.05).clamp(min=0)
    core = 0.75 * smooth_step(0.2, 1.5, depth + 0.3 * frost)
    albedo = mix((120, 190, 226), (232, 246, 252), torch.clamp(core + cracks, 0, 1))
    seen = s.seen_behind(s.p + inwards * (depth + 0.6)) * light((205, 238, 255), s.p.device)
    clear = 0.6 * (1 - torch.clamp(core + cracks, 0, 1))
    return Look(albedo * (1 - clear) * 1.05, n, specular=1.6, gloss=90, mirror=1.5, glow=seen * clear + 0.25 * cracks)


def gold(s: Surface) -> Look:
    p = s.shifted()
    dents = look_up((fractal, (2, 6, 1.5, 1, True)), p, 0.35)
    n = bend(s.n, dents[1:], 0.016)
    return Look(
        light((190, 120, 20), s.p.device) * 0.4,
        n,
        specular=light((255, 225, 140), s.p.device) * 1.2,
        gloss=70,
        mirror=0.95,
        tint=light((255, 196, 66), s.p.device),
    )


def wood(s: Surface) -> Look:
    p = s.shifted()
    centre = s.details[3:5]
    warp = look_up((fractal, (1, 6, 2)), p, (0.35, 0.1, 0.35))[0]
    x, z = s.p[0] - centre[0] + s.p[1] * 0.12, s.p[2] - centre[1] - 0.9
    ring = torch.sqrt(x * x + z * z) * 6 + warp * 0.35
    phase = ring - torch.floor(ring)
    late = smooth_step(0.35, 0.9, phase) * smooth_step(1.0, 0.9, phase)
    fibre = look_up((fractal, (2, 24, 0.8)), p, (1.3, 0.1, 1.3))[0]
    albedo = mix((206, 150, 88), (122, 70, 30), torch.clamp(0.85 * late + 0.16 * fibre, 0, 1))
    return Look(albedo, specular=0.12, gloss=25)


def lay_courses(s: Surface, height: float, length: float) -> Tensor:
    """The brick coordinates of `courses` for a surface, (2, b, k)."""
    return s.by_shape(lambda shape, run: torch.stack(courses(shape, s.p[:, run], s.n[:, run], height, length)))


def brick(s: Surface) -> Look:
    u, v = lay_courses(s, 0.2, 0.46)
    row = torch.floor(v)
    u += 0.5 * (row % 2)
    column = torch.floor(u)
    across, along = torch.abs(v - row - 0.5), torch.abs(u - column - 0.5)
    joint = torch.maximum(smooth_step(0.39, 0.45, across), smooth_step(0.445, 0.475, along))
    tone = torch.sin(row * 12.9898 + column * 78.233) * 43758.5453
    tone = tone - torch.floor(tone)
    grain = look_up((fractal, (3, 24, 0.8, 1, True)), s.shifted(), 0.7)
    albedo = mix((176, 66, 42), (120, 42, 32), torch.clamp(0.8 * tone + 0.15 * grain[0], 0, 1))
    mortar = light((205, 198, 186), s.p.device)
    return Look(albedo + (mortar - albedo) * joint, bend(s.n, grain[1:], 0.006), specular=0.03)


def marble(s: Surface) -> Look:
    p = s.shifted()
    warp = look_up((fractal, (1, 12, 1.8, 1, True)), p, 0.3)
    fine = look_up((fractal, (1, 20, 1.6, 5)), p + warp[1:] * 0.012, 0.36)[0]
    broad = (1 - torch.abs(warp[0] + 0.3 * fine) * 3.2).clamp(min=0)
    thin = (1 - torch.abs(fine - 0.5) * 6).clamp(min=0)
    veins = torch.clamp(0.35 * broad + 0.6 * broad**3 + 0.5 * thin, 0, 1)
    return Look(mix((240, 238, 234), (74, 78, 90), veins) * 0.95, specular=0.5, gloss=90, mirror=0.9)


def lava(s: Surface) -> Look:
    p = s.shifted()
    warp = look_up((fractal, (2, 12, 1.6, 1, True)), p, 0.4)
    wall = look_up((walls, (5,)), p + warp[1:] * 0.005, 0.22)
    heat = torch.exp(-wall[0] * 24) * (1.1 + 0.35 * warp[0])
    glow = torch.stack([1.5 * heat, 0.75 * heat**2, 0.3 * heat**5])
    albedo = mix((34, 27, 27), (84, 70, 66), torch.clamp(0.5 + 0.4 * warp[0], 0, 1))
    return Look(albedo, bend(s.n, warp[1:] - 3 * wall[1:], 0.012), specular=0.15, glow=(glow).clamp(min=0))


def leather(s: Surface) -> Look:
    p = s.shifted()
    wall = look_up((walls, (10,)), p, 0.96)
    worn = look_up((fractal, (1, 8, 1.8)), p, 0.4)[0]
    pebble = smooth_step(0.0, 0.14, wall[0])
    albedo = mix((84, 42, 20), (150, 86, 44), torch.clamp(0.25 + pebble * 0.45 + 0.22 * worn, 0, 1))
    seam = torch.minimum(torch.abs(s.p[0]), torch.abs(s.p[2]))
    run = (s.p[1] + 0.8 * s.p[2] + 0.8 * s.p[0]) * 8
    dashes = smooth_step(0.36, 0.30, torch.abs(run - torch.floor(run) - 0.5))
    thread = smooth_step(0.034, 0.022, torch.abs(seam - 0.085)) * dashes
    albedo = albedo * (1 - 0.85 * smooth_step(0.035, 0.012, seam))
    albedo += (light((240, 212, 160), s.p.device) - albedo) * thread
    return Look(albedo, bend(s.n, -wall[1:], 0.012), specular=0.4, gloss=16)


def wool(s: Surface) -> Look:
    u, v = lay_courses(s, 0.19, 0.27)
    aside = torch.abs(u - torch.floor(u) - 0.5)
    rise = v - 1.5 * aside
    along = rise - torch.floor(rise)
    leg = (1 - 16 * (aside - 0.25) ** 2).clamp(min=0) * (1 - (2 * along - 1) ** 2).clamp(min=0)
    twist = 0.08 * torch.sin(2 * pi * (4 * aside + 3 * along))
    yarn = torch.clamp(torch.sqrt(leg) + twist, 0, 1)
    return Look(mix((150, 106, 70), (255, 238, 206), yarn), specular=0.0)


PATTERN_COLOURS = (
    ((222, 52, 60), (248, 244, 236)),
    ((46, 98, 200), (248, 244, 236)),
    ((40, 150, 104), (250, 240, 214)),
    ((240, 132, 170), (250, 246, 240)),
    ((112, 62, 160), (250, 236, 200)),
    ((36, 44, 66), (246, 214, 90)),
)


def polka_dots(s: Surface) -> Look:
    square = s.by_shape(lambda shape, run: nearest_square(spaced_points(shape, 0.36, s.p.device), s.p[:, run]))
    return Look(
        lerp(s.details[4:7], s.details[7:10], smooth_step(0.0155, 0.0125, square)), specular=0.2, gloss=40, mirror=0.4
    )


def stripes(s: Surface) -> Look:
    band = dot(s.details[:3], s.p) * 3.2 + s.details[3]
    edge = smooth_step(0.235, 0.265, torch.abs(band - torch.floor(band) - 0.5))
    return Look(lerp(s.details[4:7], s.details[7:10], edge), specular=0.2, gloss=40, mirror=0.4)


def soil(dark: tuple[int, int, int], pale: tuple[int, int, int]) -> Callable[[Surface], Look]:
    """The ground between strands, for porcupine and grass."""

    def look(s: Surface) -> Look:
        grain = look_up((fractal, (3, 24, 0.8)), s.shifted(), 0.7)[0]
        return Look(mix(dark, pale, torch.clamp(0.5 + 0.3 * grain, 0, 1)), specular=0.0)

    return look


LOOKS: dict[str, Callable[[Surface], Look]] = {
    "water": water,
    "ice": ice,
    "gold": gold,
    "avocado": avocado,
    "strawberry": strawberry,
    "watermelon": watermelon,
    "wood": wood,
    "brick": brick,
    "marble": marble,
    "lava": lava,
    "leather": leather,
    "polka dots": polka_dots,
    "stripes": stripes,
    "porcupine": soil((40, 28, 20), (74, 56, 42)),
    "grass": soil((24, 52, 14), (44, 84, 22)),
    "wool": wool,
    **{name: plain(name) for name in COLOURS},
}

NUMBERS = 10  # random numbers of a scene


def details(scene: Scene) -> list[float]:
    """The random numbers of a scene, from its seed: the offset into the noise (3), then those of its material.

    Wood: the centre of the rings (2). Stripes: the axis (3, in place of the offset), the phase, the two colours. Polka
    dots: the two colours.
    """
    rng = np.random.default_rng(scene.seed)
    numbers = [0.0] * NUMBERS
    if scene.material in ("stripes", "polka dots"):
        for k, colour in enumerate(PATTERN_COLOURS[rng.integers(len(PATTERN_COLOURS))]):
            numbers[4 + 3 * k : 7 + 3 * k] = linear(colour).tolist()
        if scene.material == "stripes":
            tilt = rng.uniform(0.35, 0.55, 2) * rng.choice([-1, 1], 2)
            axis = np.array([tilt[0], 1, tilt[1]])
            numbers[:4] = [*(axis / np.sqrt(axis @ axis)).tolist(), rng.random()]
    else:
        numbers[:3] = (rng.random(3, np.float32) * 8).tolist()
        if scene.material == "wood":
            numbers[3:5] = rng.uniform(-0.5, 0.5, 2).tolist()
    return numbers

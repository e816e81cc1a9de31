"""What the solids are made of: each material looks at points of a surface and says how they take the light."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dall3.scenes.backdrop import linear, smooth_step
from dall3.scenes.lighting import Look, Surface, bend
from dall3.scenes.noise import Array, cells, fractal, look_up
from dall3.scenes.scene import COLOURS
from dall3.scenes.shapes import courses, spaced_points, unit


def mix(a: tuple[int, int, int], b: tuple[int, int, int], t: Array) -> Array:
    """Colours (3, n) from a to b, each 0..255, as t (n,) goes from 0 to 1."""
    start = linear(a)[:, None]
    return start + (linear(b)[:, None] - start) * t


def shifted(surface: Surface) -> Array:
    """The points moved by the scene's own random vector: where they look into a noise."""
    return surface.p + surface.rng.random((3, 1), np.float32) * 8


def plain(name: str) -> Callable[[Surface], Look]:
    def look(surface: Surface) -> Look:
        return Look(linear(COLOURS[name])[:, None], specular=0.25, gloss=40, mirror=0.5)

    return look


def water(s: Surface) -> Look:
    p = shifted(s)
    ripple = look_up(fractal(2, 9, 2.0, slopes=True), p, 0.3)
    n = bend(s.n, ripple[1:], 0.04)
    inwards = unit(s.view - n * np.float32(0.4))
    depth = s.thickness(inwards)
    seen = s.seen_behind(s.p + inwards * (depth + 0.8))
    absorbed = np.exp(-depth * np.array([[2.8], [0.9], [0.35]], np.float32))
    scattered = linear((8, 122, 214))[:, None] * (1 - np.exp(-2 * depth)) * (0.5 + 0.35 * (s.camera.light @ n))
    web = look_up(fractal(2, 6, 1.6, 3), p + inwards * (0.6 * depth), 0.26)[0]
    caustics = np.maximum(1 - np.abs(web) * 1.1, 0) ** 3
    glow = seen * absorbed * 0.85 + scattered + linear((110, 225, 255))[:, None] * (0.3 * caustics)
    return Look(np.full((3, 1), 0.01, np.float32), n, specular=2.0, gloss=150, mirror=1.3, glow=glow)


def ice(s: Surface) -> Look:
    p = shifted(s)
    wall = look_up(cells(5)[0], p, 0.30)
    n = bend(s.n, wall[1:], 0.05)
    inwards = unit(s.view - n * np.float32(0.3))
    depth = s.thickness(inwards)
    deep = look_up(cells(5)[0], p + inwards * 0.25, 0.36)[0]
    frost = look_up(fractal(2, 20, 1.3), p + inwards * 0.2, 0.5)[0]
    cracks = np.maximum(1 - wall[0] / np.float32(0.035), 0) + 0.4 * np.maximum(1 - deep / np.float32(0.05), 0)
    core = 0.75 * smooth_step(0.2, 1.5, depth + 0.3 * frost)
    albedo = mix((120, 190, 226), (232, 246, 252), np.clip(core + cracks, 0, 1))
    seen = s.seen_behind(s.p + inwards * (depth + 0.6)) * linear((205, 238, 255))[:, None]
    clear = 0.6 * (1 - np.clip(core + cracks, 0, 1))
    return Look(albedo * (1 - clear) * 1.05, n, specular=1.6, gloss=90, mirror=1.5, glow=seen * clear + 0.25 * cracks)


def gold(s: Surface) -> Look:
    p = shifted(s)
    dents = look_up(fractal(2, 6, 1.5, slopes=True), p, 0.35)
    n = bend(s.n, dents[1:], 0.016)
    return Look(
        linear((190, 120, 20))[:, None] * 0.4,
        n,
        specular=linear((255, 225, 140))[:, None] * 1.2,
        gloss=70,
        mirror=0.95,
        tint=linear((255, 196, 66))[:, None],
    )


def wood(s: Surface) -> Look:
    p = shifted(s)
    centre = s.rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    warp = look_up(fractal(1, 6, 2), p, (0.35, 0.1, 0.35))[0]
    x, z = s.p[0] - centre[0] + s.p[1] * np.float32(0.12), s.p[2] - centre[1] - 0.9
    ring = np.sqrt(x * x + z * z) * 6 + warp * np.float32(0.35)
    phase = ring - np.floor(ring)
    late = smooth_step(0.35, 0.9, phase) * smooth_step(1.0, 0.9, phase)
    fibre = look_up(fractal(2, 24, 0.8), p, (1.3, 0.1, 1.3))[0]
    albedo = mix((206, 150, 88), (122, 70, 30), np.clip(0.85 * late + 0.16 * fibre, 0, 1))
    return Look(albedo, specular=0.12, gloss=25)


def brick(s: Surface) -> Look:
    u, v = courses(s.shape, s.p, s.n, 0.2, 0.46)
    row = np.floor(v)
    u += np.float32(0.5) * (row % 2)
    column = np.floor(u)
    across, along = np.abs(v - row - 0.5), np.abs(u - column - 0.5)
    joint = np.maximum(smooth_step(0.39, 0.45, across), smooth_step(0.445, 0.475, along))
    tone = np.sin(row * 12.9898 + column * 78.233) * 43758.5453
    tone = (tone - np.floor(tone)).astype(np.float32)
    grain = look_up(fractal(3, 24, 0.8, slopes=True), shifted(s), 0.7)
    albedo = mix((176, 66, 42), (120, 42, 32), np.clip(0.8 * tone + 0.15 * grain[0], 0, 1))
    mortar = linear((205, 198, 186))[:, None]
    return Look(albedo + (mortar - albedo) * joint, bend(s.n, grain[1:], 0.006), specular=0.03)


def marble(s: Surface) -> Look:
    p = shifted(s)
    warp = look_up(fractal(1, 12, 1.8, slopes=True), p, 0.3)
    fine = look_up(fractal(1, 20, 1.6, 5), p + warp[1:] * np.float32(0.012), 0.36)[0]
    broad = np.maximum(1 - np.abs(warp[0] + 0.3 * fine) * 3.2, 0)
    thin = np.maximum(1 - np.abs(fine - 0.5) * 6, 0)
    veins = np.clip(0.35 * broad + 0.6 * broad**3 + 0.5 * thin, 0, 1)
    return Look(mix((240, 238, 234), (74, 78, 90), veins) * 0.95, specular=0.5, gloss=90, mirror=0.9)


def lava(s: Surface) -> Look:
    p = shifted(s)
    warp = look_up(fractal(2, 12, 1.6, slopes=True), p, 0.4)
    wall = look_up(cells(5)[0], p + warp[1:] * np.float32(0.005), 0.22)
    heat = np.exp(-wall[0] * 24) * (1.1 + 0.35 * warp[0])
    glow = np.stack([1.5 * heat, 0.75 * heat**2, 0.3 * heat**5])
    albedo = mix((34, 27, 27), (84, 70, 66), np.clip(0.5 + 0.4 * warp[0], 0, 1))
    return Look(albedo, bend(s.n, warp[1:] - 3 * wall[1:], 0.012), specular=0.15, glow=np.maximum(glow, 0))


def leather(s: Surface) -> Look:
    p = shifted(s)
    wall = look_up(cells(10)[0], p, 0.96)
    worn = look_up(fractal(1, 8, 1.8), p, 0.4)[0]
    pebble = smooth_step(0.0, 0.14, wall[0])
    albedo = mix((84, 42, 20), (150, 86, 44), np.clip(0.25 + pebble * 0.45 + 0.22 * worn, 0, 1))
    seam = np.minimum(np.abs(s.p[0]), np.abs(s.p[2]))
    run = (s.p[1] + 0.8 * s.p[2] + 0.8 * s.p[0]) * 8
    dashes = smooth_step(0.36, 0.30, np.abs(run - np.floor(run) - 0.5))
    thread = smooth_step(0.034, 0.022, np.abs(seam - 0.085)) * dashes
    albedo = albedo * (1 - 0.85 * smooth_step(0.035, 0.012, seam))
    albedo += (linear((240, 212, 160))[:, None] - albedo) * thread
    return Look(albedo, bend(s.n, -wall[1:], 0.012), specular=0.4, gloss=16)


def wool(s: Surface) -> Look:
    u, v = courses(s.shape, s.p, s.n, 0.19, 0.27)
    aside = np.abs(u - np.floor(u) - 0.5)
    rise = v - 1.5 * aside
    along = rise - np.floor(rise)
    leg = np.maximum(1 - 16 * (aside - 0.25) ** 2, 0) * np.maximum(1 - (2 * along - 1) ** 2, 0)
    twist = 0.08 * np.sin(2 * np.pi * (4 * aside + 3 * along))
    yarn = np.clip(np.sqrt(leg) + twist, 0, 1)
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
    cloth, dot = PATTERN_COLOURS[s.rng.integers(len(PATTERN_COLOURS))]
    centres = spaced_points(s.shape, 0.36)
    closeness = (centres.T @ s.p - 0.5 * (centres * centres).sum(0)[:, None]).max(0)
    square = (s.p * s.p).sum(0) - 2 * closeness
    return Look(mix(cloth, dot, smooth_step(0.0155, 0.0125, square)), specular=0.2, gloss=40, mirror=0.4)


def stripes(s: Surface) -> Look:
    dark, pale = PATTERN_COLOURS[s.rng.integers(len(PATTERN_COLOURS))]
    tilt = s.rng.uniform(0.35, 0.55, 2) * s.rng.choice([-1, 1], 2)
    axis = unit(np.array([tilt[0], 1, tilt[1]], np.float32))
    band = axis @ s.p * np.float32(3.2) + np.float32(s.rng.random())
    edge = smooth_step(0.235, 0.265, np.abs(band - np.floor(band) - 0.5))
    return Look(mix(dark, pale, edge), specular=0.2, gloss=40, mirror=0.4)


def soil(dark: tuple[int, int, int], pale: tuple[int, int, int]) -> Callable[[Surface], Look]:
    """What shows between the strands of porcupine and grass."""

    def look(s: Surface) -> Look:
        grain = look_up(fractal(3, 24, 0.8), shifted(s), 0.7)[0]
        return Look(mix(dark, pale, np.clip(0.5 + 0.3 * grain, 0, 1)), specular=0.0)

    return look


LOOKS: dict[str, Callable[[Surface], Look]] = {
    "water": water,
    "ice": ice,
    "gold": gold,
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

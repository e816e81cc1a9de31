"""The vocabulary of the rendered scenes, and `Scene`, the description of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import numpy as np

SHAPES = (
    *("cube", "sphere", "cylinder", "cone", "pyramid", "torus", "capsule", "octahedron", "egg", "star"),
    *("armchair", "teapot"),
)
FRUIT = ("avocado", "strawberry", "watermelon")
TEXTURES = (
    *("cloud", "water", "porcupine", "wood", "brick", "grass", "gold"),
    *("marble", "ice", "lava", "wool", "leather", "polka dots", "stripes"),
    *FRUIT,
)
COLOURS = {
    "red": (212, 34, 34),
    "orange": (246, 124, 18),
    "yellow": (250, 216, 30),
    "green": (36, 150, 62),
    "blue": (30, 82, 206),
    "purple": (126, 48, 172),
    "white": (244, 244, 242),
    "black": (30, 30, 34),
}
MATERIALS = TEXTURES + tuple(COLOURS)
BACKGROUNDS = {
    "white": (240, 239, 235),
    "grey": (146, 149, 153),
    "black": (36, 36, 40),
    "red": (190, 74, 68),
    "yellow": (234, 200, 96),
    "green": (94, 166, 100),
    "blue": (92, 138, 194),
    "pink": (236, 172, 188),
}
SIZES = ("small", "medium", "large")

# Colours that are hard to tell apart from these backgrounds. A colour is also excluded on a background of its own name.
CONFUSABLE = {"orange": ("red", "yellow"), "purple": ("blue",), "red": ("pink",)}


@dataclass(frozen=True)
class Pose:
    """Ranges of angles, (low, high) in degrees, at which a shape is recognizable."""

    azimuth: tuple[float, float] = (0, 360)
    elevation: tuple[float, float] = (16, 34)
    lean: tuple[float, float] = (0, 0)
    roll: tuple[float, float] = (0, 0)


POSES = {
    "cube": Pose(azimuth=(20, 70), elevation=(20, 36)),
    "sphere": Pose(roll=(-30, 30)),
    "cylinder": Pose(elevation=(20, 36)),
    "cone": Pose(elevation=(10, 24)),
    "pyramid": Pose(azimuth=(18, 72), elevation=(10, 26)),
    "torus": Pose(azimuth=(-35, 35), elevation=(12, 28), lean=(48, 80)),
    "capsule": Pose(elevation=(12, 30), roll=(20, 75)),
    "octahedron": Pose(azimuth=(15, 75), elevation=(10, 24)),
    "egg": Pose(elevation=(10, 28), roll=(-22, 22)),
    "star": Pose(azimuth=(-30, 30), elevation=(8, 22), roll=(-18, 18)),
    "armchair": Pose(azimuth=(-45, 45), elevation=(14, 28)),
    "teapot": Pose(azimuth=(-35, 35), elevation=(10, 26)),
}


@dataclass(frozen=True)
class Scene:
    """One object on a ground plane in front of a background. Angles are in degrees.

    lean, roll, azimuth: rotations of the object, applied in this order: towards the viewer, in the image plane, about
    the vertical. elevation: of the camera. light_azimuth, light_elevation: direction of the light; the azimuth is
    measured from the camera to the right. offset: of the object's centre from the image's, (right, down) relative to
    the image. seed: random seed of the texture.

    Raises ValueError for a name outside the vocabulary.
    """

    shape: str
    material: str
    background: str = "white"
    size: str = "medium"
    azimuth: float = 35.0
    elevation: float = 24.0
    lean: float = 0.0
    roll: float = 0.0
    light_azimuth: float = -40.0
    light_elevation: float = 48.0
    offset: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_names(self.shape, self.material, self.background, self.size)


def check_names(
    shape: str | None = None, material: str | None = None, background: str | None = None, size: str | None = None
) -> None:
    """Raise ValueError for a name outside the vocabulary. None is accepted."""
    kinds: tuple[tuple[str, str | None, Iterable[str]], ...] = (
        ("shape", shape, SHAPES),
        ("material", material, MATERIALS),
        ("background", background, BACKGROUNDS),
        ("size", size, SIZES),
    )
    for kind, name, names in kinds:
        if name is not None and name not in names:
            raise ValueError(f"unknown {kind} {name!r}; expected one of {', '.join(names)}")


def is_held_out(first: str, second: str) -> bool:
    """Whether a pair of names, such as (shape, material), is held out from training. About one in eight is."""
    return crc32(f"{first}/{second}".encode()) % 8 == 0


def is_visible(material: str, background: str) -> bool:
    """Whether an object of the material stands out from the background."""
    same = material in COLOURS and material == background
    return not same and background not in CONFUSABLE.get(material, ())


@cache
def choices(
    shape: str | None, material: str | None, background: str | None, held_out: bool | None
) -> list[tuple[str, str, str]]:
    """All combinations (shape, material, background) that `random_scene` chooses from."""
    return [
        (s, m, b)
        for s in ([shape] if shape else SHAPES)
        for m in ([material] if material else MATERIALS)
        for b in ([background] if background else BACKGROUNDS)
        if held_out in (None, is_held_out(s, m)) and is_visible(m, b)
    ]


def random_scene(
    rng: np.random.Generator,
    shape: str | None = None,
    material: str | None = None,
    background: str | None = None,
    size: str | None = None,
    held_out: bool | None = False,
) -> Scene:
    """A random scene with the given names.

    held_out: False excludes the held-out (shape, material) pairs, True uses only those, None uses all.
    Raises ValueError for an unknown name, or if no scene has the given names.
    """
    check_names(shape, material, background, size)
    triples = choices(shape, material, background, held_out)
    if not triples:
        asked = f"shape={shape}, material={material}, background={background}, held_out={held_out}"
        raise ValueError(f"no scene has {asked}: the pair is held out or not, or the object would not be seen")
    shape, material, background = triples[rng.integers(len(triples))]
    size = size or SIZES[rng.integers(len(SIZES))]
    pose = POSES[shape]
    slack = {"small": 0.11, "medium": 0.08, "large": 0.04}[size]
    return Scene(
        shape,
        material,
        background,
        size,
        azimuth=float(rng.uniform(*pose.azimuth)),
        elevation=float(rng.uniform(*pose.elevation)),
        lean=float(rng.uniform(*pose.lean)),
        roll=float(rng.uniform(*pose.roll)),
        light_azimuth=float(rng.choice([-1, 1]) * rng.uniform(25, 65)),
        light_elevation=float(rng.uniform(38, 62)),
        offset=(float(rng.uniform(-slack, slack)), float(rng.uniform(-slack, slack))),
        seed=int(rng.integers(2**31)),
    )

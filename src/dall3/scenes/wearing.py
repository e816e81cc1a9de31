"""Emoji that wear glasses, hats and crowns, composited from the drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dall3.scenes.captions import with_articles
from dall3.scenes.composite import Layer
from dall3.scenes.emoji import GRID, WIDTHS, Emoji, random_background, random_placement
from dall3.scenes.scene import is_held_out


@dataclass(frozen=True)
class Head:
    """The geometry of a face.

    eyes, brow: heights of the eyes and of the lower edge of a hat, relative to the drawing's height, from the top.
    glasses, hat: widths of glasses and hats, relative to the drawing's width.
    """

    eyes: float
    glasses: float
    brow: float
    hat: float


SMILEY = Head(eyes=0.33, glasses=0.78, brow=0.20, hat=0.66)
PERSON = Head(eyes=0.50, glasses=0.66, brow=0.34, hat=0.74)
HEADS = {
    **dict.fromkeys(
        (
            *("grinning face", "grinning face with big eyes", "slightly smiling face", "neutral face"),
            *("expressionless face", "kissing face", "confused face", "hushed face", "frowning face"),
            *("smiling face with smiling eyes", "face without mouth", "flushed face"),
        ),
        SMILEY,
    ),
    **dict.fromkeys(
        (
            *("child", "boy", "girl", "man", "woman", "person", "older person", "old man", "old woman"),
            *("man: beard", "man: red hair", "woman: red hair", "man: white hair", "woman: white hair"),
            *("man: blond hair", "woman: blond hair", "man: curly hair", "woman: curly hair"),
        ),
        PERSON,
    ),
    "baby": Head(0.55, 0.60, 0.36, 0.66),
    "dog face": Head(0.38, 0.62, 0.16, 0.56),
    "cat face": Head(0.58, 0.66, 0.42, 0.62),
    "bear": Head(0.42, 0.56, 0.26, 0.66),
    "panda": Head(0.42, 0.62, 0.24, 0.64),
    "koala": Head(0.42, 0.56, 0.26, 0.66),
    "tiger face": Head(0.40, 0.60, 0.20, 0.60),
    "lion": Head(0.42, 0.58, 0.24, 0.62),
    "rabbit face": Head(0.58, 0.60, 0.44, 0.56),
    "fox": Head(0.54, 0.56, 0.40, 0.56),
    "pig face": Head(0.44, 0.62, 0.26, 0.66),
    "monkey face": Head(0.38, 0.56, 0.22, 0.62),
    "robot": Head(0.38, 0.66, 0.20, 0.62),
    "alien": Head(0.42, 0.74, 0.22, 0.66),
}


@dataclass(frozen=True)
class Thing:
    """Something to wear.

    emoji: name of its drawing. words: its names in captions. across: its width relative to the drawing. down: height of
    its middle (glasses) or lower edge (hats) relative to the drawing, from the top. hat: whether it is a hat. forms:
    captions, with {f} for the face and {t} for the thing.
    """

    emoji: str
    words: tuple[str, ...]
    across: float
    down: float
    hat: bool
    forms: tuple[str, ...]


ON_EYES = ("a {f} wearing {t}", "a {f} wearing {t}", "a {f} with {t}", "a {f} that wears {t}", "a {f} in {t}")
ON_HEAD = ("a {f} wearing a {t}", "a {f} wearing a {t}", "a {f} with a {t}", "a {f} that wears a {t}", "a {f} in a {t}")
THINGS = (
    Thing("glasses", ("glasses", "glasses", "thick glasses"), 0.86, 0.47, False, ON_EYES),
    Thing("sunglasses", ("sunglasses", "sunglasses", "dark glasses"), 0.86, 0.47, False, ON_EYES),
    Thing("top hat", ("top hat",), 0.86, 0.88, True, ON_HEAD),
    Thing("crown", ("crown", "crown", "golden crown"), 0.84, 0.90, True, ON_HEAD),
    Thing("billed cap", ("cap", "billed cap", "blue cap"), 0.86, 0.88, True, ON_HEAD),
)
LOWERED = 0.74  # scale of a face that wears a hat
HAT_WIDTHS = {"crown": 0.84}  # relative to a top hat


class Wardrobe:
    """The pairs of faces and things to wear. emoji: all drawings; their order defines the drawing numbers."""

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        self.emoji = emoji
        numbers = {drawing.name.lower(): k for k, drawing in enumerate(emoji)}
        self.things = [(thing, numbers[thing.emoji]) for thing in THINGS if thing.emoji in numbers]
        # Skin tone variants, such as "girl: dark skin tone", are grouped, so that all faces are equally frequent.
        self.faces: dict[str, list[int]] = {name: [] for name in HEADS}
        for name, number in numbers.items():
            face = name if name in HEADS else untoned(name)
            if face in HEADS and (face == name or emoji[number].toned):
                self.faces[face].append(number)
        self.faces = {name: drawings for name, drawings in self.faces.items() if drawings}

    def pairs(self, held_out: bool | None) -> list[tuple[str, Thing, int]]:
        """Triples of a face, a thing it may wear, and the thing's drawing number. held_out: as in `dress`."""
        return [
            (face, thing, number)
            for face in self.faces
            for thing, number in self.things
            if held_out in (None, is_held_out(face, thing.emoji))
        ]

    def dress(self, rng: np.random.Generator, held_out: bool | None = False) -> tuple[list[Layer], str, str]:
        """A random face that wears something: its layers, its background and a caption.

        held_out: False excludes the (face, thing) pairs held out from training, True uses only those, None uses all.
        """
        pairs = self.pairs(held_out)
        face, thing, worn = pairs[rng.integers(len(pairs))]
        same = self.faces[face]
        number = same[0] if rng.random() < 0.5 else same[rng.integers(len(same))]
        words = thing.words[rng.integers(len(thing.words))]
        size, shift = random_placement(rng)
        background = random_background(self.emoji[number], rng, None if held_out else held_out) or "white"
        name = called(self.emoji[number].name)
        text = thing.forms[rng.integers(len(thing.forms))].format(f=name, t=words)
        if rng.random() < 0.3:
            text = ("a picture of ", "an emoji of ", "a drawing of ")[rng.integers(3)] + text
        if rng.random() < 0.5:
            text += f" on a {background} background" if rng.random() < 0.7 else f", {background} background"
        layers = worn_layers(number, worn, HEADS[face], thing, words, size, shift)
        return layers, background, with_articles(text)


def untoned(name: str) -> str:
    """Remove skin tones from a name: "girl: dark skin tone" -> "girl", "man: dark skin tone, beard" -> "man: beard"."""
    parts = [part for part in name.replace(": ", ", ").split(", ") if not part.endswith("skin tone")]
    return ": ".join([parts[0], ", ".join(parts[1:])]) if len(parts) > 1 else parts[0]


def called(name: str) -> str:
    """Convert a name to caption text: "man: dark skin tone, beard" -> "man with dark skin tone and beard"."""
    return name.lower().replace(": ", " with ").replace(", ", " and ")


def worn_layers(
    face: int, worn: int, head: Head, thing: Thing, words: str, size: str, shift: tuple[int, int]
) -> list[Layer]:
    """The layers of a face that wears a thing. face, worn: drawing numbers."""
    whole = WIDTHS[size] / GRID
    left, top = ((GRID - WIDTHS[size]) / 2 + shift[0]) / GRID, ((GRID - WIDTHS[size]) / 2 + shift[1]) / GRID
    scale = LOWERED if thing.hat else 1.0
    face_left, face_top = (1 - scale) / 2, 1 - scale
    across = head.hat * HAT_WIDTHS.get(thing.emoji, 1.0) if thing.hat else head.glasses
    across *= 1.12 if "thick" in words else 1.0
    width = scale * across / thing.across
    x = 0.5 - width / 2
    y = face_top + scale * (head.brow if thing.hat else head.eyes) - width * thing.down
    return [
        Layer(face, left + whole * face_left, top + whole * face_top, whole * scale),
        Layer(worn, left + whole * x, top + whole * max(y, -0.05), whole * width),
    ]

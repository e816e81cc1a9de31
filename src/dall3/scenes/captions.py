"""Captions of scenes: a small grammar with many wordings for one image."""

from __future__ import annotations

import numpy as np

from dall3.scenes.scene import COLOURS, FRUIT, Scene

# {m} is the material, {s} the shape, {z} the size with a trailing space, or empty. `with_articles` turns "a" to "an".
OF_SUBSTANCE = (
    "a {z}{s} made of {m}",
    "a {z}{s} made of {m}",
    "a {z}{s} made of {m}, a {s} with the texture of {m}",
    "a {z}{s} made of {m}, a {s} with the texture of {m}",
    "a {z}{m} {s}",
    "a {z}{m} {s}",
    "a {z}{s} with the texture of {m}",
    "a {z}{s} that is made of {m}",
    "a {z}{s} made out of {m}",
    "a {z}{s} built from {m}",
    "a {z}{s} formed of {m}",
    "a {z}{s} of {m}",
    "{m} in the shape of a {z}{s}",
    "a {z}{s}, made of {m}",
)
# Countable materials: "an armchair shaped like an avocado".
OF_FRUIT = (
    "a {z}{s} shaped like a {m}",
    "a {z}{s} shaped like a {m}",
    "a {z}{s} in the shape of a {m}",
    "a {z}{s} in the shape of a {m}",
    "a {z}{m} {s}",
    "a {z}{m} {s}",
    "a {z}{s} that looks like a {m}",
    "a {z}{s} made of {m}",
    "a {z}{s} made of {m}",
    "a {z}{s} with the texture of {m}",
    "a {z}{s} shaped like a {m}, a {m} {s}",
)
OF_COLOUR = (
    "a {z}{m} {s}",
    "a {z}{m} {s}",
    "a {z}{m} {s}",
    "a {z}{s} that is {m}",
    "a {z}{s} in {m}",
    "a {z}{s} painted {m}",
    "a {z}{s} coloured {m}",
    "a {z}{s}, {m} all over",
    "a {m} {s}, a {z}{s} in plain {m}",
)
OF_PATTERN = (
    "a {z}{s} with {m}",
    "a {z}{s} with {m}",
    "a {z}{s} with {m}, a {s} with the texture of {m}",
    "a {z}{s} covered with {m}",
    "a {z}{s} with a pattern of {m}",
    "a {z}{s} that has {m}",
    "a {z}{s} painted with {m}",
    "a {z}{adjective} {s}",
    "a {z}{adjective} {s}",
)
ADJECTIVES = {"polka dots": "polka dot", "stripes": "striped"}
ONE_NAME = ("a {z}{s}", "an object made of {m}", "something made of {m}")
ONE_NAME_FRUIT = ("a {z}{s}", "an object shaped like a {m}", "something made of {m}")
ONE_NAME_COLOUR = ("a {z}{s}", "a {z}{m} object", "something {m}")
ONE_NAME_PATTERN = ("a {z}{s}", "an object with {m}", "something with {m}")
PREFIXES = ("a picture of ", "a render of ", "a photo of ", "an image of ", "a 3d render of ", "a view of ")
BEHIND = (
    " on a {b} background",
    " on a {b} background",
    " before a {b} background",
    " against a {b} background",
    " in front of a {b} background",
    " with a {b} background",
    ", {b} background",
)


def with_articles(text: str) -> str:
    """Replace "a" by "an" before vowels."""
    words = text.split(" ")
    for k in range(len(words) - 1):
        if words[k] in ("a", "an"):
            words[k] = "an" if words[k + 1][0] in "aeiou" else "a"
    return " ".join(words)


def pick(rng: np.random.Generator, wordings: tuple[str, ...]) -> str:
    return wordings[rng.integers(len(wordings))]


def wordings(material: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Templates for a material: those that name it and the shape, the plainest first, and those that name only one."""
    if material in COLOURS:
        return OF_COLOUR, ONE_NAME_COLOUR
    if material in FRUIT:
        return OF_FRUIT, ONE_NAME_FRUIT
    if material in ADJECTIVES:
        return OF_PATTERN, ONE_NAME_PATTERN
    return OF_SUBSTANCE, ONE_NAME


def fill(form: str, scene: Scene, size: bool) -> str:
    """Fill a template with the scene's words."""
    adjective = ADJECTIVES.get(scene.material, scene.material)
    words = {"s": scene.shape, "m": scene.material, "adjective": adjective, "b": scene.background}
    return with_articles(form.format(z=f"{scene.size} " if size else "", **words))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random caption for the scene, lower-case ASCII.

    95 % of the captions name shape and material ("polka dots" and "stripes" also as "polka dot" and "striped"), the
    others one of them. Half name the background, a third the size.
    """
    both, one = wordings(scene.material)
    kind = rng.random()
    if kind < 0.06:
        form = "{z}{adjective} {s}"
    else:
        form = pick(rng, one if kind > 0.95 else both)
        form = pick(rng, PREFIXES) + form if rng.random() < 0.4 else form
    # Not every template has a size; 0.37 of those that do are a third of all.
    size = rng.random() < 0.37
    return fill(form + pick(rng, BEHIND) if rng.random() < 0.5 else form, scene, size)


def describe(scene: Scene, background: bool = False, size: bool = False) -> str:
    """The scene's plain caption: "a cube made of cloud", "a red cube", "a cube with stripes".

    background: add the background ("a red cube on a blue background"). size: add the size ("a small red cube").
    """
    form = wordings(scene.material)[0][0]
    return fill(form + BEHIND[0] if background else form, scene, size)

"""Rendered training images with captions: one solid object on the ground in front of a plain background."""

from dall3.scenes.captions import caption, describe
from dall3.scenes.render import render
from dall3.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    is_held_out,
    random_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "MATERIALS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Scene",
    "caption",
    "describe",
    "is_held_out",
    "random_scene",
    "render",
]

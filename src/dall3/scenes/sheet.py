"""A contact sheet of all shapes and materials."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dall3.scenes.render import render
from dall3.scenes.scene import MATERIALS, SHAPES, random_scene


def contact_sheet(seed: int = 0, size: int = 128) -> Image.Image:
    """Draw a table with one column per shape and one row per material. size: pixels per image."""
    left, top, gap = 76, 18, 2
    step = size + gap
    sheet = Image.new("RGB", (left + len(SHAPES) * step, top + len(MATERIALS) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, shape in enumerate(SHAPES):
        draw.text((left + column * step + size // 2, top // 2), shape, fill="black", anchor="mm")
    for row, material in enumerate(MATERIALS):
        draw.text((left - 6, top + row * step + size // 2), material, fill="black", anchor="rm")
        for column, shape in enumerate(SHAPES):
            rng = np.random.default_rng((seed, row, column))
            scene = random_scene(rng, shape, material, size="large", held_out=None)
            sheet.paste(Image.fromarray(render(scene, size)), (left + column * step, top + row * step))
    return sheet


def write_contact_sheet(path: str | Path, seed: int = 0, size: int = 128) -> None:
    """Write the contact sheet to a file. The suffix determines the format."""
    contact_sheet(seed, size).save(path)

"""What a visitor of the page uploads: images, masks and recipes. All of it is untrusted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dall3.errors import require
from dall3.images import open_image, read_rgb
from dall3.output import Dall3Output
from dall3.weights.registry import read_settings_text

LARGEST_SEED = 2**53 - 1  # the largest integer that JavaScript represents exactly
EXPECTED = "expected an image saved by dall3 (PNG), or its recipe, settings.json or wall.json (JSON)"


@dataclass(frozen=True)
class Limits:
    """Upper bounds on a request. seconds: its estimated time. pixels: width times height of an uploaded image."""

    images: int = 8
    candidates: int = 256
    steps: int = 250
    seconds: int = 3600
    pixels: int = 4096**2


def open_upload(path: str, limits: Limits) -> Image.Image:
    """Read an uploaded image. Raises ValueError for a file that is not an image or exceeds `limits`."""
    try:
        return read_rgb(path, Path(path).name, limits.pixels)
    except OSError as error:
        raise ValueError(f"{Path(path).name}: {error.strerror}; upload it again") from None


def read_mask(path: str, limits: Limits) -> Image.Image:
    """The painted region of a layer of the editor, in white. Raises ValueError as `open_upload` does."""
    open_upload(path, limits)
    alpha = open_image(path, Path(path).name, limits.pixels).convert("RGBA").getchannel("A")
    return alpha.point(lambda value: 255 if value > 127 else 0)


def read_uploaded_recipe(path: str, limits: Limits) -> tuple[str, dict[str, Any]]:
    """The prompt and the settings of an image that dall3 saved, or of a JSON file.

    The JSON is that of `Dall3Output.recipe`, or a settings.json or wall.json. Raises ValueError for any other file.
    """
    name = Path(path).name
    if Path(path).suffix.lower() != ".json":
        open_upload(path, limits)
        try:
            out = Dall3Output.load(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name)) from None
        return out.prompt, dict(out.settings)
    try:
        found = json.loads(read_settings_text(path))
        require(isinstance(found, dict), f"it is a {type(found).__name__}")
        prompt, settings = found.get("prompt"), found.get("settings", found)
        require(isinstance(prompt, str) and isinstance(settings, dict), "it has no prompt and settings")
        prompt.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    except (ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).replace(str(path), name).split())[:200]
        raise ValueError(f"{name} is not a recipe ({reason}); {EXPECTED}") from None
    return prompt, dict(settings)


def checked_number(recipe: dict[str, Any], name: str, low: int, high: float, kind: type = int) -> int | float | None:
    """A number from a recipe, or None if it has none. Raises ValueError for another type or a value out of range."""
    value = recipe.get(name)
    if value is None:
        return None
    valid = type(value) in (int, kind) and low <= value <= high
    number = "a whole number" if kind is int else "a number"
    require(valid, f"the recipe's {name} is {str(value)[:40]!r}; expected {number} in [{low}, {high:,}]")
    return value

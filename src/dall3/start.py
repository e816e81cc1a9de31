"""Initial images: which of their tokens are kept, and which are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dall3.errors import require
from dall3.images import center_crop, enlarge, to_tensor
from dall3.parts import Parts
from dall3.settings import as_number
from dall3.tokens.seeds import make_generator


def tokens_to_keep(parts: Parts, given: Mapping[str, Any], seed: int) -> Tensor | None:
    """The tokens to keep: int64 (image tokens,), -1 for tokens to draw; None without an initial image.

    given: arguments of the call, including those of `StartSettings`. Raises ValueError for invalid ones.
    """
    image = given.get("init_image")
    ways = [name for name in ("keep_rows", "redraw", "mask_image", "change") if given.get(name) is not None]
    if image is None:
        require(not ways, f"{' and '.join(ways)} selects tokens of an initial image; pass image too")
        return None
    require(len(ways) < 2, f"{' and '.join(ways)} exclude each other; pass one of them")
    side = parts.require("transformer", "drawing tokens").config.grid_size
    picture = None
    if not (isinstance(image, np.ndarray | Tensor) and image.ndim < 3):
        picture = to_tensor(image[None] if isinstance(image, Tensor) and image.ndim == 3 else image)
    drawn = tokens_to_draw(given, ways[0] if ways else "keep_rows", side, picture, seed)
    if picture is None:
        tokens = parts.check_tokens(image)
    else:
        factor = parts.require("vqgan", "encoding images").downsampling
        tokens = parts.encode(enlarge(center_crop(picture), side * factor))
    require(tokens.shape == (1, side**2), f"image has tokens of shape {tuple(tokens.shape)}; expected ({side**2},)")
    return torch.where(drawn.flatten().to(parts.device), -1, tokens[0])


def tokens_to_draw(given: Mapping[str, Any], way: str, side: int, picture: Tensor | None, seed: int) -> Tensor:
    """The tokens to draw: bool (side, side). way: name of the argument that selects them."""
    drawn = torch.zeros(side, side, dtype=torch.bool)
    value: Any = given.get(way)
    if way == "redraw":
        box = [as_number(number) for number in value]
        valid = len(box) == 4 and all(type(number) is int and number >= 0 for number in box)
        require(valid, f"redraw={value}; expected (top, left, height, width) in tokens")
        top, left, height, width = box
        valid = height > 0 and width > 0 and top + height <= side and left + width <= side
        require(valid, f"redraw={value}; the rectangle exceeds the grid of {side}×{side} tokens")
        drawn[top : top + height, left : left + width] = True
    elif way == "mask_image":
        drawn = masked_tokens(value, side, picture)
    elif way == "change":
        valid = isinstance(value, int | float) and 0 < value <= 1
        require(valid, f"change={value}; expected the fraction of the tokens to draw again, in (0, 1]")
        drawn = torch.rand(side, side, generator=make_generator("cpu", seed, "change")) < value
    else:
        keep_rows = int(0.4375 * side) if value is None else value
        valid = isinstance(keep_rows, int) and 0 < keep_rows < side
        require(valid, f"keep_rows={keep_rows}; expected a number of rows, an integer in [1, {side - 1}]")
        drawn[keep_rows:] = True
    return drawn


def masked_tokens(mask: Any, side: int, picture: Tensor | None) -> Tensor:
    """The tokens that the white part of a mask overlaps: bool (side, side).

    mask: an image of the size of `picture`, or a box (left, top, right, bottom) in pixels.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L")) / 255
    if isinstance(mask, list | tuple):
        require(picture is not None, "mask_image is a box in pixels, but image is tokens; pass an image in pixels")
        height, width = picture.shape[-2:]  # type: ignore[union-attr]
        box = [as_number(number) for number in mask]
        valid = len(box) == 4 and all(type(number) is int for number in box)
        valid = valid and 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
        expected = f"a box (left, top, right, bottom) within {width}×{height} pixels"
        require(valid, f"mask_image={mask}; expected {expected}, or an image that is white where tokens are drawn")
        left, top, right, bottom = box
        mask = torch.zeros(height, width)
        mask[top:bottom, left:right] = 1
    known = isinstance(mask, np.ndarray | Tensor)
    require(known, f"mask_image is a {type(mask).__name__}; expected an image, or a box (left, top, right, bottom)")
    mask = torch.as_tensor(mask).float().cpu()
    size = tuple(mask.shape)
    wanted = size if picture is None else tuple(picture.shape[-2:])
    require(len(size) == 2 and size == wanted, f"mask_image has shape {size}; expected the image's, {wanted}")
    drawn = F.adaptive_max_pool2d(center_crop(mask[None, None]), side)[0, 0] > 0.5
    require(bool(drawn.any()), "mask_image is black everywhere; make it white where tokens are to be drawn")
    return drawn

"""Initial images: encode them, and select the tokens to keep and the tokens to draw."""

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
    """The tokens of the initial image to keep: int64 (image tokens,), -1 for tokens to draw; None without an image.

    given: arguments of the call, including those of `StartSettings`. seed: selects the tokens for `change`. Raises
    ValueError for invalid arguments.
    """
    image = given.get("init_image")
    selectors = [name for name in ("keep_rows", "redraw", "mask_image", "change") if given.get(name) is not None]
    if image is None:
        require(not selectors, f"{' and '.join(selectors)} selects tokens of an initial image; pass image too")
        return None
    require(len(selectors) < 2, f"{' and '.join(selectors)} exclude each other; pass one of them")
    side = parts.require("transformer", "drawing tokens").config.grid_size
    pixels = None  # None if `image` is tokens
    if not (isinstance(image, np.ndarray | Tensor) and image.ndim < 3):
        pixels = to_tensor(image[None] if isinstance(image, Tensor) and image.ndim == 3 else image)
    drawn = tokens_to_draw(given, selectors[0] if selectors else "keep_rows", side, pixels, seed)
    if pixels is None:
        tokens = parts.check_tokens(image)
    else:
        factor = parts.require("vqgan", "encoding images").downsampling
        tokens = parts.encode(enlarge(center_crop(pixels), side * factor))
    require(tokens.shape == (1, side**2), f"image has tokens of shape {tuple(tokens.shape)}; expected ({side**2},)")
    return torch.where(drawn.flatten().to(parts.device), -1, tokens[0])


def tokens_to_draw(given: Mapping[str, Any], selector: str, side: int, pixels: Tensor | None, seed: int) -> Tensor:
    """A mask of the tokens to draw, bool (side, side).

    selector: name of the argument that selects them. pixels: the initial image, (1, 3, height, width); None if it was
    given as tokens.
    """
    drawn = torch.zeros(side, side, dtype=torch.bool)
    value: Any = given.get(selector)
    if selector == "redraw":
        box = [as_number(number) for number in value]
        valid = len(box) == 4 and all(type(number) is int and number >= 0 for number in box)
        require(valid, f"redraw={value}; expected (top, left, height, width) in tokens")
        top, left, height, width = box
        valid = height > 0 and width > 0 and top + height <= side and left + width <= side
        require(valid, f"redraw={value}; the rectangle exceeds the grid of {side}×{side} tokens")
        drawn[top : top + height, left : left + width] = True
    elif selector == "mask_image":
        drawn = masked_tokens(value, side, pixels)
    elif selector == "change":
        valid = isinstance(value, int | float) and 0 < value <= 1
        require(valid, f"change={value}; expected the fraction of the tokens to draw again, in (0, 1]")
        drawn = torch.rand(side, side, generator=make_generator("cpu", seed, "change")) < value
    else:
        keep_rows = int(0.4375 * side) if value is None else value
        valid = isinstance(keep_rows, int) and 0 < keep_rows < side
        require(valid, f"keep_rows={keep_rows}; expected a number of rows, an integer in [1, {side - 1}]")
        drawn[keep_rows:] = True
    return drawn


def masked_tokens(mask: Any, side: int, pixels: Tensor | None) -> Tensor:
    """The tokens that the white part of a mask overlaps: bool (side, side).

    mask: an image of the size of `pixels`, or a box (left, top, right, bottom) in pixels.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L")) / 255
    if isinstance(mask, list | tuple):
        require(pixels is not None, "mask_image is a box in pixels, but image is tokens; pass an image in pixels")
        height, width = pixels.shape[-2:]  # type: ignore[union-attr]
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
    wanted = size if pixels is None else tuple(pixels.shape[-2:])
    require(len(size) == 2 and size == wanted, f"mask_image has shape {size}; expected the image's, {wanted}")
    drawn = F.adaptive_max_pool2d(center_crop(mask[None, None]), side)[0, 0] > 0.5
    require(bool(drawn.any()), "mask_image is black everywhere; make it white where tokens are to be drawn")
    return drawn

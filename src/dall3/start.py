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
        require(not ways, f"{' and '.join(ways)} says what stays of an init_image; give one")
        return None
    require(len(ways) < 2, f"{' and '.join(ways)} are both given; choose one")
    side = parts.require("transformer", "drawing tokens").config.grid_size
    picture = None
    if not (isinstance(image, np.ndarray | Tensor) and image.ndim < 3):
        picture = to_tensor(image[None] if isinstance(image, Tensor) and image.ndim == 3 else image)
    drawn = tokens_to_draw(given, ways[0] if ways else "keep_rows", side, picture, seed)
    if picture is None:
        tokens = parts.check_tokens(image)
    else:
        tokens = parts.encode(enlarge(center_crop(picture), side * parts.require("vqgan", "priming").downsampling))
    require(tokens.shape == (1, side**2), f"init_image has tokens {tuple(tokens.shape)}; expected ({side**2},)")
    return torch.where(drawn.flatten().to(parts.device), -1, tokens[0])


def tokens_to_draw(given: Mapping[str, Any], way: str, side: int, picture: Tensor | None, seed: int) -> Tensor:
    """The tokens to draw: bool (side, side). way: name of the argument that selects them."""
    drawn = torch.zeros(side, side, dtype=torch.bool)
    value: Any = given.get(way)
    if way == "redraw":
        box = [as_number(number) for number in value]
        fits = len(box) == 4 and all(type(number) is int and number >= 0 for number in box)
        require(fits, f"redraw={value}; expected (top, left, height, width) in tokens")
        top, left, height, width = box
        fits = height > 0 and width > 0 and top + height <= side and left + width <= side
        require(fits, f"redraw={value}; the rectangle does not lie on the {side}×{side} tokens")
        drawn[top : top + height, left : left + width] = True
    elif way == "mask_image":
        drawn = masked_tokens(value, side, picture)
    elif way == "change":
        fits = isinstance(value, int | float) and 0 < value <= 1
        require(fits, f"change={value}; expected a share of the tokens to draw anew, in (0, 1]")
        drawn = torch.rand(side, side, generator=make_generator("cpu", seed, "change")) < value
    else:
        keep_rows = int(0.4375 * side) if value is None else value
        fits = isinstance(keep_rows, int) and 0 < keep_rows < side
        require(fits, f"keep_rows={keep_rows}; expected a whole number of rows in [1, {side - 1}]")
        drawn[keep_rows:] = True
    return drawn


def masked_tokens(mask: Any, side: int, picture: Tensor | None) -> Tensor:
    """The tokens that the white part of a mask overlaps: bool (side, side).

    mask: an image of the size of `picture`, or a box (left, top, right, bottom) in pixels.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L")) / 255
    if isinstance(mask, list | tuple):
        require(picture is not None, "a box as mask_image is in pixels; give a picture as image, not tokens")
        height, width = picture.shape[-2:]  # type: ignore[union-attr]
        box = [as_number(number) for number in mask]
        fits = len(box) == 4 and all(type(number) is int for number in box)
        fits = fits and 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
        words = f"mask_image={mask}; expected (left, top, right, bottom) inside of the {width}×{height} pixels"
        require(fits, f"{words}, or a picture that is white where it is drawn anew")
        left, top, right, bottom = box
        mask = torch.zeros(height, width)
        mask[top:bottom, left:right] = 1
    require(
        isinstance(mask, np.ndarray | Tensor), f"mask_image is a {type(mask).__name__}; expected a picture or a box"
    )
    mask = torch.as_tensor(mask).float().cpu()
    size = tuple(mask.shape)
    wanted = size if picture is None else tuple(picture.shape[-2:])
    require(len(size) == 2 and size == wanted, f"mask_image is {size}; expected (height, width) of the image, {wanted}")
    drawn = F.adaptive_max_pool2d(center_crop(mask[None, None]), side)[0, 0] > 0.5
    require(bool(drawn.any()), "mask_image is black everywhere; expected white where it is drawn anew")
    return drawn

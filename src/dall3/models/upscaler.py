"""Upscalers in the formats that `spandrel` reads (Real-ESRGAN, ESRGAN, SwinIR, …): one forward pass, in tiles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.layout import set_memory_layout

SMALLEST_TILE = 32


@dataclass(frozen=True)
class UpscalerConfig:
    """Configuration of an `Upscaler`.

    architecture: spandrel's name of the network, such as "ESRGAN". scale: factor between the sides of output and input.
    tile: largest side of a tile, in input pixels; larger images are upscaled tile by tile. overlap: pixels of the
    neighbouring tiles that the network sees around a tile.

    Raises ValueError for a tile below 32 pixels and for a negative overlap.
    """

    architecture: str
    scale: int
    tile: int = 256
    overlap: int = 32

    def __post_init__(self) -> None:
        for name, least in (("tile", SMALLEST_TILE), ("overlap", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}; expected a number of pixels from {least}")


class Upscaler(nn.Module):
    """A network of spandrel that multiplies the side of an image by `config.scale`.

    descriptor: what spandrel's loader returns. Weights in a dtype that the architecture does not support are kept in
    float32. `load_upscaler` makes an `Upscaler` from a file.

    >>> from dall3.weights import load_upscaler
    >>> upscaler = load_upscaler("RealESRGAN_x4plus.pth")  # doctest: +SKIP
    >>> upscaler(torch.rand(1, 3, 256, 256)).shape  # doctest: +SKIP
    torch.Size([1, 3, 1024, 1024])
    """

    def __init__(self, descriptor: Any, config: UpscalerConfig) -> None:
        super().__init__()
        self.config, self.descriptor = config, descriptor
        self.network: nn.Module = descriptor.model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, seamless: bool = False) -> Tensor:
        """Upscale images, float (n, 3, height, width) in [0, 1]: float32 (n, 3, scale · height, scale · width).

        Images are upscaled one at a time, so that the result does not depend on the batch. seamless: pad with the
        opposite edges, for images that are tiled. On a GPU that runs out of memory, the tile is halved.
        """
        set_memory_layout(self)
        margin = min(self.config.overlap, *images.shape[-2:]) if seamless else 0
        padded = F.pad(images, [margin] * 4, mode="circular") if margin else images
        upscaled = torch.cat([self.upscale(image) for image in padded.split(1)])
        edge = margin * self.config.scale
        return upscaled[..., edge : upscaled.shape[-2] - edge, edge : upscaled.shape[-1] - edge]

    def upscale(self, image: Tensor) -> Tensor:
        """Upscale one image, (1, 3, height, width), in the largest tiles up to `config.tile` that fit the memory."""
        tile = self.config.tile
        while True:
            try:
                return self.upscale_in_tiles(image, tile)
            except torch.OutOfMemoryError:
                if tile < 2 * SMALLEST_TILE:
                    raise
            tile //= 2  # outside of the handler, whose traceback keeps the tensors of the failed attempt alive
            torch.cuda.empty_cache()

    def upscale_in_tiles(self, image: Tensor, tile: int) -> Tensor:
        """Upscale one image, (1, 3, height, width), in tiles of `tile` pixels with `config.overlap` pixels around."""
        scale, overlap, (height, width) = self.config.scale, self.config.overlap, image.shape[-2:]
        image = image.to(next(self.network.parameters()).dtype)
        out = torch.empty(1, 3, scale * height, scale * width, device=image.device)
        for top, left in product(range(0, height, tile), range(0, width, tile)):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first_row, first_column = max(top - overlap, 0), max(left - overlap, 0)
            seen = image[..., first_row : bottom + overlap, first_column : right + overlap]
            upscaled = self.descriptor(seen)
            y, x = scale * (top - first_row), scale * (left - first_column)
            inner = upscaled[..., y : y + scale * (bottom - top), x : x + scale * (right - left)]
            out[..., scale * top : scale * bottom, scale * left : scale * right] = inner
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        dtype, found = next(self.network.parameters()).dtype, self.descriptor
        # Some transformers declare only bfloat16, and fail for other image sizes than those of their training.
        in_half = found.supports_half and (found.supports_bfloat16 or dtype == torch.float16)
        return self if in_half or dtype not in (torch.float16, torch.bfloat16) else self.float()

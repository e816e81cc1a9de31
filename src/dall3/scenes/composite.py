"""Composite emoji on plain backgrounds, in batches on any device. The results equal those of `draw_emoji`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import numpy as np
import torch
from torch import Tensor

from dall3.scenes.emoji import GRID, WIDTHS, Emoji, read_drawings
from dall3.scenes.scene import BACKGROUNDS
from dall3.scenes.shapes import put

SIDE = 256  # pixels of a drawing
LOBES = 3  # lobes of the Lanczos filter


@dataclass(frozen=True)
class Layer:
    """A drawing placed in an image: its number, and the left, top and width of its square relative to the image."""

    drawing: int
    left: float
    top: float
    width: float


def placed(drawing: int, size: str, shift: tuple[int, int]) -> Layer:
    """The layer for a size and a shift, as in `draw_emoji`."""
    margin = (GRID - WIDTHS[size]) / 2
    return Layer(drawing, (margin + shift[0]) / GRID, (margin + shift[1]) / GRID, WIDTHS[size] / GRID)


class Drawings:
    """The emoji's drawings on a device, uint8 (n, 4, 256, 256), premultiplied: 0.9 GB for all.

    On a GPU all drawings are decoded at construction, which takes a few seconds. On a CPU each is decoded at first use.
    """

    def __init__(self, emoji: Sequence[Emoji], device: torch.device) -> None:
        self.emoji, self.device = emoji, device
        self.pixels = torch.empty(len(emoji), 4, SIDE, SIDE, dtype=torch.uint8, device=device)
        self.loaded = np.zeros(len(emoji), bool)
        if device.type != "cpu":
            self.load(range(len(emoji)))

    def load(self, numbers: Iterable[int]) -> None:
        """Decode the drawings with these numbers that have not been decoded yet."""
        missing = sorted({number for number in numbers if not self.loaded[number]})
        parts = [missing[k : k + 32] for k in range(0, len(missing), 32)]

        def decode(part: list[int]) -> Tensor:
            drawings = read_drawings([self.emoji[number] for number in part])
            stack = np.stack([np.asarray(drawing.copy()) for drawing in drawings])
            return torch.from_numpy(stack.transpose(0, 3, 1, 2).copy())

        with ThreadPoolExecutor(min(len(parts), cpu_count() or 1) or 1) as pool:
            for part, pixels in zip(parts, pool.map(decode, parts), strict=True):
                self.pixels[put(part, self.device)] = pixels.to(self.device)
        self.loaded[missing] = True

    def draw(self, layers: Sequence[Layer], side: int) -> Tensor:
        """Resize and place drawings: premultiplied RGBA, float (n, 4, side, side) in [0, 255]."""
        self.load(layer.drawing for layer in layers)
        numbers = put([layer.drawing for layer in layers], self.device)
        places = put([(layer.left, layer.top, layer.width) for layer in layers], self.device, torch.float32)
        left, top, width = (places.T * side)[..., None, None]
        drawn = self.pixels[numbers].float() @ resampling(left, width, side)[:, None].mT
        # Pillow rounds after each of the two passes; the filter overshoots at edges.
        drawn = drawn.round_().clamp_(0, 255)
        drawn = (resampling(top, width, side)[:, None] @ drawn).round_().clamp_(0, 255)
        drawn[:, :3] = torch.minimum(drawn[:, :3], drawn[:, 3:])
        return drawn


def resampling(start: Tensor, width: Tensor, side: int) -> Tensor:
    """Matrices (n, side, SIDE) that resample a row of a drawing to `width` pixels from `start`, (n, 1, 1) each, with a
    Lanczos filter (C. Lanczos, Applied Analysis, 1956). Other pixels are 0.
    """
    place = torch.arange(side, device=start.device)[:, None] + 0.5 - start
    source = torch.arange(SIDE, device=start.device) + 0.5
    scale = (SIDE / width).clamp(min=1)
    off = (source - place * (SIDE / width)) / scale
    weight = torch.where(off.abs() < LOBES, torch.sinc(off) * torch.sinc(off / LOBES), 0)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=0.1)
    return torch.where((place > 0) & (place < width), weight, 0)


def lay(drawings: Drawings, images: Sequence[Sequence[Layer]], backgrounds: Sequence[str], side: int) -> Tensor:
    """Composite the layers of each image, the lowest first, on background colours: uint8 (n, 3, side, side)."""
    colours = put([BACKGROUNDS[name] for name in backgrounds], drawings.device, torch.float32)
    canvas = colours[..., None, None].expand(-1, -1, side, side).contiguous()
    for level in range(max(map(len, images))):
        numbers = [k for k, layers in enumerate(images) if len(layers) > level]
        layer = drawings.draw([images[k][level] for k in numbers], side)
        which = put(numbers, drawings.device)
        canvas[which] = canvas[which] * (1 - layer[:, 3:] / 255) + layer[:, :3]
    return canvas.add_(0.5).clamp_(0, 255).to(torch.uint8)

"""Dall3Output: the pictures of one prompt and everything that made them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dall3.errors import require

File = str | np.ndarray | Image.Image


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures, float (n, 3, height, width) in [0, 1], as PIL's."""
    array = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def to_tensor(images: Any) -> Tensor:
    """A picture or pictures, PIL's or float (n, 3, height, width) in [0, 1], as such a tensor.

    Raises ValueError for anything else, for pictures of several sizes, and for values outside the range.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple) and images and all(isinstance(image, Image.Image) for image in images):
        sizes = {image.size for image in images}
        require(len(sizes) == 1, f"the pictures have several sizes, {sorted(sizes)}; give them one by one")
        images = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
        return images.permute(0, 3, 1, 2).float() / 255
    require(isinstance(images, Tensor), f"expected PIL pictures or a tensor, not {type(images).__name__}")
    shape, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    fits = len(shape) == 4 and shape[1] == 3 and 0 not in shape and images.is_floating_point()
    require(fits, f"pictures are {kind} {shape}; expected float (n, 3, height, width) in [0, 1]")
    low, high = (float(bound) for bound in images.aminmax())
    require(low >= 0 and high <= 1, f"pictures run from {low:.3g} to {high:.3g}; expected values in [0, 1]")
    return images.float()


def make_grid(rows: list[list[Image.Image]], side: int, gap: int = 4) -> Image.Image:
    """Rows of pictures, each enlarged or reduced to `side` pixels, on white."""
    width = max(len(row) for row in rows) * (side + gap) - gap
    grid = Image.new("RGB", (width, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x * (side + gap), y * (side + gap)))
    return grid


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raise FileExistsError if the folder holds one of the names."""
    present = [name for name in names if (folder / name).exists()]
    if present:
        raise FileExistsError(f"{folder} already holds {present[0]}; give another folder, or overwrite")


def write_files(folder: Path, files: dict[str, File], overwrite: bool) -> Path:
    """Write texts, arrays (.npy) and pictures by name into a folder, made if need be, and return its path.

    Raises FileExistsError if one of them is there already, before it writes any, unless `overwrite`.
    """
    if not overwrite:
        check_free(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        elif isinstance(content, np.ndarray):
            np.save(folder / name, content)
        else:
            content.save(folder / name)
    return folder


@dataclass
class Dall3Output:
    """What `Dall3Pipeline` returns for a prompt: `num_images` results, best first where CLIP ranked them."""

    prompt: str
    images: list[Image.Image]  # after diffusion; the coarse ones again where there is no upsampler
    coarse_images: list[Image.Image]  # before diffusion
    tokens: Tensor  # int64 (n, image tokens)
    clip_scores: Tensor | None  # float32 (n,), cosine similarity to the prompt; None without CLIP
    candidates: Tensor  # int64 (n,), the number of the draw that each picture comes from
    settings: dict[str, Any] = field(default_factory=dict)  # what made them, the seed among it

    def __len__(self) -> int:
        return len(self.images)

    def grid(self) -> Image.Image:
        """One picture of all: before diffusion above, after diffusion below."""
        rows = [self.images] if self.images == self.coarse_images else [self.coarse_images, self.images]
        return make_grid(rows, side=self.images[0].width)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write `0.png`, `0-coarse.png` and `0.npy` (int64, the seed's format) a result, `caption.txt` and
        `settings.json` into a folder, made if need be, and return its path.

        Raises FileExistsError if one of the files is there already, before it writes any, unless `overwrite`.
        """
        scores = None if self.clip_scores is None else self.clip_scores.tolist()
        settings = json.dumps(self.settings | {"prompt": self.prompt, "clip_scores": scores}, indent=2)
        files: dict[str, File] = {"caption.txt": self.prompt, "settings.json": settings}
        for i, (image, coarse, tokens) in enumerate(zip(self.images, self.coarse_images, self.tokens, strict=True)):
            files |= {f"{i}.png": image, f"{i}.npy": tokens.numpy()}
            if image is not coarse:
                files[f"{i}-coarse.png"] = coarse
        return write_files(Path(folder), files, overwrite)

"""Dall3Output: the pictures of one prompt and everything that made them."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dall3.errors import require

File = str | np.ndarray | Image.Image
RECIPE = "dall3"  # the text chunk of a PNG that holds, as JSON, what made it
CAPTION_HEIGHT = 18  # pixels


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
    with TemporaryDirectory(prefix=".", dir=folder) as aside:
        for name, content in files.items():
            path = Path(aside) / name
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            elif isinstance(content, np.ndarray):
                np.save(path, content)
            else:
                content.save(path, pnginfo=png_text(content))  # which formats other than PNG leave out
        for name in files:
            os.replace(Path(aside) / name, folder / name)
    return folder


def read_tokens(path: str) -> Tensor:
    """The tokens in a .npy, int64 (1, n). Raises ValueError for another file."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a .npy of image tokens ({error})") from None
    if tokens.dtype.kind not in "iu" or tokens.size == 0 or tokens.size != (*tokens.shape, 1)[-2 if tokens.ndim else 0]:
        raise ValueError(f"{path}: holds {tokens.dtype} {tokens.shape}; expected int64 (256,)")
    return torch.from_numpy(tokens.astype(np.int64)).reshape(1, -1)


def png_text(image: Image.Image) -> PngInfo:
    """The texts that a picture carries into its PNG: the prompt and the recipe."""
    text = PngInfo()
    for key, value in image.info.items():
        if key in (RECIPE, "Description"):
            text.add_itxt(key, value)
    return text


@dataclass
class Preview:
    """How far a call is: what `Dall3Pipeline.stream` yields.

    stage: "drawing" (steps are tokens), "ranking", "refining" (steps are those of the denoising) or "done".
    In a notebook `show` takes the place of the preview before.

    >>> preview = Preview("drawing", 128, 256, lambda: [Image.new("RGB", (8, 8))])
    >>> preview.images[0].size
    (8, 8)
    """

    stage: str
    step: int
    total: int
    make_images: Callable[[], list[Image.Image]]
    output: Dall3Output | None = None  # when done

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as they are now."""
        return self.make_images()

    def _repr_png_(self) -> bytes:
        if self.output is not None:
            return self.output._repr_png_()
        images = self.images
        return png_bytes(make_grid([images], images[0].width))

    def show(self) -> None:
        """Show the pictures: in a notebook in place of those before, elsewhere in the system's viewer."""
        ipython = sys.modules.get("IPython")  # there already, where a notebook runs
        if ipython is None or ipython.get_ipython() is None:
            images = self.images
            make_grid([images], images[0].width).show()
        else:
            ipython.display.clear_output(wait=True)
            ipython.display.display(self)


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=png_text(image))
    return buffer.getvalue()


@dataclass(repr=False)
class Dall3Output:
    """What `Dall3Pipeline` returns for a prompt: `num_images` results, best first where CLIP ranked them.

    A number takes one result out of it, a slice several, as outputs of their own; iterating gives them one by one.

    >>> import torch
    >>> black, white = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white"))
    >>> both = [black, white]
    >>> out = Dall3Output("a cube", both, both, torch.zeros(2, 4).long(), torch.tensor([0.3, 0.2]), torch.arange(2))
    >>> len(out), out[1].images == [white], [float(one.clip_scores[0]) > 0.25 for one in out]
    (2, True, [True, False])
    >>> out
    Dall3Output('a cube', 2 of 8×8: 0.300, draw 0; 0.200, draw 1)
    """

    prompt: str
    images: list[Image.Image]  # after diffusion; the coarse ones again where there is no upsampler
    coarse_images: list[Image.Image]  # before diffusion; none where a picture was loaded from its file
    tokens: Tensor  # int64 (n, image tokens)
    clip_scores: Tensor | None  # float32 (n,), cosine similarity to the prompt; None without CLIP
    candidates: Tensor  # int64 (n,), the number of the draw that each picture comes from
    settings: dict[str, Any] = field(default_factory=dict)  # what made them, the seed among it

    def __repr__(self) -> str:
        size = "×".join(str(side) for image in self.images[:1] for side in image.size)
        return f"Dall3Output({self.prompt!r}, {len(self)} of {size}: {'; '.join(self.captions())})"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: int | slice) -> Dall3Output:
        # A number out of range is the list's IndexError.
        chosen = which if isinstance(which, slice) else [range(len(self))[which]]
        numbers = list(range(len(self)))[chosen] if isinstance(chosen, slice) else chosen
        places = self.settings.get("places", range(len(self)))
        return replace(
            self,
            images=[self.images[i] for i in numbers],
            coarse_images=[self.coarse_images[i] for i in numbers if self.coarse_images],
            tokens=self.tokens[numbers],
            clip_scores=None if self.clip_scores is None else self.clip_scores[numbers],
            candidates=self.candidates[numbers],
            settings=self.settings | {"places": [places[i] for i in numbers]},
        )

    def __iter__(self) -> Iterator[Dall3Output]:
        return (self[i] for i in range(len(self)))

    def to_numpy(self) -> np.ndarray:
        """The pictures: uint8 (n, height, width, 3).

        >>> one = [Image.new("RGB", (8, 8))]
        >>> Dall3Output("a cube", one, one, torch.zeros(1, 4).long(), None, torch.arange(1)).to_numpy().shape
        (1, 8, 8, 3)
        """
        return np.stack([np.asarray(image) for image in self.images])

    def captions(self) -> list[str]:
        """What stands under each picture: CLIP's score, the seed, and the number of the draw."""
        scores = [None] * len(self) if self.clip_scores is None else self.clip_scores.tolist()
        seed = [f"seed {self.settings['seed']}"] if "seed" in self.settings else []
        return [
            ", ".join([f"{score:.3f}"] * (score is not None) + [*seed, f"draw {candidate}"])
            for score, candidate in zip(scores, self.candidates.tolist(), strict=True)
        ]

    def recipe(self, i: int) -> dict[str, Any]:
        """What made result i, of plain values, as its PNG holds it: `Dall3Pipeline.repeat` makes it again from that."""
        return {
            "prompt": self.prompt,
            "place": self.settings.get("places", range(len(self)))[i],
            "candidate": int(self.candidates[i]),
            "clip_score": None if self.clip_scores is None else float(self.clip_scores[i]),
            "tokens": self.tokens[i].tolist(),
            "settings": {name: value for name, value in self.settings.items() if name != "places"},
        }

    def labelled(self, i: int) -> Image.Image:
        """Picture i with the prompt and the recipe, which go into its PNG as text.

        >>> one = [Image.new("RGB", (8, 8))]
        >>> out = Dall3Output("a cube", one, one, torch.zeros(1, 4).long(), None, torch.arange(1))
        >>> out.labelled(0).info["Description"]
        'a cube'
        """
        image = self.images[i].copy()
        image.info = {"Description": self.prompt, RECIPE: json.dumps(self.recipe(i))}
        return image

    @classmethod
    def load(cls, path: str | Path) -> Dall3Output:
        """The result that `save` wrote to a PNG: its picture, and what made it, without the coarse picture.

        Raises ValueError for a file that is no picture or carries no recipe, FileNotFoundError for none.
        """
        try:
            with Image.open(path) as picture:
                image, text = picture.convert("RGB"), picture.info.get(RECIPE)
        except UnidentifiedImageError:
            raise ValueError(f"{path}: not a picture that Pillow can read") from None
        if not isinstance(text, str):
            raise ValueError(f"{path}: carries no recipe; expected a PNG that dall3 saved")
        image.info = {}
        try:
            recipe = json.loads(text)
            score = recipe["clip_score"]
            return cls(
                prompt=str(recipe["prompt"]),
                images=[image],
                coarse_images=[],
                tokens=torch.tensor([recipe["tokens"]], dtype=torch.int64),
                clip_scores=None if score is None else torch.tensor([float(score)]),
                candidates=torch.tensor([int(recipe["candidate"])]),
                settings=dict(recipe["settings"]) | {"places": [int(recipe["place"])]},
            )
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{path}: its recipe is damaged ({type(error).__name__}: {error})") from None

    def grid(self, captions: bool = False) -> Image.Image:
        """One picture of all: before diffusion above, after diffusion below; with `captions` under them."""
        one_row = not self.coarse_images or self.images == self.coarse_images
        grid = make_grid([self.images] if one_row else [self.coarse_images, self.images], side=self.images[0].width)
        if not captions:
            return grid
        sheet = Image.new("RGB", (grid.width, grid.height + CAPTION_HEIGHT), "white")
        sheet.paste(grid)
        draw, step = ImageDraw.Draw(sheet), (grid.width + 4) / len(self)
        for i, text in enumerate(self.captions()):
            draw.text((step * (i + 0.5) - 2, grid.height + CAPTION_HEIGHT / 2), text, fill="black", anchor="mm")
        return sheet

    def _repr_png_(self) -> bytes:
        return png_bytes(self.grid(captions=True))

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write `0.png`, `0-coarse.png` and `0.npy` (int64, the seed's format) a result, `caption.txt` and
        `settings.json` into a folder, made if need be, and return its path. A PNG carries its recipe as text.

        Raises FileExistsError if one of the files is there already, before it writes any, unless `overwrite`.
        """
        scores = None if self.clip_scores is None else self.clip_scores.tolist()
        settings = json.dumps(self.settings | {"prompt": self.prompt, "clip_scores": scores}, indent=2)
        files: dict[str, File] = {"caption.txt": self.prompt, "settings.json": settings}
        for i, tokens in enumerate(self.tokens):
            files |= {f"{i}.png": self.labelled(i), f"{i}.npy": tokens.numpy()}
        for i, (image, coarse) in enumerate(zip(self.images, self.coarse_images, strict=False)):
            if image is not coarse:
                files[f"{i}-coarse.png"] = coarse
        return write_files(Path(folder), files, overwrite)

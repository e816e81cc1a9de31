"""Dall3Output: the images of one prompt with their settings, saved to and loaded from files."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dall3.errors import require
from dall3.images import Images, make_grid, open_image, to_pil, to_rgb

File = str | np.ndarray | Image.Image
RECIPE = "dall3"  # key of the PNG text chunk that holds the recipe as JSON
CAPTION_HEIGHT = 18  # pixels, of the row of captions below a grid


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raise FileExistsError if the folder holds one of the names."""
    present = [name for name in names if (folder / name).exists()]
    if present:
        raise FileExistsError(f"{folder} already holds {present[0]}; choose another folder, or overwrite it")


def write_files(folder: Path, files: dict[str, File], overwrite: bool) -> Path:
    """Write texts, arrays (.npy) and images to a folder, which is created if needed, and return its path.

    files: contents by file name. If writing fails, for example because the disk is full, the folder is left as it was.

    Raises FileExistsError if one of the files exists, before it writes any, unless `overwrite`.
    """
    if not overwrite:
        check_free(folder, files)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
            for name, content in files.items():
                write_file(Path(temporary) / name, content)
            for name in files:
                os.replace(Path(temporary) / name, folder / name)
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise
    return folder


def write_file(path: Path, content: File) -> None:
    """Write a text, an array or an image."""
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        content.save(path, pnginfo=read_png_text(content))  # formats other than PNG ignore pnginfo


def read_tokens(path: str | Path) -> Tensor:
    """Read image tokens from a .npy file, as `Dall3Output.save` writes it: int64 (1, image tokens).

    Raises ValueError for any other file, and OSError for one that cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            tokens = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # numpy raises many types for a damaged header, MemoryError for a huge shape
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"{path}: not a .npy of image tokens ({reason})") from None
    valid = tokens.dtype.kind in "iu" and tokens.ndim > 0 and 0 < tokens.size == tokens.shape[-1]
    require(valid, f"{path}: holds {tokens.dtype} {tokens.shape}; expected int64 (256,)")
    return torch.from_numpy(tokens.astype(np.int64)).reshape(1, -1)


def read_png_text(image: Image.Image) -> PngInfo:
    """The text chunks of an image's PNG: the prompt and the recipe."""
    text = PngInfo()
    for key, value in image.info.items():
        if key in (RECIPE, "Description"):
            text.add_itxt(key, value)
    return text


def check_recipe(recipe: object) -> dict[str, Any]:
    """Validate the fields of a recipe and return it. Raises ValueError for a missing field or one of another type."""
    if not isinstance(recipe, dict):
        raise ValueError(f"it is a {type(recipe).__name__}; expected an object")
    prompt, settings, tokens, score = (recipe.get(name) for name in ("prompt", "settings", "tokens", "clip_score"))
    require(isinstance(prompt, str), "the prompt is not a string")
    str(prompt).encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    require(isinstance(settings, dict), "the settings are not an object")
    valid = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    require(valid, "the tokens are not a list of integers")
    require(score is None or type(score) in (int, float), "the clip_score is not a number")
    for name in ("candidate", "place"):
        require(type(recipe.get(name)) is int and recipe[name] >= 0, f"the {name} is not an integer of at least 0")
    return recipe


@dataclass
class Preview:
    """The progress of a call, yielded by `Dall3Pipeline.stream`.

    stage: "drawing" (steps are tokens), "ranking", "refining" (steps are denoising steps) or "done". step, total: the
    number of completed steps of the stage, and of all its steps. images: the images so far, decoded when read. output:
    the result, in the stage "done". seconds_left: the estimated number of seconds until the call returns.

    >>> preview = Preview("drawing", 128, 256, lambda: [Image.new("RGB", (8, 8))])
    >>> preview.images[0].size
    (8, 8)
    """

    stage: str
    step: int
    total: int
    make_images: Callable[[], list[Image.Image]]
    output: Dall3Output | None = None  # the result, in the stage "done"
    measure_seconds_left: Callable[[], float] | None = None

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the call returns; None if unknown. The first read times steps of later stages."""
        return None if self.measure_seconds_left is None else self.measure_seconds_left()

    @property
    def images(self) -> list[Image.Image]:
        """The images so far, decoded at each read."""
        return self.make_images()

    def _repr_png_(self) -> bytes:
        if self.output is not None:
            return self.output._repr_png_()
        images = self.images
        return png_bytes(make_grid([images], images[0].width))

    def show(self) -> None:
        """Show the images: in a notebook in place of the previous preview, elsewhere in the system's image viewer."""
        ipython = sys.modules.get("IPython")  # a running notebook has imported it
        if ipython is None or ipython.get_ipython() is None:
            images = self.images
            make_grid([images], images[0].width).show()
        else:
            ipython.display.clear_output(wait=True)
            ipython.display.display(self)


def equal(first: Images, second: Images) -> bool:
    """Whether images are of the same type and have the same values."""
    if isinstance(first, list) or isinstance(second, list):
        return first is second or (isinstance(first, list) and isinstance(second, list) and first == second)
    if type(first) is not type(second) or first.shape != second.shape:
        return False
    return bool((torch.as_tensor(first).cpu() == torch.as_tensor(second).cpu()).all())


def take(images: Images, numbers: Sequence[int]) -> Images:
    """The images with these indices, of the same type."""
    return [images[i] for i in numbers] if isinstance(images, list) else images[list(numbers)]


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG, with its prompt and recipe if it has them."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=read_png_text(image))
    return buffer.getvalue()


@dataclass(repr=False, eq=False)
class Dall3Output:
    """The result of `Dall3Pipeline` for a prompt: n images, best first if CLIP ranked them.

    Indexing with an integer or a slice returns a `Dall3Output` of these images. Iterating yields one output per image.

    images: the images after diffusion; the coarse ones without an upsampler. Their type is the call's `output_type`: a
    list of PIL images ("pil"); an array, float32 (n, height, width, 3) in [0, 1] ("np"); or a tensor, float32
    (n, 3, height, width) in [0, 1], on the pipeline's device ("pt").
    coarse_images: the images before diffusion, of the same type; empty if the output was loaded from a PNG.
    tokens: int64 (n, image tokens).
    clip_scores: float32 (n,), cosine similarities to the prompt in [-1, 1]; None without a CLIP.
    candidates: int64 (n,), the candidate number of each image.
    settings: the settings of the call, including the seed and the fingerprints of the networks.

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
    images: Images
    coarse_images: Images
    tokens: Tensor
    clip_scores: Tensor | None
    candidates: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = "×".join(str(side) for image in to_pil(self.images[:1]) for side in image.size)
        return f"Dall3Output({self.prompt!r}, {len(self)} of {size}: {'; '.join(self.captions())})"

    def __eq__(self, other: object) -> bool:
        """Whether prompts, images, tokens, scores and settings are equal."""
        if not isinstance(other, Dall3Output):
            return NotImplemented
        same_images = equal(self.images, other.images) and equal(self.coarse_images, other.coarse_images)
        return same_images and self._contents() == other._contents()

    def _contents(self) -> tuple[Any, ...]:
        scores = None if self.clip_scores is None else self.clip_scores.tolist()
        settings = {"places": list(range(len(self)))} | self.settings
        return self.prompt, self.tokens.tolist(), scores, self.candidates.tolist(), settings

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: int | slice) -> Dall3Output:
        # range raises IndexError for an index out of range.
        chosen = which if isinstance(which, slice) else [range(len(self))[which]]
        numbers = list(range(len(self)))[chosen] if isinstance(chosen, slice) else chosen
        places = self.settings.get("places", range(len(self)))
        return replace(
            self,
            images=take(self.images, numbers),
            coarse_images=take(self.coarse_images, numbers) if len(self.coarse_images) else [],
            tokens=self.tokens[numbers],
            clip_scores=None if self.clip_scores is None else self.clip_scores[numbers],
            candidates=self.candidates[numbers],
            settings=self.settings | {"places": [places[i] for i in numbers]},
        )

    def __iter__(self) -> Iterator[Dall3Output]:
        return (self[i] for i in range(len(self)))

    def to_pil(self) -> list[Image.Image]:
        """The images as PIL images of 8 bits, whatever their type.

        >>> images = torch.zeros(1, 3, 8, 8)
        >>> Dall3Output("a cube", images, images, torch.zeros(1, 4).long(), None, torch.arange(1)).to_pil()[0].size
        (8, 8)
        """
        return to_pil(self.images)

    def to_numpy(self) -> np.ndarray:
        """The images as an array of 8 bits: uint8 (n, height, width, 3), whatever their type.

        >>> one = [Image.new("RGB", (8, 8))]
        >>> Dall3Output("a cube", one, one, torch.zeros(1, 4).long(), None, torch.arange(1)).to_numpy().shape
        (1, 8, 8, 3)
        """
        return np.stack([np.asarray(image) for image in self.to_pil()])

    def captions(self) -> list[str]:
        """A caption for each image: CLIP score, seed and candidate number."""
        scores = [None] * len(self) if self.clip_scores is None else self.clip_scores.tolist()
        seed = [f"seed {self.settings['seed']}"] if "seed" in self.settings else []
        return [
            ", ".join([f"{score:.3f}"] * (score is not None) + [*seed, f"draw {candidate}"])
            for score, candidate in zip(scores, self.candidates.tolist(), strict=True)
        ]

    def recipe(self, i: int) -> dict[str, Any]:
        """The recipe of image i, as plain values: prompt, place (the index of the image in the output of the call),
        candidate number, CLIP score, tokens and settings.

        `Dall3Pipeline.repeat` makes the image again from it.
        """
        return {
            "prompt": self.prompt,
            "place": self.settings.get("places", range(len(self)))[i],
            "candidate": int(self.candidates[i]),
            "clip_score": None if self.clip_scores is None else float(self.clip_scores[i]),
            "tokens": self.tokens[i].tolist(),
            "settings": {name: value for name, value in self.settings.items() if name != "places"},
        }

    def labelled(self, i: int) -> Image.Image:
        """A copy of image i whose `info` holds the prompt and the recipe, which are saved as PNG text chunks.

        >>> one = [Image.new("RGB", (8, 8))]
        >>> out = Dall3Output("a cube", one, one, torch.zeros(1, 4).long(), None, torch.arange(1))
        >>> out.labelled(0).info["Description"]
        'a cube'
        """
        image = to_pil(take(self.images, [i]))[0].copy()
        image.info = {"Description": self.prompt, RECIPE: json.dumps(self.recipe(i))}
        return image

    @classmethod
    def load(cls, path: str | Path) -> Dall3Output:
        """Load an output of one image from a PNG that `save` wrote. The coarse image is not in the file.

        Raises ValueError for a file that is not an image or has no recipe, and FileNotFoundError for a missing file.
        """
        opened = open_image(path)
        text = opened.info.get(RECIPE)
        if not isinstance(text, str):
            raise ValueError(f"{path}: has no recipe; expected a PNG saved by dall3")
        image = to_rgb(opened, str(path))
        try:
            recipe = check_recipe(json.loads(text))
            score = recipe["clip_score"]
            return cls(
                prompt=recipe["prompt"],
                images=[image],
                coarse_images=[],
                tokens=torch.tensor([recipe["tokens"]], dtype=torch.int64),
                clip_scores=None if score is None else torch.tensor([float(score)]),
                candidates=torch.tensor([recipe["candidate"]]),
                settings=recipe["settings"] | {"places": [recipe["place"]]},
            )
        except (ValueError, KeyError, RecursionError, OverflowError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"{path}: its recipe is damaged ({reason})") from None

    def grid(self, captions: bool = False) -> Image.Image:
        """All images on one sheet: coarse images in the first row, refined images in the second.

        captions: add a row of captions.
        """
        rows = [self.to_pil()] if self._is_coarse() else [to_pil(self.coarse_images), self.to_pil()]
        grid = make_grid(rows, side=rows[-1][0].width)
        if not captions:
            return grid
        sheet = Image.new("RGB", (grid.width, grid.height + CAPTION_HEIGHT), "white")
        sheet.paste(grid)
        draw, step = ImageDraw.Draw(sheet), (grid.width + 4) / len(self)
        for i, text in enumerate(self.captions()):
            draw.text((step * (i + 0.5) - 2, grid.height + CAPTION_HEIGHT / 2), text, fill="black", anchor="mm")
        return sheet

    def _is_coarse(self) -> bool:
        """Whether the coarse images are missing or the same as the images."""
        return not len(self.coarse_images) or equal(self.images, self.coarse_images)

    def _repr_png_(self) -> bytes:
        return png_bytes(self.grid(captions=True))

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Save the images to a folder, which is created if needed, and return its path.

        Writes `0.png`, `0-coarse.png` and `0.npy` (tokens, int64, upstream's format) for each image, `caption.txt` and
        `settings.json`. Each PNG contains its recipe as text.

        Raises FileExistsError if one of the files exists, before it writes any, unless `overwrite`.
        """
        scores = None if self.clip_scores is None else self.clip_scores.tolist()
        settings = json.dumps(self.settings | {"prompt": self.prompt, "clip_scores": scores}, indent=2)
        files: dict[str, File] = {"caption.txt": self.prompt, "settings.json": settings}
        for i, tokens in enumerate(self.tokens):
            files |= {f"{i}.png": self.labelled(i), f"{i}.npy": tokens.numpy()}
        if not self._is_coarse():
            files |= {f"{i}-coarse.png": coarse for i, coarse in enumerate(to_pil(self.coarse_images))}
        return write_files(Path(folder), files, overwrite)

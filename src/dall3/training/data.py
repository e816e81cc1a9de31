"""What training looks at: pictures with captions, from the rendered world, emoji, folders and webdataset shards.

A source gives item number i the same picture and caption whatever came before, so that a run which resumes at a step
sees what it would have seen, and processes share the numbers out among themselves.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dall3.images import read_picture
from dall3.scenes import caption, random_scene, render
from dall3.scenes.emoji import fetch_emoji, list_emoji, random_emoji_picture, training_pool

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Source(Protocol):
    """Pictures with captions, by number."""

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        """Item number `index` of an endless row: uint8 (side, side, 3) and its caption."""


class Scenes:
    """The rendered world without the pairs of shape and material that are held out."""

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        scene = random_scene(rng)
        return render(scene, side), caption(scene, rng)


class EmojiPictures:
    """Fluent emoji on plain backgrounds without the pairs that are held out; fetched into `folder` where needed."""

    def __init__(self, folder: str | Path) -> None:
        self.pool = training_pool(list_emoji(fetch_emoji(folder), toned=True))

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        return random_emoji_picture(self.pool[shuffled(index, len(self.pool))], rng, side)


class Folder:
    """Pictures of a folder, at any depth, each with a .txt of the same name: a caption a line, one drawn at a time.

    Raises ValueError where there is no picture with a caption.
    """

    def __init__(self, folder: str | Path) -> None:
        found = (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in PICTURES)
        self.paths = [path for path in found if path.with_suffix(".txt").is_file()]
        if not self.paths:
            raise ValueError(
                f"{folder} holds no picture ({', '.join(PICTURES)}) with a .txt of the same name beside it"
            )

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        path = self.paths[shuffled(index, len(self.paths))]
        text = path.with_suffix(".txt").read_text(encoding="utf-8")
        return fit_picture(path.read_bytes(), side, str(path)), choose_line(text, rng)


class Shards:
    """Webdataset shards on disk: tar files in which a picture and a .txt share a name.

    pattern: a path in which * and ? stand for others. Raises ValueError where no shard has a picture with a caption.
    """

    def __init__(self, pattern: str | Path) -> None:
        self.items: list[tuple[str, tuple[int, int], tuple[int, int]]] = []
        for shard in sorted(glob.glob(str(pattern))):
            members: dict[str, dict[str, tuple[int, int]]] = {}
            with tarfile.open(shard) as tar:
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    stem, _, suffix = file.partition(".")
                    kind = "picture" if f".{suffix.lower()}" in PICTURES else suffix.lower()
                    members.setdefault(f"{folder}/{stem}", {})[kind] = (member.offset_data, member.size)
            both = (found for found in members.values() if {"picture", "txt"} <= found.keys())
            self.items += [(shard, found["picture"], found["txt"]) for found in both]
        if not self.items:
            raise ValueError(f"no shard at {pattern} holds a picture ({', '.join(PICTURES)}) and a .txt of one name")

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        shard, *places = self.items[shuffled(index, len(self.items))]
        parts = []
        with open(shard, "rb") as file:
            for offset, size in places:
                file.seek(offset)
                parts.append(file.read(size))
        return fit_picture(parts[0], side, f"a picture in {shard}"), choose_line(parts[1].decode(), rng)


@lru_cache(maxsize=16)
def permutation(epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((epoch, length)).permutation(length)


def shuffled(index: int, length: int) -> int:
    """The place of item `index` in an endless row of shuffled epochs, each place once an epoch."""
    return int(permutation(index // length, length)[index % length])


def fit_picture(data: bytes, side: int, name: str = "the picture") -> np.ndarray:
    """The middle square of an encoded picture, upright and on white where it is transparent: uint8 (side, side, 3).

    name: what an error calls it. Raises ValueError for data that is no picture.
    """
    picture = read_picture(data, name)
    width, height = picture.size
    square, left, top = min(picture.size), (width - min(picture.size)) // 2, (height - min(picture.size)) // 2
    box = (left, top, left + square, top + square)
    resample = Image.Resampling.BOX if square == 2 * side else Image.Resampling.LANCZOS
    return np.asarray(picture.resize((side, side), resample, box))


def choose_line(text: str, rng: np.random.Generator) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return lines[rng.integers(len(lines))]


def open_source(name: str) -> Source:
    """A source by name: "scenes", "emoji" (fetched into a folder of that name) or "emoji:FOLDER", "folder:PATH" or
    "webdataset:PATTERN". Raises ValueError for another.
    """
    kind, _, place = name.partition(":")
    if kind == "scenes":
        return Scenes()
    if kind == "emoji":
        return EmojiPictures(place or kind)
    if kind == "folder" and place:
        return Folder(place)
    if kind == "webdataset" and place:
        return Shards(place)
    raise ValueError(f"data '{name}' is not known; expected scenes, emoji, folder:PATH or webdataset:PATTERN")


class Mixture(Dataset[tuple[Tensor, str]]):
    """Several sources, drawn by weight: item i is a picture, uint8 (3, side, side), and its caption.

    names: as `open_source` takes them, each with "=WEIGHT" behind it or 1. Raises ValueError for a name or a weight
    that is none.
    """

    def __init__(self, names: Sequence[str], side: int, seed: int = 0) -> None:
        parts = [name.partition("=") for name in names]
        try:
            weights = np.array([float(weight or 1) for _, _, weight in parts])
        except ValueError:
            raise ValueError(f"data {' '.join(names)}: a weight is not a number") from None
        if not len(weights) or weights.min() < 0 or not weights.sum():
            raise ValueError(f"data {' '.join(names)}: expected sources with weights from 0, not all of them 0")
        self.sources = [open_source(name) for name, _, _ in parts]
        self.shares, self.side, self.seed = weights / weights.sum(), side, seed

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        rng = np.random.default_rng((self.seed, index))
        source = self.sources[rng.choice(len(self.sources), p=self.shares)]
        picture, text = source.draw(index, rng, self.side)
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))), text


class StepSampler(Sampler[list[int]]):
    """The numbers of this process's items in each of so many steps, from `first_item` on: the processes share out
    what each step takes, and none has what another has.
    """

    def __init__(self, steps: int, batch_size: int, process: int = 0, processes: int = 1, first_item: int = 0) -> None:
        self.steps, self.batch_size, self.first_item = steps, batch_size, first_item
        self.process, self.processes = process, processes

    def ranges(self) -> Iterator[range]:
        for step in range(self.steps):
            start = self.first_item + (step * self.processes + self.process) * self.batch_size
            yield range(start, start + self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.ranges())

    def __len__(self) -> int:
        return self.steps


def loader(data: Dataset[Any], sampler: StepSampler, workers: int) -> DataLoader[Any]:
    """Batches of items, as pictures, uint8 (batch, 3, side, side), and captions, in the sampler's order."""
    return DataLoader(data, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

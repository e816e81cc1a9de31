"""Training data: pictures with captions, from the rendered world, emoji, folders and webdataset shards.

A source gives item number i the same picture and caption whatever came before, so that a run which resumes at a step
sees what it would have seen, and processes share the numbers out among themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dall3.scenes import render
from dall3.scenes.captions import caption
from dall3.scenes.emoji import fetch_emoji, list_emoji, random_emoji_picture, training_pool
from dall3.scenes.scene import random_scene
from dall3.training.files import Folder, Shards, shuffled


class Source(Protocol):
    """Pictures with captions, by number."""

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        """Item number `index` of an endless row: uint8 (side, side, 3) and its caption."""

    def look(self) -> list[str]:
        """What there is and what is odd about it, a statement a line. Raises ValueError where nothing can be read."""


class Scenes:
    """The rendered world without the pairs of shape and material that are held out."""

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        scene = random_scene(rng)
        return render(scene, side), caption(scene, rng)

    def look(self) -> list[str]:
        return ["scenes: rendered as they are needed"]


class EmojiPictures:
    """Fluent emoji on plain backgrounds without the pairs that are held out; fetched into `folder` where needed."""

    def __init__(self, folder: str | Path) -> None:
        self.pool = training_pool(list_emoji(fetch_emoji(folder), toned=True))

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        return random_emoji_picture(self.pool[shuffled(index, len(self.pool))], rng, side)

    def look(self) -> list[str]:
        return [f"emoji: {len(self.pool)} drawings"]


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


def split_weight(name: str) -> tuple[str, float]:
    """A source's name and its weight, 1 where none is given.

    "=" begins a weight only where a number follows and the path does not have it in its name.

    >>> split_weight("scenes=3"), split_weight("folder:/data/date=today")
    (('scenes', 3.0), ('folder:/data/date=today', 1.0))
    """
    source, equals, weight = name.rpartition("=")
    if equals and not os.path.exists(name.partition(":")[2]):
        try:
            return source, float(weight)
        except ValueError:
            pass
    return name, 1.0


class Mixture(Dataset[tuple[Tensor, str]]):
    """Several sources, drawn by weight: item i is a picture, uint8 (3, side, side), and its caption.

    names: as `open_source` takes them, each with "=WEIGHT" behind it or 1. Raises ValueError for a name or a weight
    that is none.
    """

    def __init__(self, names: Sequence[str], side: int, seed: int = 0) -> None:
        parts = [split_weight(name) for name in names]
        weights = np.array([weight for _, weight in parts])
        if not len(weights) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
            raise ValueError(f"data {' '.join(names)}: expected sources with weights from 0, not all of them 0")
        self.sources = [open_source(name) for name, _ in parts]
        self.shares, self.side, self.seed = weights / weights.sum(), side, seed

    def look(self) -> list[str]:
        """What the sources hold and what is odd about it, a statement a line, within seconds.

        Raises ValueError for a source of which nothing can be read.
        """
        return [line for source in self.sources for line in source.look()]

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

"""Training data by item number: images with captions from rendered scenes, emoji, folders and webdataset shards.

An item's number alone determines its image and caption. A resumed run therefore sees the same items, and processes
divide the numbers among themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dall3.scenes import render
from dall3.scenes.captions import caption
from dall3.scenes.emoji import (
    emoji_caption,
    fetch_emoji,
    list_emoji,
    random_background,
    random_emoji_image,
    random_placement,
    training_pool,
)
from dall3.scenes.scene import random_scene
from dall3.scenes.world import Batch
from dall3.training.config import TrainingConfig
from dall3.training.files import Folder, Shards, shuffled
from dall3.training.part import SHOWN, Part, Rows


class Source(Protocol):
    """A map from item numbers to images with captions."""

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        """Item number `index` of an infinite sequence: uint8 (side, side, 3) and its caption."""

    def describe(self, index: int, rng: np.random.Generator) -> str:
        """A caption of item number `index`, without its image."""

    def inspect(self) -> list[str]:
        """Describe the data and anything unusual, one statement per line. Raises ValueError if nothing can be read."""


class Scenes:
    """Rendered scenes without the held-out pairs of shape and material."""

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        scene = random_scene(rng)
        return render(scene, side), caption(scene, rng)

    def describe(self, index: int, rng: np.random.Generator) -> str:
        return caption(random_scene(rng), rng)

    def inspect(self) -> list[str]:
        return ["scenes: rendered during training"]


class EmojiImages:
    """Fluent emoji on plain backgrounds without the held-out pairs, downloaded to `folder` if needed."""

    def __init__(self, folder: str | Path) -> None:
        self.pool = training_pool(list_emoji(fetch_emoji(folder), toned=True))

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        return random_emoji_image(self.pool[shuffled(index, len(self.pool))], rng, side)

    def describe(self, index: int, rng: np.random.Generator) -> str:
        emoji = self.pool[shuffled(index, len(self.pool))]
        background = random_background(emoji, rng)
        return emoji_caption(emoji, background or "white", random_placement(rng)[0], rng)

    def inspect(self) -> list[str]:
        return [f"emoji: {len(self.pool)} drawings"]


def open_source(name: str) -> Source:
    """Open a source by name: "scenes", "emoji" (downloaded to a folder of that name), "emoji:FOLDER", "folder:PATH" or
    "webdataset:PATTERN". Raises ValueError for an unknown name.
    """
    kind, _, place = name.partition(":")
    if kind == "scenes":
        return Scenes()
    if kind == "emoji":
        return EmojiImages(place or kind)
    if kind == "folder" and place:
        return Folder(place)
    if kind == "webdataset" and place:
        return Shards(place)
    raise ValueError(f"data '{name}' is not known; expected scenes, emoji, folder:PATH or webdataset:PATTERN")


def split_weight(name: str) -> tuple[str, float]:
    """Split "SOURCE=WEIGHT" into the source's name and its weight, by default 1.

    "=" starts a weight only if a number follows and no file has the whole name.

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
    """A weighted mixture of sources. Item i is an image, uint8 (3, side, side), and its caption.

    names: sources as in `open_source`, each optionally followed by "=WEIGHT". Raises ValueError for an unknown source
    or an invalid weight.
    """

    def __init__(self, names: Sequence[str], side: int, seed: int = 0) -> None:
        parts = [split_weight(name) for name in names]
        weights = np.array([weight for _, weight in parts])
        if not len(weights) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
            raise ValueError(f"data {' '.join(names)}: expected sources with weights from 0, not all of them 0")
        self.sources = [open_source(name) for name, _ in parts]
        self.shares, self.side, self.seed = weights / weights.sum(), side, seed

    def inspect(self) -> list[str]:
        """Describe the sources and anything unusual, one statement per line. Takes a few seconds.

        Raises ValueError for a source from which nothing can be read.
        """
        return [line for source in self.sources for line in source.inspect()]

    def choose(self, index: int) -> tuple[Source, np.random.Generator]:
        """The source of an item, and the random generator for the item's remaining choices."""
        rng = np.random.default_rng((self.seed, index))
        return self.sources[rng.choice(len(self.sources), p=self.shares)], rng

    def caption(self, index: int) -> str:
        """The caption of an item, without its image."""
        source, rng = self.choose(index)
        return source.describe(index, rng)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        source, rng = self.choose(index)
        image, text = source.draw(index, rng, self.side)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), text


class StepSampler(Sampler[list[int]]):
    """The item numbers of this process in each batch, without end. The processes get disjoint items."""

    def __init__(self, batch_size: int, process: int = 0, processes: int = 1, first_item: int = 0) -> None:
        self.batch_size, self.first = batch_size, first_item + process * batch_size
        self.stride = processes * batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self.batch_size)) for start in count(self.first, self.stride))


class Stream:
    """Batches of a `Mixture` for a part, in order. A resumed run continues with the next items."""

    shares_device = False

    def __init__(self, part: Part, config: TrainingConfig) -> None:
        self.part, self.config, self.batch_size, self.drawn = part, config, config.batch_size, 0
        self.items: Iterator[list[int]] = iter(())
        self.batches: Iterator[tuple[Tensor, list[str]]] = iter(())

    def fill(self, seen: int, drawn: int) -> None:
        c, processes = self.config, self.part.processes
        sampler = StepSampler(c.batch_size, processes.rank, processes.count, seen)
        data, workers = Mixture(c.data, c.side, c.seed), c.workers
        self.drawn, self.items = seen, iter(sampler)
        self.batches = iter(DataLoader(data, batch_sampler=sampler, num_workers=workers))

    def next(self, elapsed: float) -> Rows:
        self.drawn += self.batch_size * self.part.processes.count
        images, captions = next(self.batches)
        return self.rows(images, captions, next(self.items))

    def sample(self) -> Rows:
        """The rows of a fixed batch, chosen with another seed than the training batches."""
        mixture = Mixture(self.config.data, self.config.side, self.config.seed + 1)
        images, captions = zip(*(mixture[i] for i in range(SHOWN)), strict=True)
        return self.rows(torch.stack(images), captions, range(SHOWN))

    @torch.no_grad()
    def rows(self, images: Tensor, captions: Sequence[str], numbers: Sequence[int]) -> Rows:
        batch = Batch(images.to(self.part.processes.device, non_blocking=True), list(captions))
        return self.part.rows(batch, numbers)

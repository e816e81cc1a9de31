"""Images with captions on disk: folders and webdataset shards.

An unreadable image is replaced by another one. The item's number alone determines which, so that a resumed run and any
number of processes see the same items.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dall3.errors import require
from dall3.formatting import counted
from dall3.images import read_rgb
from dall3.tar import Member, read_members

logger = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
INSPECT_SECONDS = 5.0  # time that `inspect` reads images for
MAX_BYTES, MAX_CAPTION_BYTES = 256 << 20, 1 << 20
MAX_SHARDS = 1_000_000
NAMED = 5  # maximum number of unreadable images that `inspect` names; the others are only counted

reported: set[str] = set()  # warnings that this process has already printed


@lru_cache(maxsize=16)
def permutation(epoch: int, length: int) -> np.ndarray:
    """The order of the items in an epoch: a random permutation of 0 … length - 1."""
    return np.random.default_rng((epoch, length)).permutation(length)


def shuffled(index: int, length: int) -> int:
    """The file number of item `index` in an infinite sequence of shuffled epochs; each occurs once per epoch."""
    return int(permutation(index // length, length)[index % length])


class CaptionedFiles(ABC):
    """Numbered images, each with a text of one caption per line.

    place: the location, for messages. length: number of images. notes: anything unusual about the files' names and
    locations. unreadable: the reason, by number, for each image known to be unreadable.
    """

    def __init__(self, place: str, length: int, notes: list[str]) -> None:
        self.place, self.length, self.notes = place, length, notes
        self.unreadable: dict[int, str] = {}

    @abstractmethod
    def name(self, number: int) -> str:
        """The name of an image in error messages."""

    @abstractmethod
    def read_image(self, number: int) -> bytes:
        """The bytes of an image. Raises OSError or ValueError."""

    @abstractmethod
    def read_captions(self, number: int) -> bytes:
        """The bytes of an image's captions. Raises OSError or ValueError."""

    def captions(self, number: int) -> list[str]:
        """The captions of an image, one empty one if there is none. Raises OSError or ValueError."""
        try:
            lines = self.read_captions(number).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{self.name(number)}: its caption is not UTF-8") from None
        return [line.strip() for line in lines if line.strip()] or [""]

    def item(self, number: int, side: int) -> tuple[np.ndarray, list[str]]:
        """The image, uint8 (side, side, 3), and its captions. Raises OSError or ValueError if it is unreadable."""
        captions = self.captions(number)
        return fit_image(self.read_image(number), side, self.name(number)), captions

    def describe(self, index: int, rng: np.random.Generator) -> str:
        """A caption of item number `index`, without reading its image; empty if it is unreadable."""
        try:
            captions = self.captions(shuffled(index, self.length))
        except (OSError, ValueError):
            return ""
        return captions[rng.integers(len(captions))]

    def draw(self, index: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
        """Item number `index` of an infinite sequence: the image, uint8 (side, side, 3), and one of its captions.

        Raises ValueError if no image can be read.
        """
        first = shuffled(index, self.length)
        for number in ((first + i) % self.length for i in range(self.length)):
            if number in self.unreadable:
                continue
            try:
                image, captions = self.item(number, side)
            except (OSError, ValueError) as error:
                self.unreadable[number] = str(error)
                if str(error) not in reported:
                    reported.add(str(error))
                    logger.warning("%s; replaced by another image (%d so far)", error, len(self.unreadable))
                continue
            return image, captions[rng.integers(len(captions))]
        raise ValueError(f"{self.place}: none of the {self.length} images can be read: {self.unreadable[first]}")

    def inspect(self) -> list[str]:
        """Count images and captions and describe anything unusual, after reading images for a few seconds.

        Raises ValueError if none of those can be read.
        """
        captions = empty = tried = 0
        bad: list[str] = []
        until = time.monotonic() + INSPECT_SECONDS
        for number in permutation(0, self.length).tolist():
            try:
                found = self.item(number, 8)[1]
            except (OSError, ValueError) as error:
                self.unreadable[number] = str(error)
                bad.append(str(error))
            else:
                captions += len(found)
                empty += found == [""]
            tried += 1
            if time.monotonic() > until:
                break
        tried_all = tried == self.length
        if len(bad) == tried:
            raise ValueError(f"{self.place}: none of the {tried} images that were tried can be read: {bad[0]}")
        where = "" if tried_all else f" in the {tried} that were tried"
        lines = [f"{self.place}: {counted(self.length, 'image')}, {counted(captions, 'caption')}{where}", *self.notes]
        if bad:
            of = "" if tried_all else f" of {tried}"
            lines.append(f"{self.place}: unreadable images, which are replaced by others: {len(bad)}{of}")
            named = sorted(bad)[:NAMED]
            reported.update(named)
            lines += [f"    {reason}" for reason in named] + ["    …"] * (len(bad) > NAMED)
        lines += [f"{self.place}: images with an empty caption: {empty}"] if empty else []
        return lines


class Folder(CaptionedFiles):
    """Images at any depth of a folder, each with a .txt of the same name and one caption per line.

    An item has one of the captions, chosen at random. Names that begin with a dot are ignored. Raises ValueError if no
    image has a caption.
    """

    def __init__(self, folder: str | Path) -> None:
        self.paths: list[str] = []
        notes: list[str] = []
        without_caption = 0
        for parent, folders, files in os.walk(folder, onerror=lambda error: notes.append(f"ignored: {error}")):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = set(files)
            for name in files:
                stem, dot, suffix = name.rpartition(".")
                if stem and f"{dot}{suffix}".lower() in IMAGES and not name.startswith("."):
                    if f"{stem}.txt" in names:
                        self.paths.append(os.path.join(parent, name))
                    else:
                        without_caption += 1
        self.paths.sort(key=lambda path: path.split(os.sep))
        kinds = ", ".join(IMAGES)
        require(bool(self.paths), f"{folder} has no image ({kinds}) with a .txt of the same name beside it")
        ignored = f"{folder}: images that are ignored, because they have no .txt of the same name: {without_caption}"
        notes += [ignored] if without_caption else []
        super().__init__(str(folder), len(self.paths), notes)

    def name(self, number: int) -> str:
        return self.paths[number]

    def read_image(self, number: int) -> bytes:
        return read_plain(self.paths[number], MAX_BYTES)

    def read_captions(self, number: int) -> bytes:
        return read_plain(self.paths[number].rpartition(".")[0] + ".txt", MAX_CAPTION_BYTES)


def read_plain(path: str, most: int) -> bytes:
    """The bytes of a file. Raises ValueError for a pipe or a device, and for more than `most` bytes."""
    about = os.stat(path)
    require(stat.S_ISREG(about.st_mode), f"{path}: not a regular file")
    require(about.st_size <= most, f"{path}: {about.st_size:,} bytes; expected at most {most:,}")
    return Path(path).read_bytes()


class Shards(CaptionedFiles):
    """Webdataset shards on disk: tar files in which an image and its .txt have the same name.

    pattern: a path with * and ? as in a shell, {000..012} for a range and {a,b} for alternatives. The complete images
    of a truncated shard are used. Names that begin with a dot are ignored.

    Raises ValueError for a shard that is missing, compressed or not a tar, or contains links, devices or sparse files,
    and if no shard has an image with a caption.
    """

    def __init__(self, pattern: str | Path) -> None:
        self.items: list[tuple[str, Member, Member]] = []
        notes: list[str] = []
        for shard in find_shards(str(pattern)):
            found, whole = read_members(shard)
            pairs = captioned(found)
            self.items += [(shard, image, text) for image, text in pairs]
            if not whole:
                notes.append(f"{shard}: is truncated; complete images, which are used: {len(pairs)}")
            elif not pairs:
                notes.append(f"{shard}: has no image with a .txt of the same name")
        kinds = ", ".join(IMAGES)
        missing = [f"no shard at {pattern} has an image ({kinds}) and a .txt of the same name"]
        require(bool(self.items), "; ".join(missing + notes[:1]))
        super().__init__(str(pattern), len(self.items), notes)

    def name(self, number: int) -> str:
        shard, image, _ = self.items[number]
        return f"{shard}: {image.name}"

    def read_image(self, number: int) -> bytes:
        shard, image, _ = self.items[number]
        return read_member(shard, image, MAX_BYTES)

    def read_captions(self, number: int) -> bytes:
        shard, _, text = self.items[number]
        return read_member(shard, text, MAX_CAPTION_BYTES)


def read_member(shard: str, member: Member, most: int) -> bytes:
    """The bytes of a file in a shard. Raises ValueError for more than `most` bytes."""
    require(member.size <= most, f"{shard}: {member.name}: {member.size:,} bytes; expected at most {most:,}")
    with open(shard, "rb") as file:
        file.seek(member.start)
        return file.read(member.size)


def captioned(members: Iterable[Member]) -> list[tuple[Member, Member]]:
    """The images of a shard with their captions: files whose names are equal up to the first dot."""
    found: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, _, file = member.name.rpartition("/")
        if any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/")):
            continue
        stem, _, suffix = file.partition(".")
        kind = "/image" if f".{suffix.lower()}" in IMAGES else suffix.lower()  # no suffix contains a slash
        found.setdefault(f"{folder}/{stem}", {})[kind] = member
    return [(one["/image"], one["txt"]) for one in found.values() if {"/image", "txt"} <= one.keys()]


def find_shards(pattern: str) -> list[str]:
    """The files that match a pattern, in order. Raises ValueError if an expanded part of it matches none."""
    shards: list[str] = []
    for part in expand_braces(pattern):
        # An existing file is taken literally, even if its name contains wildcards.
        found = [part] if os.path.exists(part) else sorted(glob.glob(part))
        require(bool(found), f"no shard at {part}")
        for shard in found:
            require(os.path.isfile(shard), f"{shard} is not a regular file; expected a tar")
        shards += found
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as shells and webdataset do.

    >>> expand_braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    names = [""]
    rest = pattern
    while found := re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{},]*(?:,[^{},]*)+))\}", rest):
        first, last, listed = found.groups()
        if listed is None:
            count = int(last) - int(first) + 1
            require(0 < count <= MAX_SHARDS, f"{pattern}: expected {{from..to}} with at most {MAX_SHARDS:,} numbers")
            width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
            choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
        else:
            choices = listed.split(",")
        require(len(names) * len(choices) <= MAX_SHARDS, f"{pattern}: more than {MAX_SHARDS:,} names")
        names = [name + rest[: found.start()] + choice for name in names for choice in choices]
        rest = rest[found.end() :]
    return [name + rest for name in names]


def fit_image(data: bytes, side: int, name: str = "the image") -> np.ndarray:
    """Decode an image and return its central square: uint8 (side, side, 3), upright, composited on white.

    name: name in error messages. Raises ValueError for data that is not an image.
    """
    image = read_rgb(data, name)
    width, height = image.size
    square = min(image.size)
    left, top = (width - square) // 2, (height - square) // 2
    box = (left, top, left + square, top + square)
    resample = Image.Resampling.BOX if square == 2 * side else Image.Resampling.LANCZOS
    return np.asarray(image.resize((side, side), resample, box))

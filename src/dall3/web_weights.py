"""The weights that the page offers: those that are on this machine, and those that can be fetched."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dall3.errors import FetchError, require
from dall3.formatting import size_text
from dall3.pipeline import Dall3Pipeline
from dall3.tokens.batching import free_memory
from dall3.weights.cache import CachedFile, file_size, files_of, size_of, with_suffix_added
from dall3.weights.find import fetch_set
from dall3.weights.registry import WeightsSet, read_registry

POLL = 0.5  # seconds between two looks at a download


@dataclass(frozen=True)
class Choice:
    """A set of weights. size: disk space as text, "" if unknown. here: whether all files are on this machine."""

    name: str
    about: str
    size: str
    here: bool


class Shelf:
    """Weights by name, loaded when they are chosen. One other pipeline than `pipe` is in memory at a time.

    pipe: the pipeline that is there already. own: its name. fetching: whether sets may be downloaded.
    """

    def __init__(self, pipe: Dall3Pipeline, own: str = "bundled", fetching: bool = False) -> None:
        self.pipe, self.own, self.fetching = pipe, own, fetching
        self.loaded: tuple[str, Dall3Pipeline] = own, pipe
        self.lock = threading.Lock()

    def choices(self) -> list[Choice]:
        """The sets that draw, with the page's own first."""
        found = [Choice(self.own, "the weights that the page was started with", "", True)]
        for weights in sets_that_draw().values():
            if weights.name not in (self.own, "mini"):  # mini is the bundled one
                wanted = files_of(weights)
                here = all(one.find() is not None for one in wanted)
                found.append(Choice(weights.name, weights.about, disk_space(weights), here))
        return found

    def peek(self, name: str) -> Dall3Pipeline | None:
        """The pipeline of a set, None if it is not in memory."""
        loaded, pipe = self.loaded
        return self.pipe if name == self.own else pipe if name == loaded else None

    def get(self, name: str) -> Dall3Pipeline:
        """The pipeline of a set that is on this machine. Raises ValueError for any other name, and for weights that do
        not fit the free memory.
        """
        with self.lock:
            if name == self.own:
                return self.pipe
            if self.loaded[0] != name:
                known = {choice.name: choice for choice in self.choices()}
                require(name in known, f"the weights {name!r:.60} are not known; choose among those listed")
                require(known[name].here, f"the weights {name} are not on this machine; fetch them first")
                self.loaded = self.own, self.pipe  # frees the memory of the last ones before the next are loaded
                self.check_memory(name)
                dtype = None if self.pipe.dtype == torch.float32 else self.pipe.dtype
                pipe = Dall3Pipeline.from_pretrained(name, device=self.pipe.device, dtype=dtype, progress=False)
                self.loaded = name, pipe
            return self.loaded[1]

    def check_memory(self, name: str) -> None:
        """Raise ValueError if the networks of a set that draw are larger than the free memory of the device."""
        weights, device = sets_that_draw()[name], self.pipe.device
        files = [one for one in files_of(weights) if one.part.name in ("transformer", "vqgan")]
        # Weights in float32, the largest that files have, are converted to the dtype of the page's pipeline.
        least = sum(map(file_size, files)) * self.pipe.dtype.itemsize // 4
        free = free_memory(device)
        words = f"the weights {name} need at least {size_text(least)} of memory"
        words += f" ({weights.needs})" if weights.needs else ""
        fits = free is None or least <= free
        require(fits, f"{words}, and {device} has {size_text(free or 0)} free; choose smaller weights")

    def fetch(self, name: str) -> Iterator[tuple[int, int]]:
        """Download a set; yields the bytes that are there and the bytes in all. Raises ValueError or FetchError.

        The download goes on if the iteration ends before it.
        """
        require(self.fetching, "this page fetches no weights; run `dall3 weights fetch` on its machine")
        known = sets_that_draw()
        require(name in known, f"the weights {name!r:.60} are not known; choose among those listed")
        wanted, problem = files_of(known[name]), list[Exception]()

        def work() -> None:
            try:
                fetch_set(known[name], progress=False)
            except Exception as error:  # told to whoever waits
                problem.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            yield sum(map(bytes_here, wanted)), sum(map(file_size, wanted))
            time.sleep(POLL)
        if problem:
            raise problem[0] if isinstance(problem[0], ValueError | OSError) else FetchError(str(problem[0]))
        yield sum(map(bytes_here, wanted)), sum(map(bytes_here, wanted))


def sets_that_draw() -> dict[str, WeightsSet]:
    """The sets of weights.toml with a transformer and its tokenizer, by name."""
    needed = {"tokenizer", "transformer"}
    return {name: one for name, one in read_registry().items() if needed <= {part.name for part in one.parts}}


def disk_space(weights: WeightsSet) -> str:
    """The disk space of a set as text: as weights.toml states it, else the sum of its files; "" if unknown."""
    stated, found, _ = weights.needs.partition(" of disk")
    sizes = [file_size(one) for one in files_of(weights)]
    known = f"{'' if all(sizes) else 'at least '}{size_text(sum(sizes))}" if any(sizes) else ""
    return stated if found else known


def bytes_here(wanted: CachedFile) -> int:
    path = wanted.find()
    return path.stat().st_size if path else size_of(with_suffix_added(wanted.target, ".part"))

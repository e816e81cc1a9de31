"""A progress bar for loading large weights. Each tensor that is read from its file advances it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

LARGE = 200_000_000  # bytes from which loading shows a bar
BAR: ContextVar[Any] = ContextVar("BAR", default=None)


@contextmanager
def loading_bar(files: Iterable[Path], progress: bool) -> Iterator[None]:
    """Show a bar in bytes while the `with` block loads the files, if they are large and `progress` is True."""
    total = sum(file.stat().st_size for file in files if file.is_file())
    with tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, disable=not progress or total < LARGE, delay=0.5
    ) as bar:
        token = BAR.set(bar)
        try:
            yield
            bar.update(total - bar.n)  # tensors that stay memory-mapped are not read
        finally:
            BAR.reset(token)


def advance(tensor: Tensor) -> None:
    """Advance the bar, if there is one, by the size of a tensor that was read from its file."""
    bar = BAR.get()
    if bar is not None:
        bar.update(min(tensor.nbytes, bar.total - bar.n))

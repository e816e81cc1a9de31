"""How many candidates or pictures are worked on at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

from dall3.models.interface import ImageTokenTransformer
from dall3.tokens.sampling import Sampling

MOST_AT_ONCE = {"cpu": 32}  # candidates, by type of device; 256 on others: more are not faster


def memory_for_caches(transformer: ImageTokenTransformer[Any], device: torch.device) -> int:
    """Bytes that the caches of a draw may take on a device.

    On CUDA half of the memory that the weights leave of the device: that number is the same at every call, whatever
    the allocator has reserved. On a CPU half of the memory that the machine has available.
    """
    if device.type == "cuda":
        weights = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
        return (int(torch.cuda.mem_get_info(device)[1]) - weights) // 2
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024 // 2
    return 2 * 2**30


def fitting_batch_size(transformer: ImageTokenTransformer[Any], settings: Sampling) -> int:
    """Candidates to draw at a time: a power of two whose caches fit the memory for them."""
    device = transformer.head[0].device
    room = memory_for_caches(transformer, device) // transformer.cache_bytes(1 if settings.cond_scale == 1 else 2, 1)
    most = min(max(room, 1), MOST_AT_ONCE.get(device.type, 256))
    return int(2 ** (most.bit_length() - 1))


T = TypeVar("T")


def batches_that_fit(count: int, size: int, work: Callable[[range], Iterator[T]]) -> Iterator[tuple[range, T]]:
    """What `work` yields on ranges of `size` numbers, one after the other, up to `count`, each with its range.

    Where the device's memory does not hold a batch, half of it is tried from its beginning.
    """
    start = 0
    while start < count:
        batch, fits = range(start, min(start + size, count)), True
        try:
            for step in work(batch):
                yield batch, step
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            fits = False
        if fits:
            start = batch.stop
        else:  # outside of the handler, whose traceback holds on to the batch's tensors
            size = len(batch) // 2
            torch.cuda.empty_cache()

"""Free memory, and batch sizes that fit it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

from dall3.models.interface import ImageTokenTransformer
from dall3.tokens.sampling import Sampling

MAX_BATCH_SIZES = {"cpu": 32}  # by device type, 256 elsewhere; larger batches are not faster


def free_memory(device: torch.device) -> int | None:
    """Free memory of a device in bytes, None if unknown.

    On CUDA, memory that the allocator has reserved and does not use counts as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    with suppress(OSError, KeyError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def memory_for_caches(transformer: ImageTokenTransformer[Any], device: torch.device) -> int:
    """Memory budget for key/value caches on a device, in bytes.

    On CUDA: half of the device's total memory without the weights. It does not depend on what the allocator has
    reserved, so it is the same at every call. On a CPU: half of the free memory, or 2 GiB if that is unknown.
    """
    if device.type == "cuda":
        weights = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
        return (int(torch.cuda.mem_get_info(device)[1]) - weights) // 2
    free = free_memory(torch.device("cpu"))
    return 2 * 2**30 if free is None else free // 2


def fitting_batch_size(transformer: ImageTokenTransformer[Any], settings: Sampling, device: torch.device) -> int:
    """Candidates per batch: the largest power of two whose caches fit `memory_for_caches`, up to `MAX_BATCH_SIZES`.

    device: the device on which tokens are drawn, which is not the device of a transformer that is offloaded now.
    """
    room = memory_for_caches(transformer, device) // transformer.cache_bytes(1 if settings.cond_scale == 1 else 2, 1)
    largest = min(max(room, 1), MAX_BATCH_SIZES.get(device.type, 256))
    return int(2 ** (largest.bit_length() - 1))


T = TypeVar("T")


def batches_that_fit(count: int, size: int, work: Callable[[range], Iterator[T]]) -> Iterator[tuple[range, T]]:
    """Run `work` on consecutive ranges of up to `size` indices below `count`; yield its values with their range.

    When CUDA runs out of memory, the batch size is halved and the batch is started again. Raises
    torch.cuda.OutOfMemoryError if a batch of one does not fit.
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
        else:  # outside of the handler, whose traceback keeps the batch's tensors alive
            size = len(batch) // 2
            torch.cuda.empty_cache()

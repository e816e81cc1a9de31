"""The processes that train one part together, started by torchrun, each on a device."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Processes:
    """The device of this process, its rank, and the number of processes."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def layout(self) -> torch.memory_format:
        """The memory format for convolutions. On a CPU, group normalization is slow in channels_last."""
        return torch.contiguous_format if self.device.type == "cpu" else torch.channels_last

    def wrap(self, part: nn.Module) -> nn.Module:
        """The module whose gradients are averaged over the processes."""
        if self.count == 1:
            return part
        # Some parameters have no gradient in every step: the discriminator's before its start.
        return nn.parallel.DistributedDataParallel(part, find_unused_parameters=True, broadcast_buffers=False)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.count > 1:
            distributed.all_reduce(value)
        return value / self.count

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Synchronizes with the device."""
        return flag if self.count == 1 else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, without gradients."""
        if self.count == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.count)]
        distributed.all_gather(found, rows.detach().contiguous())
        return torch.cat(found)

    def gather_with_gradients(self, rows: Tensor) -> Tensor:
        """The rows of all processes, with gradients to those of every process."""
        if self.count == 1:
            return rows
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(rows.contiguous())))

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of the rows of all processes."""
        return rows.chunk(self.count)[self.rank]


def join_processes(device: str | torch.device | None = None) -> Processes:
    """Join the process group of a launcher, if there is one.

    device: default: the accelerator of this process, or the CPU. ACCELERATE_USE_CPU=true forces the CPU.
    """
    count, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device is None:
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
        device = "cpu" if on_cpu else f"{torch.accelerator.current_accelerator()}:{local}"
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if count == 1:
        return Processes(device)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=1))
        atexit.register(distributed.destroy_process_group)  # its threads may abort the process at exit
    return Processes(device, distributed.get_rank(), count)

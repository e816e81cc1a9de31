"""CUDA graphs: the kernels of a function are captured once and then launched together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

CAPTURING = threading.RLock()  # held during a capture: one at a time in a process
WARMUP_RUNS = 2  # libraries are initialised and kernels compiled in these, which is not allowed during a capture


class CudaGraph:
    """A CUDA graph of a function of tensors on one GPU.

    function: runs on static copies of `inputs`, which `__call__` overwrites, and on any other tensors that it refers
    to. Their addresses, and those of the weights of `modules`, are part of the graph. It must not synchronise with the
    host. It runs WARMUP_RUNS times before the capture, so repeating its side effects must be harmless. The graph does
    not keep the function; keep: an object that it keeps, for the tensors that the function reads from there.

    `__call__` takes inputs of the same shapes and returns the same output tensors every time, with new values.

    Other threads may use the GPU during a capture: the capture is thread-local, and only an unsupported call of the
    capturing thread invalidates it. Captures wait for each other. A graph must not be called by two threads at a time.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *inputs: Tensor,
        device: torch.device,
        modules: Iterable[nn.Module] = (),
        keep: Any = None,
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.keep = keep
        # References, so that no other tensor can get the address of one that the graph reads.
        self.weights = [tensor.detach() for tensor in tensors_of(modules)]
        with CAPTURING, torch.cuda.device(device):  # may differ from the current device
            warmup = torch.cuda.Stream()
            warmup.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warmup):
                for _ in range(WARMUP_RUNS):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(warmup)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            self.graph = torch.cuda.CUDAGraph()
            # PyTorch's default stream for captures belongs to the device of the first capture of the process.
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self.output = function(*self.inputs)
            # Memory that the graph holds for as long as it exists, about: other threads may have allocated some of it.
            self.bytes = max(torch.cuda.memory_reserved() - before, 0)

    def __call__(self, *inputs: Tensor) -> Any:
        for static_input, tensor in zip(self.inputs, inputs, strict=True):
            static_input.copy_(tensor)
        self.graph.replay()
        return self.output

    def reads(self, modules: Iterable[nn.Module]) -> bool:
        """Whether the weights of `modules` are still the tensors that the graph was captured with."""
        now = [(tensor.data_ptr(), tensor.shape) for tensor in tensors_of(modules)]
        return now == [(tensor.data_ptr(), tensor.shape) for tensor in self.weights]


def tensors_of(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    """The parameters and buffers of modules."""
    return chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)

"""CUDA graphs: the kernels of a function are recorded once, and launched together from then on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

CAPTURING = threading.RLock()  # one capture at a time; whoever moves weights to a GPU in a thread holds it too


class CudaGraph:
    """A function of tensors on one GPU, recorded for the shapes of the inputs it is made with.

    The function runs once before it is recorded, on those inputs: what it writes elsewhere it has to be able to write
    twice. The output is the same tensor every time.

    Other threads may use the GPU during a capture. The capture is thread-local: only a call of the capturing thread
    that cannot be recorded ends it. Captures, and work that takes `CAPTURING`, wait for each other.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        with CAPTURING, torch.cuda.device(self.inputs[0].device):  # which need not be the current one
            aside = torch.cuda.Stream()  # the first run, which sets up libraries, may not be on the recorded stream
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                function(*self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.output

"""CUDA graphs: the kernels of a function are captured once and then launched together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

CAPTURING = threading.RLock()  # held during a capture, and by threads that move weights to a GPU


class CudaGraph:
    """A CUDA graph of a function of tensors on one GPU, captured for the shapes of `inputs`.

    The function runs once on `inputs` before the capture, so writing its side effects twice must be harmless. Calls
    take inputs of the same shapes and return the same output tensor every time, with new values.

    Other threads may use the GPU during a capture: the capture is thread-local, and only an unsupported call of the
    capturing thread invalidates it. Captures, and work that holds `CAPTURING`, wait for each other.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        with CAPTURING, torch.cuda.device(self.inputs[0].device):  # may differ from the current device
            warmup = torch.cuda.Stream()  # the first run initialises libraries, which is not allowed while capturing
            warmup.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warmup):
                function(*self.inputs)
            torch.cuda.current_stream().wait_stream(warmup)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for static_input, tensor in zip(self.inputs, inputs, strict=True):
            static_input.copy_(tensor)
        self.graph.replay()
        return self.output

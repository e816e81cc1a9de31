"""A function recorded once as a CUDA graph: a GPU is given its kernels all at once, not one by one by Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraph:
    """A function of tensors on one GPU, with the shapes of the inputs it is made with.

    It runs once before it is recorded, on those inputs: what it writes elsewhere it has to be able to write twice. The
    output is the same tensor every time.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        with torch.cuda.device(self.inputs[0].device):  # which need not be the current one
            aside = torch.cuda.Stream()  # the first run, which sets up libraries, may not be on the recorded stream
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                function(*self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.output

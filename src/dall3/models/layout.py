"""Memory layout of convolution weights."""

from __future__ import annotations

import torch
from torch import nn


def set_memory_layout(model: nn.Module) -> None:
    """Convert a network's convolution weights to channels-last, the fastest layout for convolutions, in place.

    On a CPU, tensors are also aligned to 64 bytes. PyTorch allocates aligned memory, but tensors mapped from a file may
    be unaligned. AVX-512 kernels can round differently for them, and the same weights must give the same images.
    """
    last = torch.channels_last
    for parameter in model.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=last):
            parameter.data = parameter.data.contiguous(memory_format=last)
        elif parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()

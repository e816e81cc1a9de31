"""Weights where a network's convolutions read them fastest."""

from __future__ import annotations

import torch
from torch import nn


def lay_out(model: nn.Module) -> None:
    """Put a network's weights channels last, as convolutions want them. On a CPU every tensor then begins at a multiple
    of 64 bytes, as torch allocates it and a mapped file need not: AVX-512 kernels may round otherwise elsewhere, and
    the same weights are to give the same pictures.
    """
    last = torch.channels_last
    for parameter in model.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=last):
            parameter.data = parameter.data.contiguous(memory_format=last)
        elif parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()

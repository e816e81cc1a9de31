"""Alignment of weights: results do not depend on where a mapped file puts the tensors in memory."""

import copy

import torch

from dall3.models.layout import set_memory_layout
from dall3.models.unet import UNet, UNetConfig


def displaced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins 8 bytes after a multiple of 64, as tensors of a mapped safetensors file can."""
    room = torch.empty(tensor.numel() + 32)
    start = -room.data_ptr() % 64 // 4 + 2
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def test_a_networks_results_do_not_depend_on_the_alignment_of_its_weights():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(64, (1, 2), 1, (1,), 64, num_heads=2)).requires_grad_(False)
    there = copy.deepcopy(unet)
    for parameter in there.parameters():
        parameter.data = displaced(parameter.data)
    x, t = torch.randn(1, 3, 64, 64), torch.tensor([500.0])
    for network in (unet, there):
        set_memory_layout(network)
        set_memory_layout(network)  # a second time changes nothing
        assert all(parameter.data_ptr() % 64 == 0 for parameter in network.parameters())
        assert network.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(unet(x, t), there(x, t))
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), there.parameters(), strict=True))

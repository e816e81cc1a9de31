"""Group normalisation: the gradient equals that of PyTorch in every memory layout, also for trainable weights."""

import pytest
import torch
import torch.nn.functional as F

from dall3.models.group_norm import FrozenGroupNorm, GroupNorm, group_norm

LAST = torch.channels_last


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return (x + 2).to(dtype, memory_format=LAST).requires_grad_(), weight.to(dtype), bias.to(dtype), pull.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("shape, groups", [((2, 64, 16, 12), 32), ((1, 32, 8, 8), 32), ((3, 96, 4, 4), 8)])
def test_the_gradient_in_channels_last_equals_group_norms(shape, groups, dtype, tolerance):
    x, weight, bias, pull = make(shape, dtype)
    out = group_norm(x, groups, weight, bias, 1e-5)
    assert type(out.grad_fn).__name__ == f"{FrozenGroupNorm.__name__}Backward"
    assert torch.equal(out, F.group_norm(x, groups, weight, bias, 1e-5))
    exact = x.detach().double().requires_grad_()
    F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5).backward(pull.double())
    for layout in (LAST, torch.contiguous_format):  # any following layer
        (found,) = torch.autograd.grad(out, x, pull.contiguous(memory_format=layout), retain_graph=True)
        assert found.dtype == dtype and found.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(found.double(), exact.grad, rtol=0, atol=tolerance)


def test_trained_weights_and_other_layouts_get_their_gradients():
    x, _, _, pull = make((2, 64, 8, 8), torch.float32)
    norm = GroupNorm(32, 64)
    norm(x).backward(pull)
    plain = torch.nn.GroupNorm(32, 64)
    plain(x).backward(pull)
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad)
    torch.testing.assert_close(norm.bias.grad, plain.bias.grad)
    rows = torch.randn(2, 64, 5, requires_grad=True)  # the layout of attention
    norm.requires_grad_(False)(rows).sum().backward()
    assert rows.grad is not None

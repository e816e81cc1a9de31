"""Group normalisation (arXiv 1803.08494) whose gradient a CPU finds fast in channels-last layout, too.

That layout is what convolutions are fastest in, but torch's own gradient of the normalisation takes up to ten times
as long in it as in the other one, which is more than the convolutions gain.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (batch, channels, height, width), normalised over each group of channels, times weight plus bias."""
    wanted = torch.is_grad_enabled() and x.requires_grad and not (weight.requires_grad or bias.requires_grad)
    if wanted and x.device.type == "cpu" and x.dim() == 4 and is_channels_last(x):
        out: Tensor = FrozenGroupNorm.apply(x, groups, weight, bias, eps)
        return out
    return F.group_norm(x, groups, weight, bias, eps)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class FrozenGroupNorm(torch.autograd.Function):
    """With weight and bias that take no gradient: one reading of x and its gradient for two sums a channel, from which
    three factors a channel follow, and another reading to apply them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        out, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        groups, share = mean.shape[1], mean.shape[1] / channels / height / width
        rows, pull = (tensor.permute(0, 2, 3, 1).reshape(batch, -1, channels) for tensor in (x, gradient))
        # With y = (x - mean) · rstd and g = gradient · weight: rstd · (g - mean of g - y · mean of g · y).
        sums = torch.stack([t.sum(1, dtype=torch.float32) for t in (pull, pull * rows)]) * (weight * share)
        pulled, along = sums.view(2, batch, groups, -1).sum(-1)
        slope = (mean * pulled - along) * rstd**3
        offset = -(pulled * rstd + slope * mean)
        factors = torch.stack((rstd.float(), slope, offset)).repeat_interleave(channels // groups, -1)
        rstd, slope, offset = factors.to(x.dtype).unsqueeze(2)
        found = torch.addcmul(offset, rows, slope).addcmul_(pull, rstd * weight)
        return found.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None, None, None

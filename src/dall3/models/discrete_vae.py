"""Discrete VAEs: DALLE-pytorch's DiscreteVAE, and OpenAI's dVAE (arXiv 2102.12092, appendix A)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dall3.models.vqgan import square_side


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """Configuration of a `DiscreteVAE`, with DALLE-pytorch's names.

    normalization: mean and standard deviation of each channel, for images in [0, 1]; None for no normalisation.
    """

    image_size: int  # side of the input in pixels
    num_tokens: int
    codebook_dim: int
    num_layers: int
    num_resnet_blocks: int
    hidden_dim: int
    channels: int = 3
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class ResBlock(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self, c: int) -> None:
        super().__init__()
        wide = nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.ReLU()
        self.net = nn.Sequential(*wide, nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class DiscreteVAE(nn.Module):
    """DALLE-pytorch's DiscreteVAE (`dalle_pytorch.py`): strided convolutions and a codebook.

    One code represents a square with sides of 2^num_layers pixels.
    """

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_tokens, self.downsampling, hidden = c.num_tokens, 2**c.num_layers, c.hidden_dim
        encoder: list[nn.Module] = []
        for width in [c.channels] + [hidden] * (c.num_layers - 1):
            encoder.append(nn.Sequential(nn.Conv2d(width, hidden, 4, stride=2, padding=1), nn.ReLU()))
        encoder += [ResBlock(hidden) for _ in range(c.num_resnet_blocks)]
        decoder: list[nn.Module] = [nn.Conv2d(c.codebook_dim, hidden, 1)] if c.num_resnet_blocks else []
        decoder += [ResBlock(hidden) for _ in range(c.num_resnet_blocks)]
        for width in [hidden if decoder else c.codebook_dim] + [hidden] * (c.num_layers - 1):
            decoder.append(nn.Sequential(nn.ConvTranspose2d(width, hidden, 4, stride=2, padding=1), nn.ReLU()))
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(hidden, c.num_tokens, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(hidden, c.channels, 1))
        self.codebook_embedding = nn.Embedding(c.num_tokens, c.codebook_dim)

    @property
    def codebook(self) -> Tensor:
        """Embeddings of the codes, float (num_tokens, codebook_dim)."""
        return self.codebook_embedding.weight

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.config.normalization or ((0.0,), (1.0,))
        return like.new_tensor(mean)[:, None, None], like.new_tensor(std)[:, None, None]

    def encode(self, images: Tensor) -> Tensor:
        """Encode images, float (batch, channels, image_size, image_size) in [0, 1], to ids, int64 (batch, side²).

        Raises ValueError for another shape.
        """
        channels, size = self.config.channels, self.config.image_size
        if tuple(images.shape[1:]) != (channels, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (batch, {channels}, {size}, {size})")
        mean, std = self._statistics(images)
        return self.encoder((images - mean) / std).argmax(dim=1).flatten(1)

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the embeddings of ids, int64 (batch, side²): float (batch, codebook_dim, side, side)."""
        return rearrange(self.codebook_embedding(ids), "b (h w) c -> b c h w", h=square_side(ids))

    def decode(self, ids: Tensor) -> Tensor:
        """Decode ids, int64 (batch, side²), to images in [0, 1].

        Returns float (batch, channels, side · downsampling, side · downsampling).
        """
        images = self.decoder(self.embed(ids))
        mean, std = self._statistics(images)
        return (images * std + mean).clamp(0, 1)


@dataclass(frozen=True)
class OpenAIDiscreteVAEConfig:
    """Configuration of an `OpenAIDiscreteVAE`, with the names of OpenAI's `dall_e` package."""

    n_hid: int = 256
    n_init: int = 128
    n_blk_per_group: int = 2
    vocab_size: int = 8192
    group_count: int = 4


class OpenAIBlock(nn.Module):
    """A bottleneck residual block of four convolutions. kernels: their sizes. gain: factor of the residual branch."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        self.gain = gain
        self.id_path = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            self.res_path.extend([nn.ReLU(), nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


def openai_groups(
    c: OpenAIDiscreteVAEConfig, width: int, widths: list[int], kernels: tuple[int, ...], resample: nn.Module
) -> list[nn.Module]:
    """One group of blocks for each of `widths`, with `resample` between the groups."""
    layers: list[nn.Module] = []
    for group, next_width in enumerate(widths):
        layers += [resample] if group else []
        for _ in range(c.n_blk_per_group):
            layers.append(OpenAIBlock(width, next_width, kernels, 1 / (c.group_count * c.n_blk_per_group) ** 2))
            width = next_width
    return layers


class OpenAIDiscreteVAE(nn.Module):
    """OpenAI's dVAE (package `dall_e`): one of 8,192 codes represents a square of 8 × 8 pixels.

    The decoder takes one-hot codes; there is no codebook of embeddings.
    """

    epsilon = 0.1  # logit-Laplace: pixels are mapped to [0.1, 0.9]

    def __init__(self, config: OpenAIDiscreteVAEConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_tokens, self.downsampling = c.vocab_size, 2 ** (c.group_count - 1)
        down = [c.n_hid * 2**i for i in range(c.group_count)]
        encoder = openai_groups(c, c.n_hid, down, (3, 3, 3, 1), nn.MaxPool2d(2))
        self.encoder = nn.Sequential(
            nn.Conv2d(3, c.n_hid, 7, padding=3), *encoder, nn.ReLU(), nn.Conv2d(down[-1], c.vocab_size, 1)
        )
        decoder = openai_groups(c, c.n_init, down[::-1], (1, 3, 3, 3), nn.Upsample(scale_factor=2))
        self.decoder = nn.Sequential(
            nn.Conv2d(c.vocab_size, c.n_init, 1), *decoder, nn.ReLU(), nn.Conv2d(c.n_hid, 6, 1)
        )

    def encode(self, images: Tensor) -> Tensor:
        """Encode images, float (batch, 3, height, width) in [0, 1], to ids, int64 (batch, height · width / 64).

        Raises ValueError for another shape, and for sides that are not divisible by 8.
        """
        step, shape = self.downsampling, tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] % step or shape[3] % step:
            raise ValueError(
                f"images have shape {shape}; expected (batch, 3, height, width), sides divisible by {step}"
            )
        return self.encoder(images * (1 - 2 * self.epsilon) + self.epsilon).argmax(dim=1).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        """Decode ids, int64 (batch, side²), to images, float (batch, 3, 8 · side, 8 · side) in [0, 1]."""
        first, *rest = self.decoder  # a 1×1 convolution of one-hot codes is a lookup in its weights
        x = F.embedding(ids, first.get_parameter("weight").flatten(1).T) + first.get_parameter("bias")
        x = rearrange(x, "b (h w) c -> b c h w", h=square_side(ids))
        mean = nn.Sequential(*rest)(x)[:, :3]
        return ((torch.sigmoid(mean) - self.epsilon) / (1 - 2 * self.epsilon)).clamp(0, 1)

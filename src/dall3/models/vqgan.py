"""VQGAN (arXiv 2012.09841) as taming-transformers has it: GumbelVQ and VQModel, with the names of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class VQGANConfig:
    """What a VQGAN is, by taming's names; `attn_levels` counts levels from the full resolution down."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_levels: tuple[int, ...]
    z_channels: int
    embed_dim: int
    n_embed: int
    gumbel: bool

    @property
    def downsampling(self) -> int:
        """Pixels a side that one code stands for."""
        return 2 ** (len(self.ch_mult) - 1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)
        self.has_shortcut = channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if self.has_shortcut else x)


class AttnBlock(nn.Module):
    """Single-head attention over all places of the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b (h w) c") for conv in (self.q, self.k, self.v))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # taming pads on the right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it, then the resampling."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels if i == 0 else out_channels, out_channels) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name, nn.Identity())(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        channels = [c.ch * mult for mult in (1, *c.ch_mult)]
        self.conv_in = nn.Conv2d(3, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(c.ch_mult)):
            level = Level(channels[i], channels[i + 1], c.num_res_blocks, i in c.attn_levels)
            if i < len(c.ch_mult) - 1:
                level.downsample = Downsample(channels[i + 1])
            self.down.append(level)
        self.mid = Middle(channels[-1])
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        channels = [c.ch * mult for mult in c.ch_mult]
        self.conv_in = nn.Conv2d(c.z_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList()
        for i, out_channels in enumerate(channels):
            in_channels = channels[min(i + 1, len(channels) - 1)]
            level = Level(in_channels, out_channels, c.num_res_blocks + 1, i in c.attn_levels)
            if i > 0:
                level.upsample = Upsample(out_channels)
            self.up.append(level)
        self.norm_out = group_norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class GumbelQuantize(nn.Module):
    """A code's logits are a 1×1 convolution of the features (arXiv 1611.01144); the best one wins."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(c.embed_dim, c.n_embed, 1)
        self.embed = nn.Embedding(c.n_embed, c.embed_dim)

    def forward(self, h: Tensor) -> Tensor:
        return self.proj(h).argmax(dim=1)


class VectorQuantizer(nn.Module):
    """The nearest codebook entry wins (arXiv 1711.00937)."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.n_embed, c.embed_dim)

    def forward(self, h: Tensor) -> Tensor:
        features, entries = rearrange(h, "b c h w -> b h w c"), self.embedding.weight
        distance = (features**2).sum(-1, keepdim=True) + (entries**2).sum(-1) - 2 * features @ entries.T
        return distance.argmin(dim=-1)


class VQModel(nn.Module):
    """Pictures to codes of a learned codebook, and back. `GumbelVQ` differs in how the code is chosen."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = GumbelQuantize(config) if config.gumbel else VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def num_tokens(self) -> int:
        return self.config.n_embed

    @property
    def downsampling(self) -> int:
        return self.config.downsampling

    @property
    def codebook(self) -> Tensor:
        """The codes' embeddings, float (n_embed, embed_dim)."""
        return self.quantize.embed.weight if self.config.gumbel else self.quantize.embedding.weight

    def encode(self, images: Tensor) -> Tensor:
        """Pictures, float (batch, 3, height, width) in [0, 1], sides divisible by `downsampling`, to the ids of their
        codes, int64 (batch, height · width / downsampling²), row by row. Without Gumbel noise: the likeliest codes.

        Raises ValueError for another shape.
        """
        step = self.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % step or images.shape[3] % step:
            raise ValueError(
                f"pictures have shape {tuple(images.shape)}; expected (batch, 3, height, width), sides divisible by {step}"
            )
        ids: Tensor = self.quantize(self.quant_conv(self.encoder(images * 2 - 1)))
        return ids.flatten(1)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids of a square grid, int64 (batch, side²), to embeddings, float (batch, embed_dim, side, side).

        Raises ValueError when the ids do not make a square.
        """
        side = square_side(ids)
        return rearrange(F.embedding(ids, self.codebook), "b (h w) c -> b c h w", h=side)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids, int64 (batch, side²), to pictures, float (batch, 3, side · downsampling, …) in [0, 1]."""
        return (self.decoder(self.post_quant_conv(self.embed(ids))).clamp(-1, 1) + 1) / 2


class GumbelVQ(VQModel):
    """The VQGAN of the seed and of ruDALL-E: f8, 8,192 codes of 256."""


def square_side(ids: Tensor) -> int:
    """The side of the square that ids (batch, side²) make. Raises ValueError when they make none."""
    side = round(ids.shape[-1] ** 0.5)
    if ids.ndim != 2 or side**2 != ids.shape[-1]:
        raise ValueError(f"tokens have shape {tuple(ids.shape)}; expected (batch, side²), a square grid row by row")
    return side

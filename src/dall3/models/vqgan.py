"""VQGAN (arXiv 2012.09841) of taming-transformers: VQModel and GumbelVQ, with the parameter names of its checkpoints.

The VQGANs of DALL·E Mini and ruDALL-E are the same networks; the configuration holds the differences.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class VQGANConfig:
    """Configuration of a `VQModel` or `GumbelVQ`, with taming-transformers' names.

    attn_levels: levels with attention; level 0 has the full resolution. has_encoder: False for DALL·E Mini's
    `detoker.pt`, which only decodes. unit_range: the network works on pixels in [0, 1] instead of [-1, 1], as DALL·E
    Mini's. dwt: the decoder ends in an inverse Haar transform and returns images of twice the encoder's input size, as
    ruDALL-E's second VQGAN.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_levels: tuple[int, ...]
    z_channels: int
    embed_dim: int
    n_embed: int
    has_encoder: bool = True
    unit_range: bool = False
    dwt: bool = False
    norm_groups: int = 32  # groups of the group normalisation; one group per channel removes each channel's mean


def normalization(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def set_norm_groups(model: nn.Module, groups: int) -> None:
    """Set the number of groups of every group normalisation of a network."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups


def silu(x: Tensor) -> Tensor:
    """SiLU, in place unless x requires a gradient."""
    return F.silu(x, inplace=not x.requires_grad)


class ResnetBlock(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = normalization(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return h.add_(self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalization(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b (h w) c") for conv in (self.q, self.k, self.v))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


def downsample(channels: int) -> nn.Module:
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # taming-transformers pads only on the right and at the bottom
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels: int) -> nn.Module:
    up = nn.Upsample(scale_factor=2)
    return nn.Sequential(OrderedDict(up=up, conv=nn.Conv2d(channels, channels, 3, padding=1)))


def middle(channels: int) -> nn.Module:
    first, second = (ResnetBlock(channels, channels) for _ in range(2))
    return nn.Sequential(OrderedDict(block_1=first, attn_1=AttnBlock(channels), block_2=second))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the level has it, then the resampling."""

    def __init__(self, width: int, out: int, blocks: int, attention: bool, **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks if attention else 0))
        for name, module in resample.items():
            self.add_module(name, module)
        self.resample = list(resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in self.resample:
            x = self.get_submodule(name)(x)
        return x


class Encoder(nn.Module):
    """Images (batch, 3, height, width) to features (batch, z_channels, height / downsampling, width / downsampling)."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        widths = [c.ch * mult for mult in (1, *c.ch_mult)]
        self.conv_in = nn.Conv2d(3, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, out in enumerate(widths[1:]):
            resample = {"downsample": downsample(out)} if i < len(c.ch_mult) - 1 else {}
            self.down.append(Level(widths[i], out, c.num_res_blocks, i in c.attn_levels, **resample))
        self.mid = middle(widths[-1])
        self.norm_out = normalization(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features of the `Encoder` to images."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        widths = [c.ch * mult for mult in (*c.ch_mult, c.ch_mult[-1])]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()
        for i, out in enumerate(widths[:-1]):
            resample = {"upsample": upsample(out)} if i > 0 else {}
            self.up.append(Level(widths[i + 1], out, c.num_res_blocks + 1, i in c.attn_levels, **resample))
        self.norm_out = normalization(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 12 if c.dwt else 3, 3, padding=1)
        self.dwt = c.dwt

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(silu(self.norm_out(x)))
        return inverse_haar(x) if self.dwt else x


def inverse_haar(bands: Tensor) -> Tensor:
    """One level of the inverse Haar transform.

    bands: (batch, 12, height, width): the low band of each colour channel, then the three high bands of each colour
    channel in pywt's order (cH, cV, cD). Returns images, (batch, 3, 2 · height, 2 · width).
    """
    low = bands[:, :3]
    high, vertical, diagonal = bands[:, 3:].unflatten(1, (3, 3)).unbind(2)
    signs = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))  # for the four pixels of a coefficient, row by row
    pixels = [(low + h * high + v * vertical + d * diagonal) / 2 for h, v, d in signs]
    return F.pixel_shuffle(torch.stack(pixels, dim=2).flatten(1, 2), 2)


class VQModel(nn.Module):
    """VQGAN with nearest-neighbour vector quantisation (arXiv 1711.00937; taming-transformers, `models/vqgan.py`).

    >>> vqgan = VQModel(VQGANConfig(32, (1, 1), 1, (), z_channels=8, embed_dim=8, n_embed=16))
    >>> ids = vqgan.encode(torch.rand(1, 3, 16, 16))
    >>> ids.shape, vqgan.decode(ids).shape
    (torch.Size([1, 64]), torch.Size([1, 3, 16, 16]))
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        if config.has_encoder:
            self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.n_embed, config.embed_dim)})
        if config.has_encoder:
            self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        set_norm_groups(self, config.norm_groups)
        self.num_tokens, self.downsampling = config.n_embed, 2 ** (len(config.ch_mult) - 1)

    @property
    def codebook(self) -> Tensor:
        """Embeddings of the codes, float (n_embed, embed_dim)."""
        return self.quantize.get_parameter("embedding.weight")

    def choose(self, features: Tensor) -> Tensor:
        """Quantise features (batch, embed_dim, h, w) to the ids of the nearest codes, int64 (batch, h, w)."""
        features, entries = rearrange(features, "b c h w -> b h w c").float(), self.codebook.float()
        return ((entries**2).sum(-1) - 2 * features @ entries.T).argmin(dim=-1)  # |f|² is the same for every entry

    def encode(self, images: Tensor) -> Tensor:
        """Encode images, float (batch, 3, height, width) in [0, 1], to ids of codes.

        Returns int64 (batch, height · width / downsampling²), in row-major order. Raises ValueError for another shape,
        for sides that are not divisible by `downsampling`, and if the VQGAN has no encoder.
        """
        if not self.config.has_encoder:
            raise ValueError(
                "this VQGAN has no encoder, so it cannot convert images to tokens; its file has only a decoder, as "
                "DALL·E Mini's detoker.pt; give taming's checkpoint of the same codes as vqgan"
            )
        step, shape = self.downsampling, tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] % step or shape[3] % step:
            raise ValueError(
                f"images have shape {shape}; expected (batch, 3, height, width), sides divisible by {step}"
            )
        return self.choose(self.quant_conv(self.encoder(images if self.config.unit_range else images * 2 - 1))).flatten(
            1
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the embeddings of ids, int64 (batch, side²): float (batch, embed_dim, side, side)."""
        return rearrange(F.embedding(ids, self.codebook), "b (h w) c -> b c h w", h=square_side(ids))

    def decode(self, ids: Tensor) -> Tensor:
        """Decode ids, int64 (batch, side²), to images in [0, 1].

        Returns float (batch, 3, side · downsampling, side · downsampling); with `dwt`, the sides are twice as long.
        Raises ValueError if the ids do not form a square grid.
        """
        images = self.decoder(self.post_quant_conv(self.embed(ids)))
        return images.clamp(0, 1) if self.config.unit_range else (images.clamp(-1, 1) + 1) / 2


class GumbelVQ(VQModel):
    """VQGAN with Gumbel quantisation (arXiv 1611.01144), as in Jack000/DALLE-pytorch and ruDALL-E.

    A 1×1 convolution computes the logits of the codes, and the most likely code is taken. taming-transformers adds
    Gumbel noise outside of training too, so its codes vary from run to run.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        proj, embed = nn.Conv2d(config.embed_dim, config.n_embed, 1), nn.Embedding(config.n_embed, config.embed_dim)
        self.quantize = nn.ModuleDict({"proj": proj, "embed": embed})

    @property
    def codebook(self) -> Tensor:
        """Embeddings of the codes, float (n_embed, embed_dim)."""
        return self.quantize.get_parameter("embed.weight")

    def choose(self, features: Tensor) -> Tensor:
        """Quantise features (batch, embed_dim, h, w) to the ids of the most likely codes, int64 (batch, h, w)."""
        return self.quantize["proj"](features).argmax(dim=1)


def square_side(ids: Tensor) -> int:
    """Side of the square grid of ids (batch, side²). Raises ValueError if they do not form a square grid."""
    side = round(ids.shape[-1] ** 0.5)
    if ids.ndim != 2 or side**2 != ids.shape[-1]:
        raise ValueError(f"tokens have shape {tuple(ids.shape)}; expected (batch, side²), a square grid row by row")
    return side


def check_codes(transformer_config: Any, vqgan: Any) -> None:
    """Raise ValueError if the image tokens of a transformer are not the codes of this VQGAN or discrete VAE."""
    codes, unit_range = transformer_config.num_image_tokens, getattr(transformer_config, "unit_range", False)
    if codes != vqgan.num_tokens:
        raise ValueError(f"the transformer draws {codes} codes, the vqgan has {vqgan.num_tokens}")
    if unit_range and not getattr(vqgan.config, "unit_range", False):
        raise ValueError(
            "the vqgan's pixels are in [-1, 1], but DALL·E Mini's codes need a VQGAN with pixels in [0, 1]; give its "
            "detoker.pt, or load taming's checkpoint of the same codes with load_vqgan(…, unit_range=True)"
        )
    if not unit_range and getattr(vqgan.config, "unit_range", False):
        raise ValueError(
            "the vqgan is DALL·E Mini's (detoker.pt), but this transformer draws other codes; give the VQGAN that the "
            "transformer was trained with"
        )

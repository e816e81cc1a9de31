"""The UNet of guided diffusion (arXiv 2105.05233) with the parameter names of its checkpoints.

There are three variants: unconditional or class-conditional (openai/guided-diffusion); conditioned on code embeddings,
concatenated before the middle block (Jack000/guided-diffusion); and conditioned on a low-resolution image, concatenated
to the input (super-resolution).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dall3.models.group_norm import GroupNorm, group_norm
from dall3.models.interface import step_compile_options
from dall3.models.vqgan import silu, upsample


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process that a UNet was trained with, with guided-diffusion's names.

    Raises ValueError for an unknown noise schedule.
    """

    diffusion_steps: int = 1000
    noise_schedule: str = "linear"  # or "cosine"
    learn_sigma: bool = True  # the output has three more channels for the variance
    predict_xstart: bool = False  # the output is x_0 instead of the noise
    rescale_timesteps: bool = True  # timesteps are scaled to 0 … 1000

    def __post_init__(self) -> None:
        if self.noise_schedule not in ("linear", "cosine"):
            raise ValueError(f"noise_schedule '{self.noise_schedule}' is not known; expected 'linear' or 'cosine'")


@dataclass(frozen=True)
class UNetConfig:
    """Configuration of a `UNet`, with guided-diffusion's names.

    The channels of a level are int(multiplier · model_channels).
    """

    model_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]  # levels with attention; level 0 has the full resolution
    image_size: int  # side of the output in pixels
    num_heads: int = 4
    num_head_channels: int | None = None  # overrides num_heads
    num_heads_upsample: int | None = None  # heads in the upsampling half; None for num_heads
    use_new_attention_order: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    num_classes: int | None = None
    embedding_dims: tuple[int, int] | None = None  # channels of image_embeds: before, after its convolution
    super_resolution: bool = False
    norm_groups: int = 32  # groups of the group normalisation; one group per channel removes each channel's mean
    predict_residual: bool = False  # the upsampled low_res is added to the output
    diffusion: DiffusionConfig = DiffusionConfig()

    @property
    def channels(self) -> list[int]:
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    @property
    def downsampling(self) -> int:
        """Ratio of the input's side to that of the middle block."""
        return 2 ** (len(self.channel_mult) - 1)


def scale_shift_norm(norm: GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) · (1 + scale) + shift for x (batch, channels, height, width). scale, shift: (batch, channels)."""
    if len(x) > 1:
        return torch.addcmul(shift[:, :, None, None], norm(x), 1 + scale[:, :, None, None])
    # For a batch of one, scale and shift fold into the normalisation's weight and bias: a single pass over x.
    weight, bias = norm.weight * (1 + scale[0]), norm.bias * (1 + scale[0]) + shift[0]
    return group_norm(x, norm.num_groups, weight, bias, norm.eps)


class ResBlock(nn.Module):
    """A residual block conditioned on the timestep. `resample` downsamples or upsamples both of its branches."""

    def __init__(self, c: UNetConfig, channels: int, out_channels: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.use_scale_shift_norm = c.use_scale_shift_norm
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        time_channels = out_channels * (2 if c.use_scale_shift_norm else 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * c.model_channels, time_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(32, out_channels), nn.SiLU(), nn.Identity(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        x = self.resample(x)
        time = self.emb_layers(time)
        norm, _, _, conv = self.out_layers
        if self.use_scale_shift_norm:
            h = scale_shift_norm(norm, h, *time.chunk(2, dim=1))  # type: ignore[arg-type]
        else:
            h = norm(h + time[:, :, None, None])
        return conv(silu(h)).add_(self.skip_connection(x))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels.

    Without `use_new_attention_order`, the q, k and v channels of a head are adjacent.
    """

    def __init__(self, c: UNetConfig, channels: int, num_heads: int) -> None:
        super().__init__()
        num_heads = channels // c.num_head_channels if c.num_head_channels else num_heads
        if num_heads < 1 or channels % num_heads or channels % (c.num_head_channels or 1):
            setting = f"num_head_channels={c.num_head_channels}" if c.num_head_channels else f"num_heads={num_heads}"
            raise ValueError(f"{channels} channels cannot be split into heads with {setting}")
        self.num_heads, self.new_order = num_heads, c.use_new_attention_order
        self.norm = GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # (batch, pixels, channels): 1×1 convolutions become matrix products, and fused attention needs this layout.
        rows = self.norm(x).flatten(2).transpose(1, 2)
        qkv = F.linear(rows, self.qkv.weight[:, :, 0], self.qkv.bias)
        axes = (3, self.num_heads) if self.new_order else (self.num_heads, 3)
        q, k, v = qkv.unflatten(-1, (*axes, -1)).movedim(1, -2).unbind(1 if self.new_order else 2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(x.shape)


def downsample(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)))


class Block(nn.Sequential):
    """Layers in sequence; the residual blocks among them are conditioned on the timestep."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
        return x


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps (batch,), which may be fractional: float32 (batch, dim), cosines first."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponents)
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return F.pad(embedding, (0, dim % 2))


def run_block(block: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    out: Tensor = block(x, time)
    return out


def recomputed(block: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    """Run the block with gradient checkpointing."""
    # The blocks draw no random numbers, and reading the state of the generator is not allowed in a CUDA graph.
    out: Tensor = checkpoint(block, x, time, use_reentrant=False, preserve_rng_state=False)
    return out


class UNet(nn.Module):
    """The UNet of guided diffusion (`guided_diffusion/unet.py`): predicts the noise, or x_0, of a noisy image.

    With `learn_sigma`, the output has three more channels that interpolate the variance.

    >>> unet = UNet(UNetConfig(32, (1, 2), num_res_blocks=1, attention_levels=(1,), image_size=16))
    >>> unet(torch.randn(2, 3, 16, 16), torch.tensor([999, 500])).shape
    torch.Size([2, 6, 16, 16])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        time_dim, channels = 4 * c.model_channels, c.channels
        self.time_embed = nn.Sequential(nn.Linear(c.model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        if c.num_classes:
            self.label_emb = nn.Embedding(c.num_classes, time_dim)

        width = channels[0]
        skips = [width]
        first = nn.Conv2d(6 if c.super_resolution else 3, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([Block(first)])
        for level, out in enumerate(channels):
            for _ in range(c.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(c, width, out)]
                if level in c.attention_levels:
                    layers.append(AttentionBlock(c, out, c.num_heads))
                self.input_blocks.append(Block(*layers))
                width = out
                skips.append(width)
            if level < len(channels) - 1:
                down = ResBlock(c, width, width, nn.AvgPool2d(2)) if c.resblock_updown else downsample(width, width)
                self.input_blocks.append(Block(down))
                skips.append(width)

        middle = width
        if c.embedding_dims:
            self.external_block = downsample(*c.embedding_dims)
            middle += c.embedding_dims[1]
        self.middle_name = "middle_block_cond" if c.embedding_dims else "middle_block"
        layers = [ResBlock(c, middle, middle), AttentionBlock(c, middle, c.num_heads), ResBlock(c, middle, width)]
        self.add_module(self.middle_name, Block(*layers))

        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(channels))):
            for i in range(c.num_res_blocks + 1):
                layers = [ResBlock(c, width + skips.pop(), out)]
                width = out
                if level in c.attention_levels:
                    layers.append(AttentionBlock(c, out, c.num_heads_upsample or c.num_heads))
                if level and i == c.num_res_blocks:
                    layers.append(
                        ResBlock(c, out, out, nn.Upsample(scale_factor=2)) if c.resblock_updown else upsample(out)
                    )
                self.output_blocks.append(Block(*layers))
        self.gradient_checkpointing = False
        self.graphs: dict[Any, Any] = {}  # captured denoising steps that no call is using
        out_channels = 6 if c.diffusion.learn_sigma else 3
        self.out = nn.Sequential(GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.num_groups = c.norm_groups

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations: less memory, more time.

        CLIP guidance takes a gradient through the whole UNet.
        """
        self.gradient_checkpointing = enabled

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Compile the forward pass with torch.compile, as one graph, at its first use.

        The options are those of `torch.compile`; `fullgraph=True` and `dynamic=False` are the defaults here. On a GPU
        the denoising loop captures the compiled step as a CUDA graph, so modes that do so are not needed.
        """
        super().compile(**step_compile_options(options))
        self.free_graphs()  # they contain the previous step

    def free_graphs(self) -> None:
        """Free the captured denoising steps, and the memory that they hold."""
        self.graphs = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.free_graphs()  # they read the previous weights
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graphs": {}}  # a copy has weights of its own

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        image_embeds: Tensor | None = None,
        low_res: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise (or x_0) of noisy images.

        x: float (batch, 3, height, width), x_t of images in [-1, 1]. timesteps: (batch,), in [0, 1000) with
        `rescale_timesteps`, else [0, diffusion_steps). image_embeds: float (batch, embedding_dims[0], side, side),
        with twice the side of the middle block. low_res: float (batch, 3, h, w) in [-1, 1]. labels: int64 (batch,).
        Returns float (batch, 6, height, width) with `learn_sigma`, else (batch, 3, height, width).
        Raises ValueError for a missing condition, and for one that the configuration does not have.
        """
        for name, given, wanted in (
            ("image_embeds", image_embeds, self.config.embedding_dims),
            ("low_res", low_res, self.config.super_resolution),
            ("labels", labels, self.config.num_classes),
        ):
            if (given is not None) != bool(wanted):
                raise ValueError(f"this UNet {'needs' if wanted else 'does not take'} {name}")
        time = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))
        if labels is not None:
            time = time + self.label_emb(labels)
        if low_res is not None:
            low_res = F.interpolate(low_res, x.shape[2:], mode="bilinear")
            x = torch.cat((x, low_res), dim=1)

        run = recomputed if self.gradient_checkpointing and torch.is_grad_enabled() else run_block
        skips = []
        for block in self.input_blocks:
            x = run(block, x, time)
            skips.append(x)
        if image_embeds is not None:
            x = torch.cat((x, self.external_block(image_embeds)), dim=1)
        x = run(self.get_submodule(self.middle_name), x, time)
        for block in self.output_blocks:
            x = run(block, torch.cat((x, skips.pop()), dim=1), time)
        out: Tensor = self.out(x)
        return out + low_res if self.config.predict_residual and low_res is not None else out

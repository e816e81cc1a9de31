"""Attention over text and image tokens: the attention layer and its masks.

The sparse attention types of DALL·E (arXiv 2102.12092, appendix B.1) are implemented as masks over full attention. The
result is the same as that of the original's sparse kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_KERNEL_SIZE, SPARSE_BLOCK_SIZE = 5, 16  # DALLE-pytorch's only values


def attention_pattern(kind: str, text_length: int, grid_size: int) -> Tensor:
    """Attention mask, bool (positions, positions): rows are queries, columns are keys, True means visible.

    The positions are <bos> and the text (together `text_length`), then the image tokens in row-major order. Every mask
    is causal. Every image position attends to the whole text.

    kind: "full"; "axial_row" and "axial_col" (the same row, the same column); "conv_like" (a 5×5 window centred on the
    position); "conv_like_causal" (a 5×5 window that ends at the position, as in DALLE-pytorch 1.5 and later).
    """
    # On the CPU explicitly, so that a model built on the meta device has real masks. int16 keeps the pairs small.
    positions = torch.arange(text_length + grid_size**2, device="cpu", dtype=torch.int16)
    row, column = (positions - text_length) // grid_size, (positions - text_length) % grid_size
    up, back = row[:, None] - row[None, :], column[:, None] - column[None, :]
    reach = CONV_KERNEL_SIZE // 2
    near = {
        "full": lambda: torch.ones_like(up, dtype=torch.bool),
        "axial_row": lambda: up == 0,
        "axial_col": lambda: back == 0,
        "conv_like": lambda: (up.abs() <= reach) & (back.abs() <= reach),
        "conv_like_causal": lambda: (up >= 0) & (up < CONV_KERNEL_SIZE) & (back >= 0) & (back < CONV_KERNEL_SIZE),
    }[kind]()
    causal = positions[:, None] >= positions[None, :]
    return causal & (near | (positions < text_length)[None, :])


def sparse_layout(seq_len: int, heads: int) -> Tensor:
    """DeepSpeed's variable sparsity layout with DALLE-pytorch's settings, bool (heads, blocks, blocks).

    Blocks have 16 positions. Each block attends to its window of four blocks and to the first 256 positions. The random
    blocks are left out: DeepSpeed draws `seq_len // 64` of them per row when a model is created and stores the layout
    in the checkpoint.
    """
    blocks = torch.arange(-(-seq_len // SPARSE_BLOCK_SIZE), device="cpu")
    near = (blocks[:, None] // 4 == blocks[None, :] // 4) | (blocks * SPARSE_BLOCK_SIZE < 256)
    return near.expand(heads, -1, -1)


def sparse_pattern(layout: Tensor, seq_len: int) -> Tensor:
    """Expand a block layout (heads, blocks, blocks) to a causal attention mask, bool (heads, seq_len, seq_len)."""
    places = layout.bool().repeat_interleave(SPARSE_BLOCK_SIZE, -1).repeat_interleave(SPARSE_BLOCK_SIZE, -2)
    return places[:, :seq_len, :seq_len].tril()


@dataclass
class Positions:
    """Positions of the tokens in one forward pass, and tensors derived from them; shared by all layers."""

    index: Tensor  # int64 (n,), positions in the sequence
    visible: int  # the layers read keys 0 … visible - 1
    masks: dict[str, Tensor | None]  # attention type -> bool (n, visible) or (heads, n, visible); None: no mask needed
    cos: Tensor | None  # (n, dim_head), rotary factor of the channel itself
    sin: Tensor | None  # (n, dim_head), rotary factor of the other channel of its pair, with its sign
    # Sources of the token shift: 2 · p selects the first quarter of the channels of position p, 2 · p + 1 the second.
    # Two entries per token: the position above, then the position to the left.
    neighbours: Tensor  # int64 (2 n,)
    has_left: Tensor  # bool (n, 1), False in the first column of the image
    text_length: int  # index of the first image token
    grid_size: int  # image tokens per row


@dataclass
class LayerCache:
    """Key/value cache of one sublayer: tensors (batch, …, length, width) by name, written in place.

    Positions that have not been written are zero.
    """

    length: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """Write rows (batch, …, n, width) at positions `index` (n,) and return all `length` rows."""
        if name not in self.tensors:
            self.tensors[name] = rows.new_zeros(*rows.shape[:-2], self.length, rows.shape[-1])
        return self.tensors[name].index_copy_(-2, index, rows)

    def copy_from(self, other: LayerCache, times: int) -> None:
        """Copy the tensors of `other`, repeating each sequence `times` times along the batch."""
        for name, tensor in other.tensors.items():
            if name not in self.tensors:
                with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                    self.tensors[name] = tensor.new_empty(len(tensor) * times, *tensor.shape[1:])
            self.tensors[name].unflatten(0, (-1, times)).copy_(tensor[:, None])


def remember(cache: LayerCache | None, name: str, rows: Tensor, positions: Positions) -> Tensor:
    """Add rows (batch, …, n, width) to the cache and return those of all visible positions. No cache: return `rows`."""
    return rows if cache is None else cache.update(name, rows, positions.index)[..., : positions.visible, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (arXiv 2104.09864) to x (…, n, dim_head); adjacent channels form a pair.

    cos, sin: (n, dim_head), from `Positions`.
    """
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin


class Attention(nn.Module):
    """Multi-head attention. Rotary embedding applies to queries, keys and values, as in DALLE-pytorch."""

    def __init__(self, dim: int, heads: int, dim_head: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """x: (batch, n, dim) -> (batch, n, dim)."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(0, 2, 3, 1, 4)  # (batch, 3, heads, n, d)
        if positions.cos is not None and positions.sin is not None:
            qkv = rotate(qkv, positions.cos, positions.sin)
        q = qkv[:, 0]
        k, v = remember(cache, "kv", qkv[:, 1:], positions).unbind(1)
        if self.kind == "full" and cache is None:  # the causal kernel skips the masked half
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=positions.masks[self.kind])
        return self.to_out(out.transpose(1, 2).flatten(2))

"""Attention over text and image tokens: one layer, and the patterns that tell which position sees which.

The sparse attentions of DALL·E (arXiv 2102.12092, appendix B.1) are masks over one full attention: what a position
sees decides the numbers, not how the original's kernels walk over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_KERNEL_SIZE, SPARSE_BLOCK_SIZE = 5, 16  # DALLE-pytorch never set others


def attention_pattern(kind: str, text_length: int, grid_size: int) -> Tensor:
    """Which position sees which, as bool (positions, positions); row = query, column = key.

    Positions are <bos>, the text (together `text_length`), then the image's rows. Every pattern is causal, and every
    image position sees all of the text.

    kind: "full"; "axial_row" and "axial_col" (the same row, the same column); "conv_like" (a 5×5 window around the
    position) and "conv_like_causal" (one that ends at it: DALLE-pytorch from 1.5 on).
    """
    # Real on a meta model too; of 16 bits, since there are pairs of them.
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
    """DeepSpeed's variable sparsity as DALLE-pytorch sets it, bool (heads, blocks, blocks), less its random blocks.

    Local windows of four blocks of 16, and the first 256 positions, which all that follow see. DeepSpeed adds
    `seq_len // 64` blocks a row at random when a model is made, and keeps the layout in the checkpoint.
    """
    blocks = torch.arange(-(-seq_len // SPARSE_BLOCK_SIZE), device="cpu")
    near = (blocks[:, None] // 4 == blocks[None, :] // 4) | (blocks * SPARSE_BLOCK_SIZE < 256)
    return near.expand(heads, -1, -1)


def sparse_pattern(layout: Tensor, seq_len: int) -> Tensor:
    """A layout (heads, blocks, blocks) as which position sees which, bool (heads, seq_len, seq_len); causal."""
    places = layout.bool().repeat_interleave(SPARSE_BLOCK_SIZE, -1).repeat_interleave(SPARSE_BLOCK_SIZE, -2)
    return places[:, :seq_len, :seq_len].tril()


@dataclass
class Positions:
    """Where the tokens of one forward stand, and what follows from it alone: looked up once, read by every layer."""

    index: Tensor  # int64 (n,), places in the caches
    visible: int  # rows 0 … visible - 1 of the caches are read
    masks: dict[str, Tensor | None]  # attention type -> bool (n, keys) or (heads, n, keys); None: sees all
    cos: Tensor | None  # (n, dim_head), rotary: of each channel itself
    sin: Tensor | None  # and of the other one of its pair, with its sign
    # Whom the first and the second quarter of the channels come from: the places above, then those to the left.
    neighbours: Tensor  # int64 (2 n,)
    has_left: Tensor  # bool (n, 1), whether there is one to the left
    text_length: int  # the image's rows of `grid_size` begin there
    grid_size: int


@dataclass
class LayerCache:
    """What one layer remembers of earlier positions: tensors (batch, …, length, width) by name, written in place.

    What is not written yet is 0. With `text`, all sequences of a prompt share the rows of its text: `text` holds these,
    (prompts, …, text length, width), and the other tensors begin with the image's rows.
    """

    length: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """Write rows (batch, …, n, width) at `index` (n,) and return all `length` rows."""
        if name not in self.tensors:
            self.tensors[name] = rows.new_zeros(*rows.shape[:-2], self.length, rows.shape[-1])
        return self.tensors[name].index_copy_(-2, index, rows)

    def start(self, other: LayerCache, times: int, shared: bool) -> None:
        """Begin with the text's rows of `other`, each of whose sequences stands `times` times in a row here."""
        for name, found in other.tensors.items():
            if name not in self.tensors:
                with torch.inference_mode(False):  # so that it can be written in every mode
                    batch, shape = len(found) * times, found.shape[1:-2]
                    self.tensors[name] = found.new_empty(batch, *shape, self.length, found.shape[-1])
                    if shared:
                        self.text[name] = torch.empty_like(found)
            if shared:
                self.text[name].copy_(found)
                self.tensors[name].zero_()
            else:
                text, image = self.tensors[name].split((found.shape[-2], self.length - found.shape[-2]), dim=-2)
                text.unflatten(0, (-1, times)).copy_(found[:, None])
                image.zero_()


def update_cache(cache: LayerCache | None, name: str, rows: Tensor, at: Positions) -> Tensor:
    """The rows of every visible position: from the cache after adding these, or just these without a cache."""
    return rows if cache is None else cache.update(name, rows, at.index)[..., : at.visible, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): neighbouring channels of x (…, n, dim_head) turn by an angle.

    cos, sin: (n, dim_head), as `Positions` holds them.
    """
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin


def prefers_matmul(x: Tensor) -> bool:
    """Whether `attend_to_cache` is the faster attention for a step: in float32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, text: dict[str, Tensor]) -> Tensor:
    """Attention of a few queries (batch, heads, n, d) to many keys (batch, heads, m, d), by products of matrices.

    text: keys and values "k" and "v" (prompts, heads, t, d) that come before those, alike for all sequences of a
    prompt, or nothing. They are read once for all of these, whose queries stand side by side. mask: bool (…, n, t + m).
    For one query a row a CPU takes 0.6 of the time that scaled_dot_product_attention takes.
    """
    batch, heads, n, d = q.shape
    q = (q * d**-0.5).reshape(batch * heads, n, d)
    scores = torch.bmm(q, k.flatten(0, 1).transpose(1, 2)).view(batch, heads, n, -1)
    if text:
        prompts, _, length, _ = text["k"].shape
        together = q.view(prompts, -1, heads, n, d).transpose(1, 2).reshape(prompts * heads, -1, d)
        of_text = torch.bmm(together, text["k"].flatten(0, 1).transpose(1, 2))
        of_text = of_text.view(prompts, heads, -1, n, length).transpose(1, 2)
        scores = scores.view(prompts, -1, heads, n, scores.shape[-1])
        scores = torch.cat((of_text, scores), dim=-1).view(batch, heads, n, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    if not text:
        return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(batch, heads, n, d)
    of_text, of_image = weights.split((length, k.shape[-2]), dim=-1)
    of_text = of_text.view(prompts, -1, heads, n, length).transpose(1, 2).reshape(prompts * heads, -1, length)
    out = torch.bmm(of_image.flatten(0, 1), v.flatten(0, 1)).view(prompts, -1, heads, n, d)
    out += torch.bmm(of_text, text["v"].flatten(0, 1)).view(prompts, heads, -1, n, d).transpose(1, 2)
    return out.view(batch, heads, n, d)


class Attention(nn.Module):
    """Multi-head attention; rotary turns queries, keys and values alike, as DALLE-pytorch does."""

    def __init__(self, dim: int, heads: int, dim_head: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, at: Positions, cache: LayerCache | None = None) -> Tensor:
        """x: (batch, n, dim) -> (batch, n, dim)."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(0, 2, 3, 1, 4)  # (batch, 3, heads, n, d)
        if at.cos is not None and at.sin is not None:
            qkv = rotate(qkv, at.cos, at.sin)
        q, k, v = qkv.unbind(1)
        k, v = update_cache(cache, "k", k, at), update_cache(cache, "v", v, at)
        if self.kind == "full" and cache is None:  # the same, and half the work
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif cache is not None and (cache.text or (x.shape[1] == 1 and prefers_matmul(x))):
            out = attend_to_cache(q, k, v, at.masks[self.kind], cache.text)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=at.masks[self.kind])
        return self.to_out(out.transpose(1, 2).flatten(2))

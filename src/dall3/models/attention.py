"""The attention layer of the DALL·E transformer, with its attention patterns and its key/value cache.

The sparse attention types of DALL·E (arXiv 2102.12092, appendix B.1) are computed as full attention under a mask. The
results are the same as those of the original kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_KERNEL_SIZE, SPARSE_BLOCK_SIZE = 5, 16  # the only values that DALLE-pytorch uses


def attention_pattern(kind: str, text_length: int, grid_size: int) -> Tensor:
    """Attention mask, bool (positions, positions): rows are queries, columns are keys; True where a key is attended to.

    The positions are <bos> and the text (together `text_length`), then the image in row-major order. Every pattern is
    causal, and every image position attends to all of the text.

    kind: "full"; "axial_row" and "axial_col" (the same row or column of the image); "conv_like" (a 5 × 5 window around
    the position) and "conv_like_causal" (a 5 × 5 window that ends at it, as in DALLE-pytorch from 1.5 on).
    """
    # On the CPU even under the meta device. 16 bits suffice and save memory: `up` and `back` have the size of the mask.
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
    """Block layout of DeepSpeed's variable sparsity as DALLE-pytorch sets it, bool (heads, blocks, blocks).

    A block has 16 positions. Each attends to its local window of four blocks and to the first 256 positions. Random
    blocks are not included: DeepSpeed draws `seq_len // 64` of them per row when a model is made, and stores the
    complete layout in the checkpoint.
    """
    blocks = torch.arange(-(-seq_len // SPARSE_BLOCK_SIZE), device="cpu")
    near = (blocks[:, None] // 4 == blocks[None, :] // 4) | (blocks * SPARSE_BLOCK_SIZE < 256)
    return near.expand(heads, -1, -1)


def sparse_pattern(layout: Tensor, seq_len: int) -> Tensor:
    """Convert a block layout (heads, blocks, blocks) to a causal attention mask, bool (heads, seq_len, seq_len)."""
    places = layout.bool().repeat_interleave(SPARSE_BLOCK_SIZE, -1).repeat_interleave(SPARSE_BLOCK_SIZE, -2)
    return places[:, :seq_len, :seq_len].tril()


@dataclass
class Positions:
    """The positions of the tokens of one forward pass, with masks and tables for them.

    Computed once per forward pass and used by every layer.
    """

    index: Tensor  # int64 (n,), positions of the tokens in the caches
    visible: int  # the caches are read at positions 0 … visible - 1
    masks: dict[str, Tensor | None]  # by attention type: bool (n, keys) or (heads, n, keys); None for no mask
    # float32 or float64 (n, 1, dim_head / 2, 2): cosine and sine of the rotary angle of each pair of channels
    rotation: Tensor | None
    neighbours: Tensor  # int64 (2, n), positions above and to the left, for the token shift
    text_length: int  # number of positions before the image
    grid_size: int


@dataclass
class LayerCache:
    """Static cache of one layer, written in place; positions that have not been written are 0.

    states: float (k, sequences, length, width). Attention has k = 2, keys and values, and a sequence for each head of
    each row of the batch. gMLP has k = 1, its gate, and a sequence for each row. text: if all rows of a prompt share
    the states of its text, float (k, sequences of the prompts, text_length, width); `states` then holds image positions
    only.
    """

    length: int
    states: Tensor | None = None
    text: Tensor | None = None

    def update(self, new: Tensor, at: Positions) -> Tensor:
        """Write the states (k, sequences, n, width) of new tokens. Returns the states of all visible positions."""
        if self.states is None:
            self.states = new.new_zeros(*new.shape[:2], self.length, new.shape[-1])
        return self.states.index_copy_(2, at.index, new).narrow(2, 0, at.visible)

    def copy_text(self, source: LayerCache, prompts: int, rows: int, shared: bool) -> None:
        """Copy the text of `source`, which has one row per prompt, to a cache with `rows` rows per prompt.

        The image positions are set to 0. shared: store the text once per prompt, in `text`.
        """
        assert source.states is not None
        k, sequences, length, width = source.states.shape
        if self.states is None:
            with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                self.states = source.states.new_empty(k, sequences * rows, self.length, width)
                self.text = torch.empty_like(source.states) if shared else None
        if self.text is not None:
            self.text.copy_(source.states)
            self.states.zero_()
        else:
            text, image = self.states.split((length, self.length - length), dim=2)
            by_prompt = source.states.unflatten(1, (prompts, -1))
            text.unflatten(1, (prompts, rows, -1)).copy_(by_prompt[:, :, None])
            image.zero_()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): rotate each pair of neighbouring channels of all heads.

    x: (batch, n, heads · dim_head). rotation: as in `Positions`. Returns (batch, n, heads, dim_head / 2, 2). A pair is
    multiplied as a complex number, in one operation.
    """
    pairs = x.view(*x.shape[:2], -1, *rotation.shape[-2:]).to(rotation.dtype)
    if torch.compiler.is_compiling():  # the compiler fuses real operations, but not complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return rotated.to(x.dtype)


def prefers_matmul(x: Tensor) -> bool:
    """Whether attention of single queries is faster by matrix products than by PyTorch's fused kernel.

    In float32 on a CPU, matrix products take 0.6 of the fused kernel's time.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`scaled_dot_product_attention` by matrix products, for q (sequences, n, d) and k, v (sequences, m, d)."""
    # With beta=0 the first argument is not read.
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(masked(scores, mask).softmax(dim=-1), v)


def shared_text_attention(q: Tensor, k: Tensor, v: Tensor, text: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """`matmul_attention` to the keys and values of a text that all rows of a prompt share, followed by k and v.

    q: (prompts · rows · heads, n, d). k, v: (prompts · rows · heads, m, d). text: (2, prompts · heads, t, d), keys and
    values. The text is read once per prompt, in one matrix product for all rows.
    """
    text_keys, text_values = text.unbind()
    prompts, n = len(text_keys) // heads, q.shape[1]

    def by_prompt(x: Tensor) -> Tensor:
        """(prompts · rows · heads, n, width) -> (prompts · heads, rows · n, width)."""
        return x.unflatten(0, (prompts, -1, heads)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def by_row(x: Tensor) -> Tensor:
        """The inverse of `by_prompt`."""
        return x.unflatten(0, (prompts, heads)).unflatten(2, (-1, n)).transpose(1, 2).flatten(0, 2)

    q = q * q.shape[-1] ** -0.5
    text_scores = by_row(torch.bmm(by_prompt(q), text_keys.transpose(1, 2)))
    scores = torch.cat((text_scores, torch.bmm(q, k.transpose(1, 2))), dim=-1)
    for_text, for_image = masked(scores, mask).softmax(dim=-1).split((text_keys.shape[1], k.shape[1]), dim=-1)
    return torch.bmm(for_image, v) + by_row(torch.bmm(by_prompt(for_text), text_values))


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Attention scores (rows · heads, n, keys), -inf where mask, bool (n, keys) or (heads, n, keys), is False."""
    if mask is None:
        return scores
    heads = 1 if mask.dim() == 2 else len(mask)
    return scores.unflatten(0, (-1, heads)).masked_fill(~mask, float("-inf")).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention. As in DALLE-pytorch, the rotary embedding applies to queries, keys and values."""

    def __init__(self, dim: int, heads: int, dim_head: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, at: Positions, cache: LayerCache | None = None) -> Tensor:
        """x: (batch, n, dim) -> (batch, n, dim)."""
        batch, n, _ = x.shape
        qkv = self.to_qkv(x)
        if at.rotation is not None:
            qkv = rotate(qkv, at.rotation)
        qkv = qkv.view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        qkv = qkv.flatten(1, 2)  # (3, batch · heads, n, dim_head)
        q, keys_values = qkv[0], qkv[1:]
        if cache is not None:
            keys_values = cache.update(keys_values, at)
        k, v = keys_values.unbind()
        mask = at.masks[self.kind]
        if cache is not None and cache.text is not None:
            out = shared_text_attention(q, k, v, cache.text, mask, self.heads)
        elif cache is not None and n == 1 and prefers_matmul(x):
            out = matmul_attention(q, k, v, mask)
        else:
            q, k, v = (part.unflatten(0, (-1, self.heads)) for part in (q, k, v))
            # is_causal needs no mask in memory and half of the arithmetic.
            causal = cache is None and self.kind == "full"
            out = F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal)
        if n > 1:
            out = out.view(batch, self.heads, n, -1).transpose(1, 2)
        return self.to_out(out.reshape(batch, n, -1))

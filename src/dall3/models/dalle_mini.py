"""DALL·E Mini and Mega: a text encoder and an image-token decoder, with the parameter names of their checkpoints.

Source: borisdayma/dalle-mini, `model/modeling.py`, and its PyTorch port kuprel/min-dalle. The network is BART (arXiv
1910.13461) with the additional layer norms of NormFormer (arXiv 2110.09456) and gated feed-forwards (arXiv 2002.05202).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.interface import Cache, ImageTokenTransformer

HEAD_WIDTH = 64
START, PAD, END = 0, 1, 2  # ids of <s>, <pad> and </s> in the text


@dataclass(frozen=True)
class DalleMiniConfig:
    """Configuration of a `DalleMini`. Attention heads have 64 channels.

    Raises ValueError if `dim` is not divisible by 64.
    """

    num_text_tokens: int  # rows of the text embedding
    num_image_tokens: int  # size of the codebook; the image embedding has one more row for the start token
    text_seq_len: int
    dim: int
    ff_dim: int  # hidden width of the feed-forward layers
    encoder_depth: int
    decoder_depth: int
    grid_size: int = 16

    def __post_init__(self) -> None:
        if self.dim % HEAD_WIDTH:
            raise ValueError(f"heads are {HEAD_WIDTH} channels wide; dim={self.dim} is not divisible by that")

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2

    @property
    def text_family(self) -> str:
        """The `kind` of `dall3.text.load_text_encoder` for the prompts of this transformer."""
        return "dalle-mini"

    @property
    def unit_range(self) -> bool:
        """Whether the VQGAN of this transformer was trained on pixels in [0, 1] instead of [-1, 1]."""
        return True


@dataclass(eq=False)
class DalleMiniCache(Cache):
    """Keys and values of all decoder layers, and the mask of the text."""

    # Self-attention, float (layers, prompts · rows, heads, grid_size², 64). Position 0 is the start token.
    keys: Tensor
    values: Tensor
    text_keys: Tensor  # cross-attention, float (layers, prompts, heads, text_seq_len, 64)
    text_values: Tensor
    text_mask: Tensor  # bool (prompts, 1, 1, text_seq_len), False at padding


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def queries(self, x: Tensor) -> Tensor:
        """x (batch, n, dim) -> (batch, heads, n, 64)."""
        return split_heads(self.q_proj(x))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, n, dim) -> twice (batch, heads, n, 64)."""
        return split_heads(self.k_proj(x)), split_heads(self.v_proj(x))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, heads, n, 64) -> (batch, n, dim)."""
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


class GLU(nn.Module):
    """Gated feed-forward with a layer norm before and between its linear layers."""

    def __init__(self, dim: int, ff_dim: int) -> None:
        super().__init__()
        self.ln0, self.ln1 = nn.LayerNorm(dim), nn.LayerNorm(ff_dim)
        self.fc0, self.fc1 = (nn.Linear(dim, ff_dim, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln0(x)
        out: Tensor = self.fc2(self.ln1(F.gelu(self.fc0(x)) * self.fc1(x)))
        return out


class EncoderLayer(nn.Module):
    """Self-attention and a gated feed-forward, each in a residual branch."""

    def __init__(self, dim: int, ff_dim: int) -> None:
        super().__init__()
        self.pre_self_attn_layer_norm, self.self_attn_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn, self.glu = Attention(dim), GLU(dim, ff_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.pre_self_attn_layer_norm(x)
        h = self.self_attn(self.self_attn.queries(h), *self.self_attn.keys_and_values(h), mask)
        x = x + self.self_attn_layer_norm(h)
        return x + self.glu(x)


class DecoderLayer(EncoderLayer):
    """An encoder layer with cross-attention to the text after the self-attention."""

    def __init__(self, dim: int, ff_dim: int) -> None:
        super().__init__(dim, ff_dim)
        self.pre_encoder_attn_layer_norm, self.encoder_attn_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.encoder_attn = Attention(dim)


class Stack(nn.Module):
    """The common structure of the text encoder and the image decoder: embeddings, layers, final layer norm."""

    def __init__(self, tokens: int, positions: int, layers: list[nn.Module], dim: int) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(tokens, dim), nn.Embedding(positions, dim)
        self.layernorm_embedding, self.final_ln = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.layers: Any = nn.ModuleList(layers)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed ids (batch, n) at positions (n,): (batch, n, dim)."""
        out: Tensor = self.layernorm_embedding(self.embed_tokens(ids) + self.embed_positions(positions))
        return out


class DalleMini(ImageTokenTransformer[DalleMiniCache]):
    """DALL·E Mini or Mega.

    Text ids come from `load_text_encoder(…, kind="dalle-mini")`: <s>, ids, </s>, padded with 1. The start token of the
    image has the id `num_image_tokens`, the first row after the codes, as in training.

    >>> config = DalleMiniConfig(100, 16, 8, dim=64, ff_dim=128, encoder_depth=1, decoder_depth=1)
    >>> transformer = DalleMini(config).requires_grad_(False)
    >>> transformer.image_token_logits(torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)).shape
    torch.Size([1, 4, 16])
    """

    causal_mask: Tensor

    def __init__(self, config: DalleMiniConfig) -> None:
        super().__init__()
        self.config = c = config
        encoder: list[nn.Module] = [EncoderLayer(c.dim, c.ff_dim) for _ in range(c.encoder_depth)]
        decoder: list[nn.Module] = [DecoderLayer(c.dim, c.ff_dim) for _ in range(c.decoder_depth)]
        self.text_encoder = Stack(c.num_text_tokens, c.text_seq_len, encoder, c.dim)
        self.image_decoder = Stack(c.num_image_tokens + 1, c.image_seq_len, decoder, c.dim)
        self.lm_head = nn.Linear(c.dim, c.num_image_tokens, bias=False)
        mask = torch.ones(c.image_seq_len, c.image_seq_len, dtype=torch.bool, device="cpu").tril()
        self.register_buffer("causal_mask", mask, persistent=False)

    def encode_text(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode text ids, int64 (batch, text_seq_len).

        Returns hidden states, float (batch, text_seq_len, dim), and the attention mask, bool (batch, 1, 1,
        text_seq_len), False at padding. Raises ValueError for another length.
        """
        if text_ids.shape[-1] != self.config.text_seq_len:
            raise ValueError(f"text has {text_ids.shape[-1]} tokens; this transformer takes {self.config.text_seq_len}")
        mask = (text_ids != PAD)[:, None, None]
        x = self.text_encoder.embed(text_ids, torch.arange(text_ids.shape[1], device=text_ids.device))
        for layer in self.text_encoder.layers:
            x = layer(x, mask)
        return self.text_encoder.final_ln(x), mask

    def decode(self, ids: Tensor, positions: Tensor, cache: DalleMiniCache, end: int | None) -> Tensor:
        """Decode ids (batch, n) at positions (n,) to hidden states (batch, n, dim). Position 0 is the start token.

        Writes the keys and values of these positions to the cache. Attends to positions 0 … end - 1, or to all
        positions under the causal mask if `end` is None.
        """
        x, visible = self.image_decoder.embed(ids, positions), self.config.image_seq_len if end is None else end
        # A single position that is the last one attends to all keys that are read.
        mask = None if end is not None and len(positions) == 1 else self.causal_mask[positions, :visible]
        for i, layer in enumerate(self.image_decoder.layers):
            h = layer.pre_self_attn_layer_norm(x)
            k, v = layer.self_attn.keys_and_values(h)
            k = cache.keys[i].index_copy_(2, positions, k)[:, :, :visible]
            v = cache.values[i].index_copy_(2, positions, v)[:, :, :visible]
            x = x + layer.self_attn_layer_norm(layer.self_attn(layer.self_attn.queries(h), k, v, mask))
            # The rows of one prompt share its text keys, so they are batched as queries of one sequence.
            h = layer.pre_encoder_attn_layer_norm(x).view(cache.prompts, -1, x.shape[-1])
            k, v = cache.text_keys[i], cache.text_values[i]
            h = layer.encoder_attn(layer.encoder_attn.queries(h), k, v, cache.text_mask)
            x = x + layer.encoder_attn_layer_norm(h.view(x.shape))
            x = x + layer.glu(x)
        out: Tensor = self.image_decoder.final_ln(x)
        return out

    def image_logits(self, x: Tensor) -> Tensor:
        """Map hidden states (batch, n, dim) to logits (batch, n, num_image_tokens)."""
        logits: Tensor = (self.image_head or self.lm_head)(x)
        return logits

    def image_token_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        c, n = self.config, min(image_ids.shape[1] + 1, self.config.image_seq_len)
        cache = self.new_cache(len(text_ids), 1)
        if torch.is_grad_enabled():  # autograd forbids writing in place to views of a tensor that layers share
            for name in ("keys", "values", "text_keys", "text_values"):
                setattr(cache, name, [layer.clone() for layer in getattr(cache, name)])
        self.write_text(text_ids, cache)
        ids = F.pad(image_ids, (1, 0), value=c.num_image_tokens)[:, :n]
        return self.image_logits(self.decode(ids, torch.arange(n, device=ids.device), cache, n))

    def new_cache(self, prompts: int, rows: int) -> DalleMiniCache:
        c, weight = self.config, self.image_decoder.final_ln.weight  # has the dtype of the arithmetic
        heads = c.dim // HEAD_WIDTH
        text = weight.new_zeros(2, c.decoder_depth, prompts, heads, c.text_seq_len, HEAD_WIDTH)
        keys, values = weight.new_zeros(2, c.decoder_depth, prompts * rows, heads, c.image_seq_len, HEAD_WIDTH)
        mask = torch.zeros(prompts, 1, 1, c.text_seq_len, dtype=torch.bool, device=weight.device)
        cache = DalleMiniCache(prompts, rows, keys, values, text[0], text[1], mask)
        cache.first_logits = weight.new_zeros(prompts, c.num_image_tokens)
        return cache

    def write_text(self, text_ids: Tensor, cache: DalleMiniCache) -> None:
        """Encode the texts, and write their mask and the keys and values of the cross-attention to the cache."""
        encoded, mask = self.encode_text(text_ids)
        cache.text_mask.copy_(mask)
        for i, layer in enumerate(self.image_decoder.layers):
            k, v = layer.encoder_attn.keys_and_values(encoded)
            cache.text_keys[i].copy_(k)
            cache.text_values[i].copy_(v)

    def fill_cache(self, text_ids: Tensor, cache: DalleMiniCache) -> None:
        self.write_text(text_ids, cache)
        start = text_ids.new_full((len(text_ids) * cache.rows, 1), self.config.num_image_tokens)
        hidden = self.decode(start, start.new_zeros(1), cache, 1)[:: cache.rows]
        cache.first_logits.copy_(self.image_logits(hidden)[:, 0])

    def step(self, previous: Tensor, place: Tensor, cache: DalleMiniCache, end: int | None = None) -> Tensor:
        ids = previous.repeat(cache.prompts, 1)
        return self.image_logits(self.decode(ids, place + 1, cache, None if end is None else end + 1))

    @property
    def cache_numbers(self) -> int:
        c = self.config
        return 2 * c.decoder_depth * c.dim * (c.image_seq_len + c.text_seq_len)

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.lm_head.weight, None

    @property
    def decoder(self) -> nn.Module:
        return self.image_decoder

    def empty_text(self) -> Tensor:
        ids = torch.full((self.config.text_seq_len,), PAD, device=self.lm_head.weight.device)
        ids[0], ids[1] = START, END
        return ids

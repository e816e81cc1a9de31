"""ruDALL-E (Malevich, Emojich, Surrealist): a decoder-only transformer, with the names of its checkpoints.

Source: ai-forever/ru-dalle 1.1.3, `dalle/model.py`, `dalle/transformer.py`. Layer norms stand before and after each
function (CogView's sandwich, arXiv 2105.13290).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.interface import Cache, ImageTokenTransformer

START, END = 2, 3  # ids in the text; 0 is padding, 1 an unknown character
VERSIONS = ("v2", "v3")
REACH = 5  # of the convolutional window, in rows and in columns


@dataclass(frozen=True)
class RudalleConfig:
    """Sizes and rules of a Rudalle.

    version: the rules it was trained with, ru-dalle's `hf_version`. "v2" (Malevich's first files, Emojich) puts another
    start token before the text, which its masks do not count, and its convolutional window wraps at the border. "v3"
    (Malevich's later file, Surrealist) does neither.
    """

    num_text_tokens: int  # words of the tokenizer; the text vocabulary is `text_seq_len` wider
    num_image_tokens: int
    text_seq_len: int
    dim: int
    depth: int
    heads: int
    grid_size: int = 32
    version: str = "v3"
    loss_img_weight: float = 7.0

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(f"version={self.version!r} is not known; expected {' or '.join(VERSIONS)}")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2

    @property
    def text_length(self) -> int:
        """Positions before the image."""
        return self.text_seq_len + (self.version == "v2")

    @property
    def seq_len(self) -> int:
        """Positions that are ever fed: the last image token predicts nothing."""
        return self.text_length + self.image_seq_len - 1

    @property
    def text_vocabulary(self) -> int:
        return self.num_text_tokens + self.text_seq_len

    @property
    def text_family(self) -> str:
        """The `kind` of `dall3.text.load_text_encoder` that encodes its prompts."""
        return "rudalle"


def attention_mask(kind: str, config: RudalleConfig) -> Tensor:
    """Which position sees which, bool (seq_len, seq_len); row = query, column = key; causal, all text visible.

    kind: "row" (the `grid_size` positions before), "column" (the same column) or "conv" (a window of 11 × 11). All
    kinds take the first `text_seq_len` positions as text, by version "v2" too, where there is one position more.
    """
    grid, text = config.grid_size, config.text_seq_len
    places = torch.arange(config.seq_len, device="cpu") - text  # real on a meta model too
    back = places[:, None] - places[None, :]
    if kind == "row":
        near = back <= grid
    elif kind == "column":
        near = back % grid == 0
    else:
        rows, columns = places // grid, places % grid
        near = torch.ones_like(back, dtype=torch.bool)
        for axis in (rows, columns):
            apart = (axis[:, None] - axis[None, :]).abs()
            if config.version == "v2":
                apart = torch.minimum(apart % grid, -apart % grid)
            near &= apart <= REACH
    return (back >= 0) & (near | (places < 0))


def mask_kind(layer: int, depth: int) -> str:
    return "column" if layer % 4 == 1 else "conv" if layer == depth - 1 else "row"


@dataclass(eq=False)
class RudalleCache(Cache):
    """Keys and values of all layers."""

    keys: Tensor  # float (layers, prompts · rows, heads, seq_len, width of a head)
    values: Tensor


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value, self.dense = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (batch, n, dim) to queries, keys and values, each (batch, heads, n, width of a head)."""
        return self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(batch, heads, n, width of a head) -> (batch, n, dim)."""
        out: Tensor = self.dense(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))
        return out


class Layer(nn.Module):
    def __init__(self, config: RudalleConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.input_layernorm, self.before_first_addition_layernorm = (nn.LayerNorm(config.dim) for _ in range(2))
        self.post_attention_layernorm, self.before_second_addition_layernorm = (
            nn.LayerNorm(config.dim) for _ in range(2)
        )
        self.attention, self.mlp = Attention(config.dim, config.heads), MLP(config.dim)


class Layers(nn.Module):
    def __init__(self, config: RudalleConfig) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(Layer(config, mask_kind(i, config.depth)) for i in range(config.depth))
        self.final_layernorm = nn.LayerNorm(config.dim)


class Rudalle(ImageTokenTransformer[RudalleCache]):
    """ruDALL-E. Text ids are those of `load_text_encoder(…, kind="rudalle")`: 2, ids, 3, padding 0."""

    def __init__(self, config: RudalleConfig) -> None:
        super().__init__()
        self.config = c = config
        self.text_embeddings = nn.Embedding(c.text_vocabulary, c.dim)
        self.image_embeddings = nn.Embedding(c.num_image_tokens, c.dim)
        self.text_pos_embeddings = nn.Embedding(c.text_seq_len + 1, c.dim)  # "v3" does not use the last row
        self.image_row_embeddings = nn.Embedding(c.grid_size, c.dim)
        self.image_col_embeddings = nn.Embedding(c.grid_size, c.dim)
        self.transformer = Layers(c)
        head = nn.Linear(c.dim, c.text_vocabulary + c.num_image_tokens)
        self.to_logits: Any = nn.Sequential(nn.LayerNorm(c.dim), head)
        for kind in ("row", "column", "conv"):
            self.register_buffer(f"{kind}_mask", attention_mask(kind, c), persistent=False)

    def pad_text(self, text_ids: Tensor) -> Tensor:
        """Every 0 becomes the padding id of its own position."""
        padding = torch.arange(self.config.text_seq_len, device=text_ids.device) + self.config.num_text_tokens
        return torch.where(text_ids == 0, padding, text_ids)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Text ids, int64 (batch, text_seq_len), to embeddings (batch, text_length, dim). Raises ValueError for another
        length.
        """
        if text_ids.shape[-1] != self.config.text_seq_len:
            raise ValueError(f"text has {text_ids.shape[-1]} tokens; this transformer takes {self.config.text_seq_len}")
        ids = F.pad(self.pad_text(text_ids), (self.config.text_length - self.config.text_seq_len, 0), value=START)
        out: Tensor = self.text_embeddings(ids) + self.text_pos_embeddings.weight[: self.config.text_length]
        return out

    def embed_image(self, image_ids: Tensor, places: Tensor) -> Tensor:
        """Image ids (batch, n) at `places` (n,) of the grid, 0 first, to embeddings (batch, n, dim)."""
        grid = self.config.grid_size
        rows, columns = self.image_row_embeddings(places // grid), self.image_col_embeddings(places % grid)
        out: Tensor = self.image_embeddings(image_ids) + rows + columns
        return out

    def run(self, x: Tensor, positions: Tensor, end: int | None, cache: RudalleCache | None = None) -> Tensor:
        """Embeddings (batch, n, dim) at `positions` (n,) to hidden states (batch, n, dim).

        With a cache their keys and values are written to it, and those of positions 0 … end - 1 are read, of all if
        end is None. Without one x holds all positions before `end`.
        """
        visible = self.config.seq_len if end is None else end
        masks = {kind: self.get_buffer(f"{kind}_mask")[positions, :visible] for kind in ("row", "column", "conv")}
        for i, layer in enumerate(self.transformer.layers):
            q, k, v = layer.attention.project(layer.input_layernorm(x))
            if cache is not None:
                k = cache.keys[i].index_copy_(2, positions, k)[:, :, :visible]
                v = cache.values[i].index_copy_(2, positions, v)[:, :, :visible]
            h = finite(layer.attention(q, k, v, masks[layer.kind]))
            x = x + layer.before_first_addition_layernorm(h)
            h = finite(layer.mlp(layer.post_attention_layernorm(x)))
            x = x + layer.before_second_addition_layernorm(h)
        out: Tensor = self.to_logits[0](self.transformer.final_layernorm(x))
        return out

    def image_logits(self, x: Tensor) -> Tensor:
        """Hidden states (batch, n, dim) to logits (batch, n, num_image_tokens): half of the head only."""
        if self.image_head is not None:
            logits: Tensor = self.image_head(x)
            return logits
        return F.linear(x, *self.head)

    def logits(self, text_ids: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, text_length, text vocabulary) of what follows each text position, and (batch, n + 1 or
        grid_size², num_image_tokens) of the image tokens, given image_ids (batch, n).
        """
        c, device = self.config, text_ids.device
        x = self.embed_image(image_ids, torch.arange(image_ids.shape[1], device=device))
        x = torch.cat((self.embed_text(text_ids), x), dim=1)[:, : c.seq_len]
        x = self.run(x, torch.arange(x.shape[1], device=device), x.shape[1])
        linear, text = self.to_logits[1], x[:, : c.text_length]
        words = F.linear(text, linear.weight[: c.text_vocabulary], linear.bias[: c.text_vocabulary])
        return words, self.image_logits(x[:, c.text_length - 1 :])

    def loss(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """The next token's mean cross-entropy in nats, text and image weighted 1 : loss_img_weight.

        Every text id after the start and every image token count once, by the logits that they are drawn from.
        ru-dalle's own "v3" instead takes image token 0 for a text id, and does not train its image logits.
        """
        words, image = self.logits(text_ids, image_ids)
        following = self.pad_text(text_ids)[:, self.config.text_seq_len - self.config.text_length + 1 :]
        text_loss = F.cross_entropy(words[:, :-1].transpose(1, 2), following)
        image_loss = F.cross_entropy(image.transpose(1, 2), image_ids)
        weight = self.config.loss_img_weight
        return (text_loss + weight * image_loss) / (weight + 1)

    def image_token_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        return self.logits(text_ids, image_ids)[1]

    def new_cache(self, prompts: int, rows: int) -> RudalleCache:
        c, weight = self.config, self.head[0]
        shape = c.depth, prompts * rows, c.heads, c.seq_len, c.dim // c.heads
        cache = RudalleCache(prompts, rows, weight.new_zeros(shape), weight.new_zeros(shape))
        cache.first_logits = weight.new_zeros(prompts, c.num_image_tokens)
        return cache

    def fill_cache(self, text_ids: Tensor, cache: RudalleCache) -> None:
        once, length = self.new_cache(cache.prompts, 1), self.config.text_length
        hidden = self.run(self.embed_text(text_ids), torch.arange(length, device=text_ids.device), length, once)
        cache.first_logits.copy_(self.image_logits(hidden[:, -1:])[:, 0])
        for tensor, run in ((cache.keys, once.keys), (cache.values, once.values)):
            tensor.unflatten(1, (cache.prompts, cache.rows)).copy_(run[:, :, None])

    def step(self, previous: Tensor, place: Tensor, cache: RudalleCache, end: int | None = None) -> Tensor:
        x, length = self.embed_image(previous, place).repeat(cache.prompts, 1, 1), self.config.text_length
        return self.image_logits(self.run(x, place + length, None if end is None else end + length, cache))

    @property
    def cache_numbers(self) -> int:
        return 2 * self.config.depth * self.config.dim * self.config.seq_len

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        linear, start = self.to_logits[1], self.config.text_vocabulary
        return linear.weight[start:], linear.bias[start:]

    @property
    def decoder(self) -> nn.Module:
        return self.transformer

    def empty_text(self) -> Tensor:
        ids = torch.zeros(self.config.text_seq_len, dtype=torch.int64, device=self.head[0].device)
        ids[0], ids[1] = START, END
        return ids


def finite(x: Tensor) -> Tensor:
    """Numbers beyond float16 at its border: the layer norm behind this one would else make NaN of them."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x

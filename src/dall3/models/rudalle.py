"""ruDALL-E (Malevich, Emojich, Surrealist): a decoder-only transformer with the parameter names of its checkpoints.

Source: ai-forever/ru-dalle 1.1.3, `dalle/model.py`, `dalle/transformer.py`. Each attention and MLP has a layer norm
before and after it (sandwich layer norm of CogView, arXiv 2105.13290).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.interface import Cache, ImageTokenTransformer

START, END = 2, 3  # special text ids; 0 is padding, 1 an unknown character
VERSIONS = ("v2", "v3")
REACH = 5  # radius of the convolutional window, in rows and columns


@dataclass(frozen=True)
class RudalleConfig:
    """Configuration of a `Rudalle`.

    version: ru-dalle's `hf_version`. "v2" (the first Malevich files, Emojich) prepends a second start token to the
    text. Its masks do not count this token, and its convolutional window wraps around at the border. "v3" (the later
    Malevich file, Surrealist) does neither. loss_img_weight: weight of the image loss relative to the text loss.

    Raises ValueError for another version, and if `dim` is not divisible by `heads`.
    """

    num_text_tokens: int  # size of the tokenizer's vocabulary; each text position adds a padding id of its own
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
        """Number of positions before the image."""
        return self.text_seq_len + (self.version == "v2")

    @property
    def seq_len(self) -> int:
        """Number of input positions. The last image token is never an input."""
        return self.text_length + self.image_seq_len - 1

    @property
    def text_vocabulary(self) -> int:
        return self.num_text_tokens + self.text_seq_len

    @property
    def text_family(self) -> str:
        """The `kind` of `dall3.text.load_text_encoder` for the prompts of this transformer."""
        return "rudalle"


def attention_mask(kind: str, config: RudalleConfig) -> Tensor:
    """Causal attention mask, bool (seq_len, seq_len): rows are queries, columns are keys. All text is visible.

    kind: "row" (the `grid_size` positions before), "column" (the same column) or "conv" (an 11 × 11 window). The masks
    count `text_seq_len` text positions, also in "v2", which has one more.
    """
    grid, text = config.grid_size, config.text_seq_len
    places = torch.arange(config.seq_len, device="cpu") - text  # real even under the meta device
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
    """The kind of the attention mask of a layer."""
    return "column" if layer % 4 == 1 else "conv" if layer == depth - 1 else "row"


@dataclass(eq=False)
class RudalleCache(Cache):
    """Keys and values of all layers."""

    keys: Tensor  # float (layers, prompts · rows, heads, seq_len, dim_head)
    values: Tensor


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value, self.dense = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Project x (batch, n, dim) to queries, keys and values, each (batch, heads, n, dim_head)."""
        return self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(batch, heads, n, dim_head) -> (batch, n, dim)."""
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
    """ruDALL-E. Text ids come from `load_text_encoder(…, kind="rudalle")`: 2, ids, 3, padded with 0.

    >>> transformer = Rudalle(RudalleConfig(100, 16, 8, dim=32, depth=2, heads=2, grid_size=4))
    >>> transformer.image_token_logits(torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)).shape
    torch.Size([1, 4, 16])
    """

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
        """Replace each padding 0 at position i by the id `num_text_tokens + i`."""
        padding = torch.arange(self.config.text_seq_len, device=text_ids.device) + self.config.num_text_tokens
        return torch.where(text_ids == 0, padding, text_ids)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Embed text ids, int64 (batch, text_seq_len): (batch, text_length, dim).

        Raises ValueError for another length.
        """
        if text_ids.shape[-1] != self.config.text_seq_len:
            raise ValueError(f"text has {text_ids.shape[-1]} tokens; this transformer takes {self.config.text_seq_len}")
        ids = F.pad(self.pad_text(text_ids), (self.config.text_length - self.config.text_seq_len, 0), value=START)
        out: Tensor = self.text_embeddings(ids) + self.text_pos_embeddings.weight[: self.config.text_length]
        return out

    def embed_image(self, image_ids: Tensor, places: Tensor) -> Tensor:
        """Embed image ids (batch, n) at grid indices `places` (n,), counted from 0: (batch, n, dim)."""
        grid = self.config.grid_size
        rows, columns = self.image_row_embeddings(places // grid), self.image_col_embeddings(places % grid)
        out: Tensor = self.image_embeddings(image_ids) + rows + columns
        return out

    def run(self, x: Tensor, positions: Tensor, end: int | None, cache: RudalleCache | None = None) -> Tensor:
        """Run all layers on embeddings (batch, n, dim) at `positions` (n,); returns hidden states (batch, n, dim).

        With a cache, their keys and values are written to it, and positions 0 … end - 1 are attended to, or all
        positions under the masks if `end` is None. Without a cache, x must hold all positions before `end`.
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
        """Map hidden states (batch, n, dim) to image logits (batch, n, num_image_tokens)."""
        if self.image_head is not None:
            logits: Tensor = self.image_head(x)
            return logits
        return F.linear(x, *self.head)

    def logits(self, text_ids: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Text and image logits in one forward pass (teacher forcing).

        text_ids: int64 (batch, text_seq_len). image_ids: int64 (batch, n). Returns the logits of the ids that follow
        each text position, (batch, text_length, text_vocabulary), and of the image tokens, (batch, min(n + 1,
        grid_size²), num_image_tokens).
        """
        c, device = self.config, text_ids.device
        x = self.embed_image(image_ids, torch.arange(image_ids.shape[1], device=device))
        x = torch.cat((self.embed_text(text_ids), x), dim=1)[:, : c.seq_len]
        x = self.run(x, torch.arange(x.shape[1], device=device), x.shape[1])
        linear, text = self.to_logits[1], x[:, : c.text_length]
        words = F.linear(text, linear.weight[: c.text_vocabulary], linear.bias[: c.text_vocabulary])
        return words, self.image_logits(x[:, c.text_length - 1 :])

    def loss(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next token in nats; text and image are weighted 1 : loss_img_weight.

        text_ids: int64 (batch, text_seq_len). image_ids: int64 (batch, grid_size²). Every text id after the start token
        and every image token counts once, with the logits that sampling uses. ru-dalle's "v3" differs: it treats image
        token 0 as a text id and does not train its image logits.
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
        c, weight = self.config, self.transformer.final_layernorm.weight  # has the dtype of the arithmetic
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
    """Clamp float16 infinities to the largest finite value; the layer norm that follows would turn them into NaN."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x

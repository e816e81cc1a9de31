"""The DALL·E transformer (arXiv 2102.12092) of DALLE-pytorch, releases 1.0 to 1.6 and Jack000's fork.

Sequence: <bos>, `text_seq_len` text tokens, `grid_size`² image tokens. Vocabulary: the tokenizer's ids, one padding id
for each text position, then the image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.attention import (
    Attention,
    LayerCache,
    Positions,
    attention_pattern,
    remember,
    sparse_layout,
    sparse_pattern,
)
from dall3.models.interface import Cache, ImageTokenTransformer

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like", "conv_like_causal", "sparse", "mlp")
FEED_FORWARD_MULT = 4


@dataclass(frozen=True)
class TransformerConfig:
    """Configuration of a `DalleTransformer`, with DALLE-pytorch's names for its hyper-parameters.

    Raises ValueError for settings that contradict each other, such as rotary embeddings with attention type "mlp".
    """

    num_text_tokens: int  # size of the tokenizer's vocabulary; each text position adds a padding id of its own
    num_image_tokens: int
    text_seq_len: int
    dim: int
    depth: int
    heads: int = 8
    dim_head: int = 64
    grid_size: int = 16
    attn_types: tuple[str, ...] = ("full",)  # cycled over the layers
    rotary_emb: bool = True
    shift_tokens: bool = True
    reversible: bool = False
    stable: bool = False
    sandwich_norm: bool = False
    shared_attn_ids: tuple[int, ...] | None = None  # layers with the same id share weights; cycled
    shared_ff_ids: tuple[int, ...] | None = None
    share_input_output_emb: bool = False
    loss_img_weight: float = 7.0

    def __post_init__(self) -> None:
        unknown = set(self.attn_types) - set(ATTENTION_TYPES)
        if unknown or not self.attn_types:
            raise ValueError(
                f"attn_types {sorted(unknown)} are not known; expected some of {', '.join(ATTENTION_TYPES)}"
            )
        if self.rotary_emb and "mlp" in self.attn_types:
            raise ValueError("attention type 'mlp' has no queries to rotate; set rotary_emb=False")
        if self.shift_tokens and self.dim % 4:
            raise ValueError(f"shift_tokens moves quarters of the channels; dim={self.dim} is not divisible by 4")
        if self.rotary_emb and self.dim_head % 2:
            raise ValueError(f"rotary_emb turns pairs of channels; dim_head={self.dim_head} is odd")

    @property
    def text_length(self) -> int:
        """Number of positions before the image: <bos> and the text."""
        return self.text_seq_len + 1

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2

    @property
    def seq_len(self) -> int:
        """Number of input positions. The last image token is never an input."""
        return self.text_seq_len + self.image_seq_len

    @property
    def text_vocabulary(self) -> int:
        return self.num_text_tokens + self.text_seq_len


def rotary_table(config: TransformerConfig) -> Tensor:
    """Rotary angles, float (text_length + image_seq_len, channels): a third each for text position, row and column.

    Image tokens have text position 8192. Text tokens have row and column -10; the rows and columns of the image run
    from -1 to 1 (DALLE-pytorch, `transformer.py`).
    """
    from rotary_embedding_torch import RotaryEmbedding

    part, image_length = config.dim_head // 3, config.image_seq_len
    with torch.device("cpu"):  # real even under the meta device
        sequence, pixel = RotaryEmbedding(dim=part), RotaryEmbedding(dim=part, freqs_for="pixel")
        place = torch.cat((torch.arange(config.text_length).float(), torch.full((image_length,), 8192.0)))
        axis = torch.linspace(-1, 1, steps=config.grid_size)
        outside = torch.full((config.text_length,), -10.0)
        row = torch.cat((outside, axis.repeat_interleave(config.grid_size)))
        column = torch.cat((outside, axis.repeat(config.grid_size)))
        return torch.cat((sequence(place), pixel(row), pixel(column)), dim=-1).detach()


class FeedForward(nn.Module):
    """Feed-forward with a gated GELU, GEGLU (arXiv 2002.05202)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim * FEED_FORWARD_MULT * 2)
        self.proj_out = nn.Linear(dim * FEED_FORWARD_MULT, dim)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        x, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(x * F.gelu(gate))


class GatedMLP(nn.Module):
    """gMLP (arXiv 2105.08050): a learned causal matrix mixes the positions instead of attention."""

    def __init__(self, dim: int, seq_len: int) -> None:
        super().__init__()
        inner = dim * FEED_FORWARD_MULT
        self.proj_in = nn.Linear(dim, inner)
        self.norm = nn.LayerNorm(inner // 2)
        self.weight = nn.Parameter(torch.empty(seq_len, seq_len).uniform_(-1e-3 / seq_len, 1e-3 / seq_len))
        self.bias = nn.Parameter(torch.ones(seq_len))
        self.proj_out = nn.Linear(inner // 2, dim)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        x, gate = F.gelu(self.proj_in(x)).chunk(2, dim=-1)
        gate = remember(cache, "gate", self.norm(gate), positions)
        weight, mask = self.weight[positions.index, : positions.visible], positions.masks["full"]
        weight = weight if mask is None else weight * mask
        return self.proj_out(x * (weight @ gate + self.bias[positions.index, None]))


class Sublayer(nn.Module):
    """Layer norm, token shift, and attention or feed-forward. `scale` is CaiT's LayerScale (arXiv 2103.17239)."""

    def __init__(self, config: TransformerConfig, function: nn.Module, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.function = function
        self.norm_out = nn.LayerNorm(config.dim) if config.sandwich_norm else nn.Identity()
        init = 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6
        self.scale = nn.Parameter(torch.full((config.dim,), init))
        self.shift_tokens = config.shift_tokens

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        x = self.norm(x)
        if self.shift_tokens:
            x = shift_tokens(x, positions, cache)
        out: Tensor = self.norm_out(self.function(x, positions, cache))
        return out


def shift_tokens(x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
    """Token shift of x (batch, n, dim): the first two quarters of the channels come from neighbouring positions.

    In the image, the first quarter comes from the position above and the second from the left. In the text, both come
    from the left.
    """
    quarter, text = x.shape[-1] // 4, positions.text_length
    if cache is None:  # all positions are present: slices have a faster backward pass than a lookup
        first, second, rest = x.split((quarter, quarter, 2 * quarter), dim=-1)
        first = torch.cat((moved(first[:, :text], 1), moved(first[:, text:], positions.grid_size)), dim=1)
        second = torch.cat((moved(second[:, :text], 1), moved(second[:, text:], 1) * positions.has_left[text:]), dim=1)
        return torch.cat((first, second, rest), dim=-1)
    quarters = cache.update("shift", x[..., : 2 * quarter], positions.index).view(len(x), -1, quarter)
    shifted = quarters.index_select(1, positions.neighbours).view(len(x), -1, 2 * quarter)
    return torch.cat((shifted, x[..., 2 * quarter :]), dim=-1)


def moved(x: Tensor, steps: int) -> Tensor:
    """Shift x (batch, n, width) by `steps` positions; the first `steps` rows are zero."""
    return F.pad(x, (0, 0, steps, 0))[:, : x.shape[1]]


@dataclass(eq=False)
class DalleCache(Cache):
    """Key/value caches of all layers."""

    layers: list[LayerCache]  # two per layer, one for each sublayer


class DalleTransformer(ImageTokenTransformer[DalleCache]):
    """The DALL·E transformer of DALLE-pytorch (`dalle_pytorch.py`).

    `forward` returns the logits of the original. `prefill` and `step` generate image tokens one by one, with a cache.
    Raises ValueError if layers of different attention types share weights.

    >>> transformer = DalleTransformer(TransformerConfig(100, 16, 8, dim=32, depth=2, heads=2, grid_size=4))
    >>> text_ids, image_ids = torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64)
    >>> transformer(text_ids, image_ids).shape
    torch.Size([1, 24, 124])
    """

    config: TransformerConfig

    rotary_cos: Tensor
    rotary_sin: Tensor
    neighbours: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.to_logits = nn.Linear(c.dim, c.text_vocabulary + c.num_image_tokens)
        if not c.share_input_output_emb:
            self.text_emb = nn.Embedding(c.text_vocabulary, c.dim)
            self.image_emb = nn.Embedding(c.num_image_tokens, c.dim)
        if not c.rotary_emb:
            self.text_pos_emb = nn.Embedding(c.text_length, c.dim)
            self.row_pos_emb = nn.Embedding(c.grid_size, c.dim)
            self.column_pos_emb = nn.Embedding(c.grid_size, c.dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(Sublayer(c, function, i) for function in pair) for i, pair in enumerate(layer_functions(c))
        )
        self.norm_out = nn.LayerNorm(c.dim)

        if c.rotary_emb:
            self.set_rotary_angles(rotary_table(c))
        if "sparse" in c.attn_types:
            self.register_buffer("sparse_pattern", sparse_pattern(sparse_layout(c.seq_len, c.heads), c.seq_len))
        for kind in {"full", *c.attn_types} - {"mlp", "sparse"}:
            pattern = attention_pattern(kind, c.text_length, c.grid_size)
            self.register_buffer(f"{kind}_pattern", pattern, persistent=False)
        place = torch.arange(c.text_length + c.image_seq_len, device="cpu")  # real even under the meta device
        in_image, in_row = place >= c.text_length, (place - c.text_length) % c.grid_size
        above = torch.where(in_image, place - c.grid_size, place - 1)
        left = torch.where(in_image & (in_row == 0), -1, place - 1)
        has_above = (above >= 0) & ~(in_image & (above < c.text_length))
        # Index seq_len is a sentinel row of the cache that is never written, always zero.
        above, left = torch.where(has_above, above, c.seq_len), torch.where(left >= 0, left, c.seq_len)
        self.register_buffer("neighbours", torch.stack((2 * above, 2 * left + 1), dim=1), persistent=False)

    def set_rotary_angles(self, angles: Tensor) -> None:
        """Set the rotary angles (positions, channels), as stored in a checkpoint. Adjacent channels share an angle."""
        half = angles.reshape(angles.shape[-2:])[:, ::2]
        # The remaining channels are not rotated. Upstream's table lacks the last position, which is never an input.
        rows = self.config.text_length + self.config.image_seq_len - len(half)
        half = F.pad(half, (0, self.config.dim_head // 2 - half.shape[1], 0, rows))
        self.register_buffer("rotary_cos", half.cos())
        self.register_buffer("rotary_sin", half.sin())

    def forward(self, text_ids: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position, with the whole sequence as input (teacher forcing).

        text_ids: int64 (batch, text_seq_len), padded with 0. image_ids: int64 (batch, n), n ≤ grid_size², or None.
        Returns float (batch, positions, text_vocabulary + num_image_tokens). The positions are <bos>, the text and the
        image tokens, without the last image token of a full grid. Image tokens at text positions, and text tokens at
        image positions, have the lowest value of the dtype. Raises ValueError for a text of another length.
        """
        text, image = self.logits(text_ids, image_ids)
        lowest = torch.finfo(text.dtype).min
        text = F.pad(text, (0, self.config.num_image_tokens), value=lowest)
        return torch.cat((text, F.pad(image, (self.config.text_vocabulary, 0), value=lowest)), dim=1)

    def loss(self, text_ids: Tensor, image_ids: Tensor, seen_ids: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the next token in nats; text and image are weighted 1 : loss_img_weight.

        text_ids: int64 (batch, text_seq_len). image_ids: int64 (batch, grid_size²), the targets. seen_ids: image tokens
        that replace `image_ids` as the input; the targets stay the same.
        """
        text, image = self.logits(text_ids, image_ids if seen_ids is None else seen_ids)
        text_loss = F.cross_entropy(text.transpose(1, 2), self.pad_text(text_ids))
        image_loss = F.cross_entropy(image.transpose(1, 2), image_ids)
        weight = self.config.loss_img_weight
        return (text_loss + weight * image_loss) / (weight + 1)

    def logits(self, text_ids: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Text logits (batch, text_seq_len, text_vocabulary) and image logits (batch, n, num_image_tokens).

        n is the number of positions that an image token follows.
        """
        c = self.config
        x = self.embed_text(text_ids)
        if image_ids is not None:
            places = torch.arange(image_ids.shape[1], device=x.device)
            x = torch.cat((x, self.embed_image(image_ids, places)), dim=1)[:, : c.seq_len]
        if c.stable:
            x = x * 0.1 + x.detach() * 0.9  # scales the gradient by 0.1 (CogView, arXiv 2105.13290)
        x = self.run(x, torch.arange(x.shape[1], device=x.device), x.shape[1])
        return self.text_logits(x[:, : c.text_seq_len]), self.image_logits(x[:, c.text_seq_len :])

    def image_logits(self, x: Tensor) -> Tensor:
        """Map hidden states (batch, n, dim) from `run` to image logits (batch, n, num_image_tokens)."""
        if self.image_head is not None:
            logits: Tensor = self.image_head(x)
            return logits
        return F.linear(x, *self.head)

    def text_logits(self, x: Tensor) -> Tensor:
        """Map hidden states (batch, n, dim) from `run` to text logits (batch, n, text_vocabulary)."""
        end = self.config.text_vocabulary
        return F.linear(x, self.to_logits.weight[:end], self.to_logits.bias[:end])

    def pad_text(self, text_ids: Tensor) -> Tensor:
        """Replace each padding 0 at position i by the id `num_text_tokens + i`."""
        padding = torch.arange(self.config.text_seq_len, device=text_ids.device) + self.config.num_text_tokens
        return torch.where(text_ids == 0, padding, text_ids)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Embed text ids (batch, text_seq_len), padded with 0: (batch, text_length, dim), <bos> first.

        Raises ValueError for another length.
        """
        if text_ids.shape[-1] != self.config.text_seq_len:
            raise ValueError(f"text has {text_ids.shape[-1]} tokens; this transformer takes {self.config.text_seq_len}")
        return self.embed_words(F.pad(self.pad_text(text_ids), (1, 0)), slice(None))

    def embed_words(self, ids: Tensor, part: slice) -> Tensor:
        """Embed the positions `part` of text ids (batch, n) that begin with <bos> = 0, without replacing padding."""
        c = self.config
        table = self.to_logits.weight[: c.text_vocabulary] if c.share_input_output_emb else self.text_emb.weight
        x = F.embedding(ids[:, part], table)
        return x if c.rotary_emb else x + self.text_pos_emb.weight[part]

    def embed_image(self, image_ids: Tensor, places: Tensor) -> Tensor:
        """Embed image ids (batch, n) at grid indices `places` (n,), counted from 0: (batch, n, dim)."""
        c = self.config
        table = self.to_logits.weight[c.text_vocabulary :] if c.share_input_output_emb else self.image_emb.weight
        x = F.embedding(image_ids, table)
        if c.rotary_emb:
            return x
        return x + self.row_pos_emb(places // c.grid_size) + self.column_pos_emb(places % c.grid_size)

    def image_token_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        return self.logits(text_ids, image_ids)[1]

    def new_cache(self, prompts: int, rows: int) -> DalleCache:
        cache = DalleCache(prompts, rows, self.make_caches())
        cache.first_logits = self.to_logits.weight.new_empty(prompts, self.config.num_image_tokens)
        return cache

    def fill_cache(self, text_ids: Tensor, cache: DalleCache) -> None:
        length, text = self.config.text_length, self.make_caches()
        x = self.run(self.embed_text(text_ids), torch.arange(length, device=text_ids.device), length, text)
        cache.first_logits.copy_(self.image_logits(x[:, -1]))
        for layer, found in zip(cache.layers, text, strict=True):
            layer.copy_from(found, cache.rows)

    def step(self, previous: Tensor, place: Tensor, cache: DalleCache, end: int | None = None) -> Tensor:
        before = self.config.text_length
        x = self.embed_image(previous, place).repeat(cache.prompts, 1, 1)
        return self.image_logits(self.run(x, place + before, None if end is None else before + end, cache.layers))

    @property
    def cache_numbers(self) -> int:
        c = self.config
        kept = 2 * c.heads * c.dim_head + c.dim  # keys, values, and the token shift of both sublayers
        return c.depth * kept * (c.seq_len + 1) + c.num_image_tokens

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        start = self.config.text_vocabulary
        return self.to_logits.weight[start:], self.to_logits.bias[start:]

    @property
    def decoder(self) -> nn.Module:
        return self.layers

    @property
    def top_k_vocabulary(self) -> int:
        """Size of the text and image vocabulary together, as in DALLE-pytorch."""
        return self.config.text_vocabulary + self.config.num_image_tokens

    def make_caches(self) -> list[LayerCache]:
        """Empty caches for `run`, two per layer. The first call of `run` sets their batch size."""
        return [LayerCache(self.config.seq_len + 1) for _ in range(2 * self.config.depth)]

    def run(self, x: Tensor, index: Tensor, end: int | None, caches: list[LayerCache] | None = None) -> Tensor:
        """Run all layers on embeddings (batch, n, dim) of positions `index` (n,): hidden states (batch, n, dim).

        end: the last position + 1. Without caches, x must hold all positions before `end`. With caches, x holds the
        last positions, whose cache entries are written or overwritten. With caches and `end` None, the keys of all
        positions are read under a mask, so that shapes are the same for every token.
        """
        c, positions = self.config, self._positions(index, end)
        streams = [x, x] if c.reversible else [x]
        sublayers = [sublayer for pair in self.layers for sublayer in pair.children()]
        for i, sublayer in enumerate(sublayers):
            target, source = (i % 2, 1 - i % 2) if c.reversible else (0, 0)
            out = sublayer(streams[source], positions, caches[i] if caches else None)
            streams[target] = torch.addcmul(streams[target], out, cast(Tensor, sublayer.scale))
        x = (streams[0] + streams[1]) / 2 if c.reversible else streams[0]
        if c.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        return self.norm_out(x)

    def _positions(self, index: Tensor, end: int | None) -> Positions:
        c, visible = self.config, self.config.seq_len if end is None else end
        masks: dict[str, Tensor | None] = {"full": None}
        for kind in {"full", *c.attn_types} - {"mlp"}:
            if kind != "full" or end is None or len(index) > 1:  # the last position attends to all keys: no mask
                masks[kind] = self.get_buffer(f"{kind}_pattern")[..., index, :visible]
        cos = sin = None
        if c.rotary_emb:
            cos = self.rotary_cos[index].repeat_interleave(2, dim=-1)
            sin = torch.stack((-self.rotary_sin[index], self.rotary_sin[index]), dim=-1).flatten(-2)
        neighbours = self.neighbours[index]
        has_left = neighbours[:, 1:] < 2 * c.seq_len
        return Positions(index, visible, masks, cos, sin, neighbours.flatten(), has_left, c.text_length, c.grid_size)


def layer_functions(config: TransformerConfig) -> list[tuple[nn.Module, nn.Module]]:
    """Attention (or gMLP) and feed-forward modules of each layer. Layers that share weights get the same modules.

    Raises ValueError if layers of different attention types share weights.
    """
    c = config
    attentions: dict[int, tuple[str, nn.Module]] = {}
    feed_forwards: dict[int, nn.Module] = {}
    functions: list[tuple[nn.Module, nn.Module]] = []
    for i in range(c.depth):
        kind = c.attn_types[i % len(c.attn_types)]
        attn_id = c.shared_attn_ids[i % len(c.shared_attn_ids)] if c.shared_attn_ids else i
        ff_id = c.shared_ff_ids[i % len(c.shared_ff_ids)] if c.shared_ff_ids else i
        if attn_id not in attentions:
            mixer = GatedMLP(c.dim, c.seq_len) if kind == "mlp" else Attention(c.dim, c.heads, c.dim_head, kind)
            attentions[attn_id] = (kind, mixer)
        if attentions[attn_id][0] != kind:
            raise ValueError(f"shared_attn_ids: layer {i} is '{kind}', but another type has its weights")
        if ff_id not in feed_forwards:
            feed_forwards[ff_id] = FeedForward(c.dim)
        functions.append((attentions[attn_id][1], feed_forwards[ff_id]))
    return functions

"""The transformer of DALLE-pytorch (after DALL·E, arXiv 2102.12092), for releases 1.0 to 1.6 and upstream's fork.

A sequence is <bos>, `text_seq_len` text tokens and `grid_size`² image tokens. The vocabulary of the logits is the text
vocabulary (the tokenizer's ids, then one padding id for each text position), followed by the image vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.models.attention import (
    Attention,
    LayerCache,
    Positions,
    attention_pattern,
    prefers_matmul,
    sparse_layout,
    sparse_pattern,
)
from dall3.models.interface import Cache, ImageTokenTransformer

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like", "conv_like_causal", "sparse", "mlp")
FEED_FORWARD_MULT = 4
# Smallest number of rows per prompt for which a CPU stores the keys and values of the text once for all rows. Attention
# to the text is then a product of matrices.
SHARING_ROWS = 8


@dataclass(frozen=True)
class TransformerConfig:
    """Configuration of a `DalleTransformer`, with DALLE-pytorch's names.

    Raises ValueError for an unknown attention type and for settings that contradict each other.
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
    shared_attn_ids: tuple[int, ...] | None = None  # layers with the same id share weights; cycled over the layers
    shared_ff_ids: tuple[int, ...] | None = None  # the same for the feed-forwards
    share_input_output_emb: bool = False
    loss_img_weight: float = 7.0  # weight of the image loss relative to the text loss

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


def rotary_angles(config: TransformerConfig) -> Tensor:
    """Rotary angles of DALLE-pytorch, float (text_length + image_seq_len, channels).

    The text position, the row and the column each have a third of the channels. Rows and columns of the image run from
    -1 to 1. Image tokens have the text position 8192; text tokens have the row and column -10.
    """
    from rotary_embedding_torch import RotaryEmbedding

    part, image_length = config.dim_head // 3, config.image_seq_len
    with torch.device("cpu"):  # even under the meta device
        sequence, pixel = RotaryEmbedding(dim=part), RotaryEmbedding(dim=part, freqs_for="pixel")
        place = torch.cat((torch.arange(config.text_length).float(), torch.full((image_length,), 8192.0)))
        axis = torch.linspace(-1, 1, steps=config.grid_size)
        outside = torch.full((config.text_length,), -10.0)
        row = torch.cat((outside, axis.repeat_interleave(config.grid_size)))
        column = torch.cat((outside, axis.repeat(config.grid_size)))
        return torch.cat((sequence(place), pixel(row), pixel(column)), dim=-1).detach()


def rotary_table(angles: Tensor, config: TransformerConfig) -> Tensor:
    """Cosine and sine, float (text_length + image_seq_len, dim_head / 2, 2), of angles (…, positions, channels).

    The two channels of a pair have the same angle. Channels without an angle are not rotated. The table of upstream
    lacks the last position, which is never an input.
    """
    by_pair = angles.reshape(angles.shape[-2:])[:, ::2]
    positions = config.text_length + config.image_seq_len
    by_pair = F.pad(by_pair, (0, config.dim_head // 2 - by_pair.shape[1], 0, positions - len(by_pair)))
    return torch.stack((by_pair.cos(), by_pair.sin()), dim=-1)


class FeedForward(nn.Module):
    """Two linear layers with a gated GELU between them (arXiv 2002.05202)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim * FEED_FORWARD_MULT * 2)
        self.proj_out = nn.Linear(dim * FEED_FORWARD_MULT, dim)

    def forward(self, x: Tensor, at: Positions, cache: LayerCache | None = None) -> Tensor:
        x, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(x * F.gelu(gate))


class GatedMLP(nn.Module):
    """gMLP (arXiv 2105.08050): a learned causal matrix mixes the positions, in place of attention."""

    def __init__(self, dim: int, seq_len: int) -> None:
        super().__init__()
        inner = dim * FEED_FORWARD_MULT
        self.proj_in = nn.Linear(dim, inner)
        self.norm = nn.LayerNorm(inner // 2)
        self.weight = nn.Parameter(torch.empty(seq_len, seq_len).uniform_(-1e-3 / seq_len, 1e-3 / seq_len))
        self.bias = nn.Parameter(torch.ones(seq_len))
        self.proj_out = nn.Linear(inner // 2, dim)

    def forward(self, x: Tensor, at: Positions, cache: LayerCache | None = None) -> Tensor:
        x, gate = F.gelu(self.proj_in(x)).chunk(2, dim=-1)
        gate = self.norm(gate)
        if cache is not None:
            gate = cache.update(gate[None], at)[0]
        weight, mask = self.weight[at.index, : at.visible], at.masks["full"]
        weight = weight if mask is None else weight * mask
        return self.proj_out(x * (weight @ gate + self.bias[at.index, None]))


class Sublayer(nn.Module):
    """Pre-norm residual branch: x + scale · norm_out(function(shift(norm(x)))).

    `scale` is CaiT's LayerScale (arXiv 2103.17239).
    """

    scale: Tensor

    def __init__(self, config: TransformerConfig, function: nn.Module, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.function = function
        self.norm_out = nn.LayerNorm(config.dim) if config.sandwich_norm else None
        init = 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6
        self.scale = nn.Parameter(torch.full((config.dim,), init))

    def forward(
        self, x: Tensor, residual: Tensor, at: Positions, shift: Shift | None, cache: LayerCache | None = None
    ) -> Tensor:
        """x: (batch, n, dim), the input of the branch. residual: the tensor that the branch is added to; x itself,
        unless the network is reversible. Returns (batch, n, dim).
        """
        x = self.norm(x)
        if shift is not None:
            x = shift(x)
        x = self.function(x, at, cache)
        if self.norm_out is not None:
            x = self.norm_out(x)
        return torch.addcmul(residual, x, self.scale)


Shift = Callable[[Tensor], Tensor]  # the token shift of one sublayer: (batch, n, dim) -> (batch, n, dim)


def shift_sequence(x: Tensor, at: Positions) -> Tensor:
    """Token shift of a whole sequence x (batch, n, dim): half of the channels are replaced by those of neighbours.

    In the image the first quarter comes from the token above and the second quarter from the token to the left; in the
    text both come from the previous token. Channels of missing neighbours are 0. This uses slices instead of the
    indices in `at`, because the backward pass of indexing is slow.
    """
    quarter, text = x.shape[-1] // 4, at.text_length
    has_left = torch.arange(x.shape[1] - text, device=x.device)[:, None] % at.grid_size > 0
    first, second, rest = x.split((quarter, quarter, 2 * quarter), dim=-1)
    first = torch.cat((delay(first[:, :text], 1), delay(first[:, text:], at.grid_size)), dim=1)
    second = torch.cat((delay(second[:, :text], 1), delay(second[:, text:], 1) * has_left), dim=1)
    return torch.cat((first, second, rest), dim=-1)


def delay(x: Tensor, steps: int) -> Tensor:
    """Shift x (batch, n, width) by `steps` positions towards the end, and fill the start with zeros."""
    return F.pad(x, (0, 0, steps, 0))[:, : x.shape[1]]


def shift_token(x: Tensor, neighbours: Tensor, shifted: list[Tensor]) -> Tensor:
    """Token shift of a single position, x (batch, 1, dim).

    neighbours: (batch, 1, dim / 2), from the cache. The half of x that later tokens need is appended to `shifted`.
    """
    own, rest = x.chunk(2, dim=-1)
    shifted.append(own)
    return torch.cat((neighbours, rest), dim=-1)


def shift_tokens(x: Tensor, cache: Tensor, index: Tensor, at: Positions) -> Tensor:
    """Token shift of several positions `index` (n,), x (batch, n, dim), which may be neighbours of each other.

    cache: (positions + 1, batch, dim / 2), the cache of this sublayer, which is written.
    """
    own, rest = x.chunk(2, dim=-1)
    cache.index_copy_(0, index, own.transpose(0, 1))
    return torch.cat((gather_neighbours(cache, at).transpose(0, 1), rest), dim=-1)


def gather_neighbours(cache: Tensor, at: Positions) -> Tensor:
    """Read the shifted channels of each position's neighbours: (n, …, dim / 2) from (positions + 1, …, dim / 2)."""
    above, left = cache.index_select(0, at.neighbours.flatten()).unflatten(0, (2, -1)).unbind()
    quarter = cache.shape[-1] // 2
    return torch.cat((above[..., :quarter], left[..., quarter:]), dim=-1)


class TransformerState:
    """Static cache of all sublayers: keys and values, and the channels that the token shift moves.

    layers: a LayerCache per sublayer. shifted: float (positions + 1, sublayers, batch, dim / 2). Its last row is never
    written and is always 0: missing neighbours have this index. All sublayers share the tensor, so that a step reads
    and writes it once.
    """

    def __init__(self, sublayers: int, positions: int, cached: int) -> None:
        """positions: number of positions of the sequence. cached: number of positions of the layer caches, which is
        smaller if they do not hold the text.
        """
        self.layers, self.positions = [LayerCache(cached) for _ in range(sublayers)], positions
        self.shifted: Tensor | None = None

    def shift_cache(self, like: Tensor, batch: int, width: int) -> Tensor:
        """`shifted`, which is allocated on first use with the dtype and device of `like`."""
        if self.shifted is None:
            with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                self.shifted = like.new_zeros(self.positions + 1, len(self.layers), batch, width)
        return self.shifted

    def shifts(self, x: Tensor, index: Tensor, at: Positions, shifted: list[Tensor]) -> list[Shift]:
        """The token shift of each sublayer for tokens x (batch, n, dim) at the positions `index` (n,).

        For a single token, the cache is read once for all sublayers. They append their new channels to `shifted`, which
        `write_shifted` then writes. For several tokens, each sublayer reads and writes the cache itself.
        """
        cache = self.shift_cache(x, len(x), x.shape[-1] // 2)
        if len(index) > 1:
            return [partial(shift_tokens, cache=rows, index=index, at=at) for rows in cache.unbind(1)]
        neighbours = gather_neighbours(cache, at)[0].unsqueeze(2)  # (sublayers, batch, 1, dim / 2)
        return [partial(shift_token, neighbours=half, shifted=shifted) for half in neighbours.unbind()]

    def write_shifted(self, shifted: list[Tensor], index: Tensor) -> None:
        """Write the channels of a single token, one tensor (batch, 1, dim / 2) for each sublayer."""
        if shifted and self.shifted is not None:
            self.shifted.index_copy_(0, index, torch.stack(shifted).permute(2, 0, 1, 3))

    def copy_text(self, source: TransformerState, prompts: int, rows: int, shared: bool) -> None:
        """Copy the texts of `source`, which has one row per prompt, to a cache with `rows` rows per prompt.

        shared: as in `LayerCache.copy_text`.
        """
        for layer, found in zip(self.layers, source.layers, strict=True):
            if found.states is not None:  # a feed-forward has none
                layer.copy_text(found, prompts, rows, shared)
        if source.shifted is not None:  # not copied, as no image token has a neighbour in the text
            self.shift_cache(source.shifted, prompts * rows, source.shifted.shape[-1]).zero_()


@dataclass(eq=False)
class DalleCache(Cache):
    """The state of all sublayers."""

    state: TransformerState
    shared: bool  # whether all rows of a prompt share the keys and values of its text
    text: TransformerState | None = None  # state after the texts, one row per prompt


class DalleTransformer(ImageTokenTransformer[DalleCache]):
    """The DALL·E transformer of DALLE-pytorch.

    `forward` returns the logits of the original program. `prefill` and `step` draw tokens one by one. Raises ValueError
    for shared weights between layers of different attention types.

    >>> config = TransformerConfig(100, 16, 8, dim=32, depth=2, heads=2, dim_head=16, grid_size=4)
    >>> transformer = DalleTransformer(config)
    >>> transformer.image_token_logits(torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)).shape
    torch.Size([1, 4, 16])
    """

    config: TransformerConfig

    rotary_table: Tensor  # float (text_length + image_seq_len, dim_head / 2, 2): cosine and sine by position and pair
    neighbours: Tensor  # int64 (2, text_length + image_seq_len): positions above and to the left, seq_len for none

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
            self.register_buffer("rotary_table", rotary_table(rotary_angles(c), c), persistent=False)
        if "sparse" in c.attn_types:
            self.register_buffer("sparse_pattern", sparse_pattern(sparse_layout(c.seq_len, c.heads), c.seq_len))
        for kind in {"full", *c.attn_types} - {"mlp", "sparse"}:
            pattern = attention_pattern(kind, c.text_length, c.grid_size)
            self.register_buffer(f"{kind}_pattern", pattern, persistent=False)
        place = torch.arange(c.text_length + c.image_seq_len, device="cpu")  # on the CPU even under the meta device
        in_image, in_row = place >= c.text_length, (place - c.text_length) % c.grid_size
        above = torch.where(in_image, place - c.grid_size, place - 1)
        left = torch.where(in_image & (in_row == 0), -1, place - 1)
        has_above = (above >= 0) & ~(in_image & (above < c.text_length))
        # Missing neighbours have the index seq_len, whose row of the cache is always 0.
        above, left = torch.where(has_above, above, c.seq_len), torch.where(left >= 0, left, c.seq_len)
        self.register_buffer("neighbours", torch.stack((above, left)), persistent=False)

    def take_rotary_table(self, state: dict[str, Any], prefix: str = "") -> None:
        """Adapt the model and the state dict of a checkpoint to each other before it is loaded.

        If the checkpoint's rotary table is the one computed from the configuration, it is removed from `state`. A
        different one, such as a table rounded to float16, is kept: the model then saves it too.
        """
        cos, sin = state.get(f"{prefix}rotary_cos"), state.get(f"{prefix}rotary_sin")  # names in older files
        if cos is not None and sin is not None and cos.shape == sin.shape:
            state[f"{prefix}rotary_table"] = torch.stack((cos, sin), dim=-1)
            del state[f"{prefix}rotary_cos"], state[f"{prefix}rotary_sin"]
        found = state.get(f"{prefix}rotary_table")
        if found is None or not self.config.rotary_emb:
            return
        own = rotary_table(rotary_angles(self.config), self.config)
        same = found.shape == own.shape and torch.equal(found.to(own), own)
        self.register_buffer("rotary_table", self.rotary_table, persistent=not same)
        if same:
            del state[f"{prefix}rotary_table"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.take_rotary_table(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, text_ids: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Logits of the next token at each input position, (batch, positions, text + image vocabulary).

        text_ids: int64 (batch, text_seq_len), padded with 0. image_ids: int64 (batch, n), n ≤ grid_size², or None.
        The positions are <bos>, the text tokens and the image tokens except the last one of a full grid. Ids that
        cannot follow a position have the lowest value of the dtype.
        """
        text, image = self.logits(text_ids, image_ids)
        lowest = torch.finfo(text.dtype).min
        text = F.pad(text, (0, self.config.num_image_tokens), value=lowest)
        return torch.cat((text, F.pad(image, (self.config.text_vocabulary, 0), value=lowest)), dim=1)

    def loss(self, text_ids: Tensor, image_ids: Tensor, seen_ids: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the next token in nats; text and image are weighted 1 : loss_img_weight.

        text_ids: int64 (batch, text_seq_len). image_ids: int64 (batch, grid_size²), the targets. seen_ids: image tokens
        that are the input instead of `image_ids`.
        """
        text, image = self.logits(text_ids, image_ids if seen_ids is None else seen_ids)
        text_loss = F.cross_entropy(text.transpose(1, 2), self.pad_text(text_ids))
        image_loss = F.cross_entropy(image.transpose(1, 2), image_ids)
        weight = self.config.loss_img_weight
        return (text_loss + weight * image_loss) / (weight + 1)

    def logits(self, text_ids: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Text logits of the positions before a text token, and image logits of the positions before an image token."""
        c = self.config
        x = self.embed_text(text_ids)
        if image_ids is not None:
            places = torch.arange(image_ids.shape[1], device=x.device)
            x = torch.cat((x, self.embed_image(image_ids, places)), dim=1)[:, : c.seq_len]
        if c.stable:
            x = x * 0.1 + x.detach() * 0.9  # the same value, a tenth of the gradient (CogView, arXiv 2105.13290)
        x = self.run(x, torch.arange(x.shape[1], device=x.device), x.shape[1])
        return self.text_logits(x[:, : c.text_seq_len]), self.image_logits(x[:, c.text_seq_len :])

    def image_logits(self, x: Tensor) -> Tensor:
        """Map hidden states (batch, n, dim) to image logits (batch, n, num_image_tokens)."""
        if self.image_head is not None:
            logits: Tensor = self.image_head(x)
            return logits
        return F.linear(x, *self.head)

    def text_logits(self, x: Tensor) -> Tensor:
        """Map hidden states (batch, n, dim) to text logits (batch, n, text_vocabulary)."""
        end = self.config.text_vocabulary
        return F.linear(x, self.to_logits.weight[:end], self.to_logits.bias[:end])

    def pad_text(self, text_ids: Tensor) -> Tensor:
        """Replace each padding 0 at position i by the id `num_text_tokens + i`."""
        padding = torch.arange(self.config.text_seq_len, device=text_ids.device) + self.config.num_text_tokens
        return torch.where(text_ids == 0, padding, text_ids)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Embed text ids, int64 (batch, text_seq_len), padded with 0, after <bos>: (batch, text_seq_len + 1, dim).

        Raises ValueError for another length.
        """
        if text_ids.shape[-1] != self.config.text_seq_len:
            raise ValueError(f"text has {text_ids.shape[-1]} tokens; this transformer takes {self.config.text_seq_len}")
        return self.embed_words(F.pad(self.pad_text(text_ids), (1, 0)), slice(None))

    def embed_words(self, ids: Tensor, part: slice) -> Tensor:
        """Embed the positions `part` of ids (batch, n), which begin with <bos> = 0, without replacing padding."""
        c = self.config
        table = self.to_logits.weight[: c.text_vocabulary] if c.share_input_output_emb else self.text_emb.weight
        x = F.embedding(ids[:, part], table).to(self.norm_out.weight.dtype)
        return x if c.rotary_emb else x + self.text_pos_emb.weight[part]

    def embed_image(self, image_ids: Tensor, places: Tensor) -> Tensor:
        """Embed image ids (batch, n) at grid indices `places` (n,), counted from 0: (batch, n, dim)."""
        c = self.config
        table = self.to_logits.weight[c.text_vocabulary :] if c.share_input_output_emb else self.image_emb.weight
        x = F.embedding(image_ids, table).to(self.norm_out.weight.dtype)
        if c.rotary_emb:
            return x
        return x + self.row_pos_emb(places // c.grid_size) + self.column_pos_emb(places % c.grid_size)

    def image_token_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        return self.logits(text_ids, image_ids)[1]

    def new_cache(self, prompts: int, rows: int) -> DalleCache:
        c, weight = self.config, self.norm_out.weight  # has the dtype of the arithmetic
        shared = rows >= SHARING_ROWS and prefers_matmul(weight) and "mlp" not in c.attn_types
        length = c.image_seq_len if shared else c.seq_len
        cache = DalleCache(prompts, rows, TransformerState(2 * c.depth, c.seq_len, length), shared)
        cache.first_logits = weight.new_empty(prompts, c.num_image_tokens)
        return cache

    def fill_cache(self, text_ids: Tensor, cache: DalleCache) -> None:
        c = self.config
        cache.text = TransformerState(2 * c.depth, c.seq_len, c.text_length)
        index = torch.arange(c.text_length, device=text_ids.device)
        x = self.run(self.embed_text(text_ids), index, c.text_length, cache.text)
        cache.first_logits.copy_(self.image_logits(x[:, -1]))
        cache.state.copy_text(cache.text, cache.prompts, cache.rows, cache.shared)

    def copy_text(self, text_ids: Tensor, like: DalleCache, cache: DalleCache) -> None:
        assert like.text is not None
        cache.first_logits.copy_(like.first_logits)
        cache.text = like.text
        cache.state.copy_text(like.text, cache.prompts, cache.rows, cache.shared)

    def step(self, previous: Tensor, place: Tensor, cache: DalleCache, end: int | None = None) -> Tensor:
        x, text_length = self.embed_image(previous, place), self.config.text_length
        if cache.prompts > 1:
            x = x.repeat(cache.prompts, 1, 1)
        end = None if end is None else end + text_length
        return self.image_logits(self.run(x, place + text_length, end, cache.state, place if cache.shared else None))

    @property
    def cache_numbers(self) -> int:
        c = self.config
        per_layer = 2 * c.heads * c.dim_head + c.dim  # keys, values, and the shifted channels of both sublayers
        return c.depth * per_layer * (c.seq_len + 1) + c.num_image_tokens

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        start = self.config.text_vocabulary
        return self.to_logits.weight[start:], self.to_logits.bias[start:]

    @property
    def decoder(self) -> nn.Module:
        return self.layers

    @property
    def top_k_vocabulary(self) -> int:
        """Size of the text and image vocabularies together, as in DALLE-pytorch."""
        return self.config.text_vocabulary + self.config.num_image_tokens

    def new_state(self) -> TransformerState:
        """An empty cache for `run`. The first call of `run` determines its batch size."""
        return TransformerState(2 * self.config.depth, self.config.seq_len, self.config.seq_len)

    def run(
        self,
        x: Tensor,
        index: Tensor,
        end: int | None,
        state: TransformerState | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Run all layers on embeddings x (batch, n, dim) at positions `index` (n,): hidden states (batch, n, dim).

        Without a cache, x must hold all positions before `end`. With a cache, `state`, x holds the last positions
        before `end`, and the cache entries of x are written. If `end` is None, all positions of the cache are read
        under a mask, so that the shapes are the same for every token. image_index: int64 (n,), grid indices of image
        tokens; must be given if the layer caches hold image positions only.
        """
        c, at = self.config, self.positions(index, end, image_index)
        sublayers = [sublayer for pair in self.layers for sublayer in pair.children()]
        layers: list[LayerCache | None] = [None] * len(sublayers) if state is None else [*state.layers]
        shifted: list[Tensor] = []
        shifts: list[Shift | None] = [partial(shift_sequence, at=at) if c.shift_tokens else None] * len(sublayers)
        if state is not None and c.shift_tokens:
            shifts = [*state.shifts(x, index, at, shifted)]
        if c.reversible:
            first = second = x
            for i, (sublayer, shift, cache) in enumerate(zip(sublayers, shifts, layers, strict=True)):
                if i % 2 == 0:
                    first = sublayer(second, first, at, shift, cache)
                else:
                    second = sublayer(first, second, at, shift, cache)
            x = (first + second) / 2
        else:
            for sublayer, shift, cache in zip(sublayers, shifts, layers, strict=True):
                x = sublayer(x, x, at, shift, cache)
        if state is not None:
            state.write_shifted(shifted, index)
        if c.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        return self.norm_out(x)

    def positions(self, index: Tensor, end: int | None, image_index: Tensor | None) -> Positions:
        """The positions of a forward pass, as the layers need them. Arguments as in `run`."""
        c, visible = self.config, self.config.seq_len if end is None else end
        masks: dict[str, Tensor | None] = {"full": None}
        for kind in {"full", *c.attn_types} - {"mlp"}:
            if kind != "full" or end is None or len(index) > 1:  # a single last position attends to all keys
                masks[kind] = self.get_buffer(f"{kind}_pattern")[..., index, :visible]
        rotation = None
        if c.rotary_emb:
            rotation = self.rotary_table.index_select(0, index).unsqueeze(1)
            rotation = rotation if rotation.dtype == torch.float64 else rotation.float()
        neighbours = self.neighbours.index_select(1, index)
        if image_index is not None:
            index, visible = image_index, visible - c.text_length
        return Positions(index, visible, masks, rotation, neighbours, c.text_length, c.grid_size)


def layer_functions(config: TransformerConfig) -> list[tuple[nn.Module, nn.Module]]:
    """The attention (or gMLP) and the feed-forward of each layer. Layers that share weights have the same modules."""
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
            raise ValueError(
                f"shared_attn_ids: layer {i} is '{kind}', but shares the weights of a '{attentions[attn_id][0]}' layer"
            )
        if ff_id not in feed_forwards:
            feed_forwards[ff_id] = FeedForward(c.dim)
        functions.append((attentions[attn_id][1], feed_forwards[ff_id]))
    return functions

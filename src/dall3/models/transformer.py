"""The DALL·E transformer (arXiv 2102.12092) as DALLE-pytorch built it, releases 1.0 to 1.6 and upstream's fork.

Sequence: <bos>, `text_seq_len` text tokens, `grid_size`² image tokens. Logits: the text vocabulary (words, then one
padding id a position), then the image vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

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
    update_cache,
)
from dall3.models.interface import Cache, ImageTokenTransformer

ATTENTION_TYPES = ("full", "axial_row", "axial_col", "conv_like", "conv_like_causal", "sparse", "mlp")
FEED_FORWARD_MULT = 4
# Rows of a prompt from which a CPU reads the keys and values of its text once for all of them, in products of matrices.
SHARING_ROWS = 8


@dataclass(frozen=True)
class TransformerConfig:
    """What a DalleTransformer is, by DALLE-pytorch's names for its hyper-parameters."""

    num_text_tokens: int  # words of the tokenizer; the text vocabulary is `text_seq_len` wider
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
        """Positions before the image: <bos> and the text."""
        return self.text_seq_len + 1

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2

    @property
    def seq_len(self) -> int:
        """Positions that are ever fed: the last image token predicts nothing."""
        return self.text_seq_len + self.image_seq_len

    @property
    def text_vocabulary(self) -> int:
        return self.num_text_tokens + self.text_seq_len


def rotary_table(config: TransformerConfig) -> Tensor:
    """Angles (text_length + image_seq_len, channels): a third for the place in the text, two for row and column.

    The image stands at 8192 on the text's axis, the text at -10 on the image's, whose rows and columns run from
    -1 to 1 (DALLE-pytorch, transformer.py).
    """
    from rotary_embedding_torch import RotaryEmbedding

    part, image_length = config.dim_head // 3, config.image_seq_len
    with torch.device("cpu"):  # real on a meta model too
        sequence, pixel = RotaryEmbedding(dim=part), RotaryEmbedding(dim=part, freqs_for="pixel")
        place = torch.cat((torch.arange(config.text_length).float(), torch.full((image_length,), 8192.0)))
        axis = torch.linspace(-1, 1, steps=config.grid_size)
        outside = torch.full((config.text_length,), -10.0)
        row = torch.cat((outside, axis.repeat_interleave(config.grid_size)))
        column = torch.cat((outside, axis.repeat(config.grid_size)))
        return torch.cat((sequence(place), pixel(row), pixel(column)), dim=-1).detach()


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
    """gMLP (arXiv 2105.08050): positions mix through a learned causal matrix instead of attention."""

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
        gate = update_cache(cache, "gate", self.norm(gate), at)
        weight, mask = self.weight[at.index, : at.visible], at.masks["full"]
        weight = weight if mask is None else weight * mask
        return self.proj_out(x * (weight @ gate + self.bias[at.index, None]))


class Sublayer(nn.Module):
    """Norm, token shift, function: what is added to the stream, times `scale` (CaiT's LayerScale, arXiv 2103.17239)."""

    def __init__(self, config: TransformerConfig, function: nn.Module, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.function = function
        self.norm_out = nn.LayerNorm(config.dim) if config.sandwich_norm else nn.Identity()
        init = 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6
        self.scale = nn.Parameter(torch.full((config.dim,), init))
        self.shift_tokens = config.shift_tokens

    def forward(self, x: Tensor, at: Positions, shift: Shift, cache: LayerCache | None = None) -> Tensor:
        x = self.norm(x)
        if self.shift_tokens:
            x = shift(x)
        out: Tensor = self.norm_out(self.function(x, at, cache))
        return out


def shift_tokens(x: Tensor, at: Positions) -> Tensor:
    """Two quarters of the channels come from neighbours: above and left in the image, left (both) in the text.

    x (batch, n, dim) holds all positions, so slices do: a look-up's gradient is slow.
    """
    quarter, text = x.shape[-1] // 4, at.text_length
    first, second, rest = x.split((quarter, quarter, 2 * quarter), dim=-1)
    first = torch.cat((moved(first[:, :text], 1), moved(first[:, text:], at.grid_size)), dim=1)
    second = torch.cat((moved(second[:, :text], 1), moved(second[:, text:], 1) * at.has_left[text:]), dim=1)
    return torch.cat((first, second, rest), dim=-1)


Shift = Callable[[Tensor], Tensor]


def moved(x: Tensor, steps: int) -> Tensor:
    """x (batch, n, width) with every row `steps` places later, zeros before them."""
    return F.pad(x, (0, 0, steps, 0))[:, : x.shape[1]]


class TransformerState:
    """What the sublayers remember of earlier positions, and the text of their prompts, if it is shared.

    shifted: (positions + 1, sublayers, batch, dim / 2), the half of the channels that the token shift moves. Its last
    row is never written: it is a sentinel, always zero. All sublayers share one tensor, read and written once a step.
    """

    def __init__(self, sublayers: int, positions: int, length: int) -> None:
        """length: rows of the layers' caches, with the text if it is not shared."""
        self.layers, self.length = [LayerCache(length) for _ in range(sublayers)], positions
        self.shifted: Tensor | None = None

    def room(self, like: Tensor, batch: int, width: int) -> Tensor:
        """`shifted`, made at its first use."""
        if self.shifted is None:
            with torch.inference_mode(False):  # so that it can be written in every mode
                self.shifted = like.new_zeros(self.length, len(self.layers), batch, width)
        return self.shifted

    def shifts(self, x: Tensor, index: Tensor, at: Positions, moved: list[Tensor]) -> list[Shift]:
        """The token shift of each sublayer for x (batch, n, dim) at the places `index` (n,).

        With one place its neighbours are known beforehand, and what moves, (batch, 1, dim / 2), is added to `moved`.
        With more, they may be among x: what moves is written at once.
        """
        quarter, shifted = x.shape[-1] // 4, self.room(x, len(x), x.shape[-1] // 2)
        if len(index) > 1:
            return [partial(shift_several_tokens, rows, index, at) for rows in shifted.unbind(1)]
        near = shifted.index_select(0, at.neighbours)[:, :, :, None]
        above, left = near[0, ..., :quarter].unbind(0), near[1, ..., quarter:].unbind(0)
        return [partial(shift_one_token, *pair, moved) for pair in zip(above, left, strict=True)]

    def start(self, other: TransformerState, times: int, shared: bool) -> None:
        """Begin with the text of `other`, each of whose sequences stands `times` times in a row here."""
        for layer, found in zip(self.layers, other.layers, strict=True):
            layer.start(found, times, shared)
        if other.shifted is not None:  # no image token has its neighbours in the text
            _, _, prompts, width = other.shifted.shape
            self.room(other.shifted, prompts * times, width).zero_()


def shift_one_token(above: Tensor, left: Tensor, moved: list[Tensor], x: Tensor) -> Tensor:
    """The token shift of one place, x (batch, 1, dim), from quarters (batch, 1, dim / 4) of its neighbours."""
    moves, rest = x.chunk(2, dim=-1)
    moved.append(moves)
    return torch.cat((above, left, rest), dim=-1)


def shift_several_tokens(rows: Tensor, index: Tensor, at: Positions, x: Tensor) -> Tensor:
    """The token shift of x (batch, n, dim) at the places `index`, with the rows (positions, batch, dim / 2) before."""
    quarter = x.shape[-1] // 4
    moves, rest = x.chunk(2, dim=-1)
    near = rows.index_copy_(0, index, moves.transpose(0, 1)).index_select(0, at.neighbours)
    above, left = near.unflatten(0, (2, -1)).transpose(1, 2).unbind(0)
    return torch.cat((above[..., :quarter], left[..., quarter:], rest), dim=-1)


@dataclass(eq=False)
class DalleCache(Cache):
    memory: TransformerState
    shared: bool  # whether all rows of a prompt share the keys and values of its text
    text: TransformerState | None = None  # of the texts alone, one row for each


class DalleTransformer(ImageTokenTransformer[DalleCache]):
    """The DALL·E transformer. `forward` gives the original's logits; `prefill` and `step` draw tokens one by one.

    Raises ValueError for a configuration that contradicts itself.
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
        place = torch.arange(c.text_length + c.image_seq_len, device="cpu")  # real on a meta model too
        in_image, in_row = place >= c.text_length, (place - c.text_length) % c.grid_size
        above = torch.where(in_image, place - c.grid_size, place - 1)
        left = torch.where(in_image & (in_row == 0), -1, place - 1)
        has_above = (above >= 0) & ~(in_image & (above < c.text_length))
        # Sentinel row behind the last position: never written, always zero.
        above, left = torch.where(has_above, above, c.seq_len), torch.where(left >= 0, left, c.seq_len)
        self.register_buffer("neighbours", torch.stack((above, left)), persistent=False)

    def set_rotary_angles(self, angles: Tensor) -> None:
        """Take the table of angles (positions, channels) of a checkpoint; neighbouring channels share an angle."""
        half = angles.reshape(angles.shape[-2:])[:, ::2]
        # The last channels do not turn; upstream's table lacks the very last position, which is never fed.
        rows = self.config.text_length + self.config.image_seq_len - len(half)
        half = F.pad(half, (0, self.config.dim_head // 2 - half.shape[1], 0, rows))
        self.register_buffer("rotary_cos", half.cos())
        self.register_buffer("rotary_sin", half.sin())

    def forward(self, text_ids: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Logits (batch, positions, text + image vocabulary); what cannot follow has the dtype's lowest value.

        text_ids: int64 (batch, text_seq_len), padded with 0. image_ids: int64 (batch, up to grid_size²) or None.
        There is a position for <bos>, each text and each image token, except the very last one, which nothing follows.
        """
        text, image = self.logits(text_ids, image_ids)
        lowest = torch.finfo(text.dtype).min
        text = F.pad(text, (0, self.config.num_image_tokens), value=lowest)
        return torch.cat((text, F.pad(image, (self.config.text_vocabulary, 0), value=lowest)), dim=1)

    def loss(self, text_ids: Tensor, image_ids: Tensor, seen_ids: Tensor | None = None) -> Tensor:
        """The next token's mean cross-entropy in nats, text and image weighted 1 : loss_img_weight. Shapes as above.

        seen_ids: shown to the transformer in place of image_ids, of which it is to find the next one all the same.
        """
        text, image = self.logits(text_ids, image_ids if seen_ids is None else seen_ids)
        text_loss = F.cross_entropy(text.transpose(1, 2), self.pad_text(text_ids))
        image_loss = F.cross_entropy(image.transpose(1, 2), image_ids)
        weight = self.config.loss_img_weight
        return (text_loss + weight * image_loss) / (weight + 1)

    def logits(self, text_ids: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Text logits of the positions that a text token follows, image logits of the others."""
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
        """Hidden states (batch, n, dim) from `run` to logits (batch, n, num_image_tokens): half of the head only."""
        if self.image_head is not None:
            logits: Tensor = self.image_head(x)
            return logits
        return F.linear(x, *self.head)

    def text_logits(self, x: Tensor) -> Tensor:
        """Hidden states (batch, n, dim) from `run` to logits (batch, n, text vocabulary)."""
        end = self.config.text_vocabulary
        return F.linear(x, self.to_logits.weight[:end], self.to_logits.bias[:end])

    def pad_text(self, text_ids: Tensor) -> Tensor:
        """Every 0 becomes the padding id of its own position."""
        padding = torch.arange(self.config.text_seq_len, device=text_ids.device) + self.config.num_text_tokens
        return torch.where(text_ids == 0, padding, text_ids)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Text ids (batch, text_seq_len), 0 for padding, to embeddings (batch, text_seq_len + 1, dim); <bos> first."""
        if text_ids.shape[-1] != self.config.text_seq_len:
            raise ValueError(f"text has {text_ids.shape[-1]} tokens; this transformer takes {self.config.text_seq_len}")
        return self.embed_words(F.pad(self.pad_text(text_ids), (1, 0)), slice(None))

    def embed_words(self, ids: Tensor, part: slice) -> Tensor:
        """A part of the text's ids (batch, n), <bos> = 0 first, as they are, to embeddings (batch, part, dim)."""
        c = self.config
        table = self.to_logits.weight[: c.text_vocabulary] if c.share_input_output_emb else self.text_emb.weight
        x = F.embedding(ids[:, part], table)
        return x if c.rotary_emb else x + self.text_pos_emb.weight[part]

    def embed_image(self, image_ids: Tensor, places: Tensor) -> Tensor:
        """Image ids (batch, n) at `places` (n,) of the image's grid, 0 first, to embeddings (batch, n, dim)."""
        c = self.config
        table = self.to_logits.weight[c.text_vocabulary :] if c.share_input_output_emb else self.image_emb.weight
        x = F.embedding(image_ids, table)
        if c.rotary_emb:
            return x
        return x + self.row_pos_emb(places // c.grid_size) + self.column_pos_emb(places % c.grid_size)

    def image_token_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        return self.logits(text_ids, image_ids)[1]

    def new_cache(self, prompts: int, rows: int) -> DalleCache:
        c, weight = self.config, self.to_logits.weight
        shared = rows >= SHARING_ROWS and prefers_matmul(weight) and "mlp" not in c.attn_types
        length = c.image_seq_len if shared else c.seq_len
        cache = DalleCache(prompts, rows, TransformerState(2 * c.depth, c.seq_len + 1, length), shared)
        cache.first_logits = weight.new_empty(prompts, c.num_image_tokens)
        return cache

    def fill_cache(self, text_ids: Tensor, cache: DalleCache) -> None:
        c = self.config
        text = TransformerState(2 * c.depth, c.seq_len + 1, c.text_length)
        x = self.run(
            self.embed_text(text_ids), torch.arange(c.text_length, device=text_ids.device), c.text_length, text
        )
        cache.first_logits.copy_(self.image_logits(x[:, -1]))
        cache.text = text
        cache.memory.start(text, cache.rows, cache.shared)

    def copy_text(self, text_ids: Tensor, like: DalleCache, cache: DalleCache) -> None:
        assert like.text is not None
        cache.first_logits.copy_(like.first_logits)
        cache.text = like.text
        cache.memory.start(like.text, cache.rows, cache.shared)

    def step(self, previous: Tensor, place: Tensor, cache: DalleCache, end: int | None = None) -> Tensor:
        before = self.config.text_length
        x = self.embed_image(previous, place).repeat(cache.prompts, 1, 1)
        x = self.run(
            x, place + before, None if end is None else before + end, cache.memory, place if cache.shared else None
        )
        return self.image_logits(x)

    @property
    def cache_numbers(self) -> int:
        c = self.config
        kept = 2 * c.heads * c.dim_head + c.dim  # keys, values, and what the token shift of both sublayers remembers
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
        """Text and image ids together, as DALLE-pytorch counts them."""
        return self.config.text_vocabulary + self.config.num_image_tokens

    def make_caches(self) -> TransformerState:
        """Empty caches for `run`; their batch is that of the first tokens fed."""
        return TransformerState(2 * self.config.depth, self.config.seq_len + 1, self.config.seq_len)

    def run(
        self,
        x: Tensor,
        index: Tensor,
        end: int | None,
        caches: TransformerState | None = None,
        kept_at: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (batch, n, dim) of the positions `index` (n,) to hidden states (batch, n, dim).

        end: the last position + 1. Without caches x holds all positions before it; with them, the last ones, which the
        caches do not know yet, or know otherwise. None, with caches, reads the keys of all positions under a mask: the
        shapes are then the same for every token. kept_at: int64 (n,), the places in the image's grid, where the caches
        hold the text apart.
        """
        c, at = self.config, self._positions(index, end, kept_at)
        moved: list[Tensor] = []
        sublayers = [sublayer for pair in self.layers for sublayer in pair.children()]
        shifts: list[Shift] = [partial(shift_tokens, at=at)] * len(sublayers)
        if caches is not None and c.shift_tokens:
            shifts = caches.shifts(x, index, at, moved)
        streams = [x, x] if c.reversible else [x]
        for i, (sublayer, shift) in enumerate(zip(sublayers, shifts, strict=True)):
            target, source = (i % 2, 1 - i % 2) if c.reversible else (0, 0)
            out = sublayer(streams[source], at, shift, caches.layers[i] if caches else None)
            streams[target] = torch.addcmul(streams[target], out, cast(Tensor, sublayer.scale))
        if moved and caches is not None and caches.shifted is not None:
            caches.shifted.index_copy_(0, index, torch.stack(moved)[None, :, :, 0])
        x = (streams[0] + streams[1]) / 2 if c.reversible else streams[0]
        if c.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        return self.norm_out(x)

    def _positions(self, index: Tensor, end: int | None, kept_at: Tensor | None) -> Positions:
        c, visible = self.config, self.config.seq_len if end is None else end
        masks: dict[str, Tensor | None] = {"full": None}
        for kind in {"full", *c.attn_types} - {"mlp"}:
            if kind != "full" or end is None or len(index) > 1:  # the last position sees all before it
                masks[kind] = self.get_buffer(f"{kind}_pattern")[..., index, :visible]
        cos = sin = None
        if c.rotary_emb:
            cos = self.rotary_cos[index].repeat_interleave(2, dim=-1)
            sin = torch.stack((-self.rotary_sin[index], self.rotary_sin[index]), dim=-1).flatten(-2)
        neighbours = self.neighbours[:, index]
        has_left = neighbours[1, :, None] < c.seq_len
        if kept_at is not None:
            index, visible = kept_at, visible - c.text_length
        return Positions(index, visible, masks, cos, sin, neighbours.flatten(), has_left, c.text_length, c.grid_size)


def layer_functions(config: TransformerConfig) -> list[tuple[nn.Module, nn.Module]]:
    """Attention (or gMLP) and feed-forward of each layer; layers that share weights get the same modules."""
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

"""What every transformer that draws image tokens offers to the decoding loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

KEPT_CACHES = 2  # idle caches that a transformer keeps: those of a full batch and of a last, smaller one
KEPT_BYTES = 2**30  # of each; a larger one is freed after its use


class TokenConfig(Protocol):
    """The settings of a transformer that the decoding loop reads. Dataclasses and properties both fit."""

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that may be drawn: ids 0 … num_image_tokens - 1."""

    @property
    def grid_size(self) -> int:
        """Image tokens a side."""

    @property
    def image_seq_len(self) -> int:
        """Image tokens of a picture: grid_size²."""

    @property
    def text_seq_len(self) -> int:
        """Ids of an encoded text, padding included."""


@dataclass(eq=False)
class Cache:
    """What a transformer remembers of a text and of the image tokens drawn for it. Each family adds its own tensors.

    Its sequences are `prompts` times `rows`, prompt by prompt: sequence p · rows + r is row r of prompt p. Prompts are
    the text and, with classifier-free guidance, the negative or empty text. Rows are candidates, drawn side by side.
    The tensors keep their addresses and shapes as long as the cache lives.
    """

    prompts: int
    rows: int
    # float (prompts, num_image_tokens), written by `prefill`: logits of image token 0, alike for all rows of a prompt
    first_logits: Tensor = field(init=False)


C = TypeVar("C", bound=Cache)


class ImageTokenTransformer(nn.Module, ABC, Generic[C]):
    """A transformer that draws image tokens for a text, one after the other in the order of the grid's rows.

    `prefill` runs the text (a decoder's prefix, or an encoder) and everything else that comes before the first image
    token, such as a start token. It leaves the logits of image token 0 in `cache.first_logits`. Then `step` takes
    image token i and returns the logits of image token i + 1. The last token of the grid is never fed.

        cache = transformer.prefill(text_ids, rows)
        logits = cache.first_logits.repeat_interleave(rows, dim=0)
        for place in range(grid_size² - 1):
            tokens = choose(logits)
            logits = transformer.step(tokens[:, None], torch.tensor([place]), cache)[:, 0]
        transformer.release(cache)
    """

    config: Any  # a TokenConfig
    image_head: nn.Module | None  # replaces the head of a copy made by `packed.prepare`
    compiled_step: Any  # `step` as torch.compile returned it, after `compile`

    def __init__(self) -> None:
        super().__init__()
        self.image_head = None
        self.compiled_step = None
        self._idle_caches: dict[tuple[int, int], C] = {}  # by prompts and rows

    @abstractmethod
    def image_token_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """Logits of image tokens 1 … n + 1 by one run over all of them (teacher forcing).

        text_ids: int64 (batch, text_seq_len). image_ids: int64 (batch, n), the first n ≤ grid_size² image tokens.
        Returns float (batch, min(n + 1, grid_size²), num_image_tokens): place i holds the logits of image token i,
        given the image tokens before it.
        """

    @abstractmethod
    def new_cache(self, prompts: int, rows: int) -> C:
        """A cache on the device and in the precision of the weights. `fill_cache` writes it before it is read."""

    @abstractmethod
    def fill_cache(self, text_ids: Tensor, cache: C) -> None:
        """Run the texts, int64 (prompts, text_seq_len), each once, and write all of `cache`, `first_logits` included.

        What an earlier use of the cache left in it must not be seen: numbers that are not written before they are read
        are set to 0.
        """

    @abstractmethod
    def step(self, previous: Tensor, place: Tensor, cache: C, end: int | None = None) -> Tensor:
        """Logits of the image tokens that follow `previous`: float (prompts · rows, n, num_image_tokens).

        previous: int64 (rows, n), image tokens, n = 1 but in speculative decoding; each prompt gets the same. place:
        int64 (n,), consecutive places of `previous` in the grid, counted from 0. What the cache held of these places
        is replaced. end: `place[-1] + 1` where the caller knows it: only keys up to there are read. None reads the
        keys of all places under a mask, so that the shapes are the same at every step and a graph can be recorded.
        No value is read back from the device.
        """

    @property
    @abstractmethod
    def cache_numbers(self) -> int:
        """Numbers that a cache holds for one sequence."""

    @property
    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (num_image_tokens, width) and bias of the linear layer that makes image logits.

        `step` and `fill_cache` run `image_head` in its place where that is set.
        """

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The module whose linear layers a step runs, the head aside. `packed.prepare` replaces them in a copy."""

    @property
    def top_k_vocabulary(self) -> int:
        """Size of the vocabulary of which `top_k` is a share."""
        return int(self.config.num_image_tokens)

    def empty_text(self) -> Tensor:
        """Ids of the empty text, int64 (text_seq_len,), on the transformer's device: what guidance leads away from."""
        return torch.zeros(self.config.text_seq_len, dtype=torch.int64, device=self.head[0].device)

    @torch.no_grad()
    def prefill(self, text_ids: Tensor, rows: int) -> C:
        """Run the texts, int64 (prompts, text_seq_len), once, and return a cache for `rows` rows of each.

        The cache is the caller's alone until `release`, which keeps it for a later call of the same shape.
        """
        cache = self._idle_caches.pop((len(text_ids), rows), None)
        if cache is None:
            with torch.inference_mode(False):  # so that it can be written in every mode
                cache = self.new_cache(len(text_ids), rows)
        self.fill_cache(text_ids, cache)
        return cache

    def release(self, cache: C) -> None:
        """Keep a cache for the next `prefill` of its shape, unless it is large."""
        if self.cache_bytes(cache.prompts, cache.rows) <= KEPT_BYTES:
            kept = [*self._idle_caches.items()][-(KEPT_CACHES - 1) :]
            self._idle_caches = dict(kept) | {(cache.prompts, cache.rows): cache}

    def free_caches(self) -> None:
        """Free the caches that `release` kept."""
        self._idle_caches = {}

    def cache_bytes(self, prompts: int, rows: int) -> int:
        """Memory of a cache."""
        return prompts * rows * self.cache_numbers * self.head[0].element_size()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `step` with torch.compile, whose arguments it takes: one graph for all tokens."""
        self.compiled_step = torch.compile(self.step, *args, **{"fullgraph": True, "dynamic": False} | kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.free_caches()  # they are where the weights were, in the precision that these had
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has caches of its own, and its compiled step would run this module.
        return self.__dict__ | {"_idle_caches": {}, "compiled_step": None}

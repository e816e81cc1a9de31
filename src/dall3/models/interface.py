"""The interface between the decoding loop and the transformers that generate image tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

KEPT_CACHES = 2  # number of idle caches that a transformer keeps: one for full batches, one for a smaller last batch
KEPT_BYTES = 2**30  # size of the largest cache that is kept on a CPU; larger ones are freed after use
KEPT_SHARE = 16  # on CUDA, the largest cache that is kept has 1 / KEPT_SHARE of the device's memory


def kept_bytes(device: torch.device) -> int:
    """Maximum size in bytes of a cache, or of the memory of a CUDA graph, that is kept between calls on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1]) // KEPT_SHARE
    return KEPT_BYTES


# Number of batch sizes, image sizes and sampling settings that torch.compile may compile for; its default is 8.
RECOMPILE_LIMIT = 64


def step_compile_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of torch.compile for a step of a loop: one graph with static shapes, by default.

    A mode that uses CUDA graphs is replaced by the same mode without them. torch.compile does not capture a step that
    writes to its inputs, so the loops capture the compiled step themselves.
    """
    # Beyond the limit, a function with fullgraph=True raises an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    modes = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
    changed = {"mode": modes.get(options["mode"], options["mode"])} if "mode" in options else {}
    return {"fullgraph": True, "dynamic": False} | options | changed


@dataclass(eq=False)
class Cache:
    """Static key/value cache of a transformer for a text and its image tokens. Subclasses add the tensors of a family.

    A cache holds `prompts` · `rows` sequences: sequence p · rows + r is row r of prompt p. The prompts are the text
    and, with classifier-free guidance, the negative or empty text. The rows are the candidates of one batch. The
    tensors keep their addresses and shapes for the lifetime of the cache, as CUDA graphs require.

    graphs: decode steps captured with this cache, by sampling settings. They are freed with the cache.
    """

    prompts: int
    rows: int
    graphs: dict[Any, Any] = field(init=False, default_factory=dict)
    # float (prompts, num_image_tokens), written by `prefill`: logits of image token 0, shared by all rows of a prompt
    first_logits: Tensor = field(init=False)


C = TypeVar("C", bound=Cache)


class ImageTokenTransformer(nn.Module, ABC, Generic[C]):
    """A transformer that generates image tokens for a text autoregressively, in row-major order.

    `prefill` runs everything before the first image token: the text (as a prefix or through an encoder), and a start
    token if there is one. It writes the logits of image token 0 to `cache.first_logits`. `step` then takes image token
    i and returns the logits of image token i + 1. The last token of the grid is never an input.

        cache = transformer.prefill(text_ids, rows)
        logits = cache.first_logits.repeat_interleave(rows, dim=0)
        for place in range(grid_size² - 1):
            tokens = choose(logits)
            logits = transformer.step(tokens[:, None], torch.tensor([place]), cache)[:, 0]
        transformer.release(cache)

    The configuration has at least the fields num_image_tokens (size of the image vocabulary), grid_size (side of the
    square grid of image tokens), image_seq_len (grid_size²) and text_seq_len (length of an encoded text with padding).
    """

    config: Any
    image_head: nn.Module | None  # replacement of the output head in a copy made by `packed.prepare`
    compile_options: dict[str, Any] | None  # options of torch.compile for the decode step; None before `compile`
    compiled_step: Any  # the compiled decode step, or None before its first use

    def __init__(self) -> None:
        super().__init__()
        self.image_head = None
        self.compile_options = self.compiled_step = None
        self._idle_caches: dict[tuple[int, int], C] = {}  # keys: (prompts, rows)

    @abstractmethod
    def image_token_logits(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """Logits of all image tokens in one forward pass (teacher forcing).

        text_ids: int64 (batch, text_seq_len). image_ids: int64 (batch, n), the first n ≤ grid_size² image tokens.
        Returns float (batch, min(n + 1, grid_size²), num_image_tokens): index i holds the logits of image token i,
        counted from 0, given the text and image tokens 0 … i - 1. Raises ValueError for a text of another length.
        """

    @abstractmethod
    def new_cache(self, prompts: int, rows: int) -> C:
        """Allocate a cache with the device and dtype of the weights. `fill_cache` writes it before it is read."""

    @abstractmethod
    def fill_cache(self, text_ids: Tensor, cache: C) -> None:
        """Run the texts, int64 (prompts, text_seq_len), once each, and write `cache`, `first_logits` included.

        Values from an earlier use of the cache must not affect the result. Implementations set to 0 every element that
        could be read before it is written.
        """

    @abstractmethod
    def step(self, previous: Tensor, place: Tensor, cache: C, end: int | None = None) -> Tensor:
        """Logits of the image tokens that follow `previous`: float (prompts · rows, n, num_image_tokens).

        previous: int64 (rows, n), image tokens, the same for every prompt; n is 1 except in speculative decoding.
        place: int64 (n,), consecutive indices of `previous` in the grid, from 0; their cache entries are overwritten.
        end: `place[-1] + 1`, so that only keys up to there are read. With None, the keys of all positions are read
        under a mask: shapes are then the same at every step, as CUDA graphs and torch.compile require. The step does
        not synchronise with the host.
        """

    @property
    @abstractmethod
    def cache_numbers(self) -> int:
        """Number of elements that a cache holds per sequence."""

    @property
    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (num_image_tokens, dim) and bias (num_image_tokens,) or None of the image output head.

        If `image_head` is set, `step` and `fill_cache` run it instead.
        """

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The module with the linear layers of a step, without the head. `packed.prepare` replaces them in a copy."""

    @property
    def top_k_vocabulary(self) -> int:
        """Size of the vocabulary that the fraction `Sampling.top_k` refers to."""
        return int(self.config.num_image_tokens)

    def empty_text(self) -> Tensor:
        """Ids of the empty text, int64 (text_seq_len,): the unconditional input of classifier-free guidance."""
        return torch.zeros(self.config.text_seq_len, dtype=torch.int64, device=self.head[0].device)

    @torch.no_grad()
    def prefill(self, text_ids: Tensor, rows: int, like: C | None = None) -> C:
        """Run the texts, int64 (prompts, text_seq_len), once and return a cache with `rows` rows for each.

        like: a cache of the same texts with any number of rows. Its text entries are copied if the family supports it.
        The caller owns the returned cache until it calls `release`.
        """
        cache = self._idle_caches.pop((len(text_ids), rows), None)
        if cache is None:
            with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                cache = self.new_cache(len(text_ids), rows)
        if like is None:
            self.fill_cache(text_ids, cache)
        else:
            self.copy_text(text_ids, like, cache)
        return cache

    def copy_text(self, text_ids: Tensor, like: C, cache: C) -> None:
        """Fill a cache with the texts of the cache `like`. Families that cannot copy them run the texts again."""
        self.fill_cache(text_ids, cache)

    def release(self, cache: C) -> None:
        """Keep a cache for the next `prefill` of the same shape, or free it if it is larger than `kept_bytes`."""
        if self.cache_bytes(cache.prompts, cache.rows) <= kept_bytes(self.head[0].device):
            kept = [*self._idle_caches.items()][-(KEPT_CACHES - 1) :]
            self._idle_caches = dict(kept) | {(cache.prompts, cache.rows): cache}

    def keeps_cache(self, prompts: int, rows: int) -> bool:
        """Whether an idle cache of this shape exists, so that `prefill` allocates none."""
        return (prompts, rows) in self._idle_caches

    def free_caches(self) -> None:
        """Free the caches that `release` kept, and the CUDA graphs captured with them."""
        self._idle_caches = {}

    def cache_bytes(self, prompts: int, rows: int) -> int:
        """Size of a cache in bytes."""
        return prompts * rows * self.cache_numbers * self.head[0].element_size()

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Compile the decode step with torch.compile at its first use: the network and the sampling are one graph each.

        The same graphs are used for all tokens. The options are those of `torch.compile`; `fullgraph=True` and
        `dynamic=False` are the defaults here. On a GPU the decoding loop captures the compiled step as a CUDA graph, so
        modes that do so are not needed.
        """
        self.compile_options = step_compile_options(options)
        self.compiled_step = None
        self.free_caches()  # their graphs contain the previous step

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.free_caches()  # they have the previous device and dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not share caches, and the compiled step refers to this module.
        return self.__dict__ | {"_idle_caches": {}, "compile_options": None, "compiled_step": None}

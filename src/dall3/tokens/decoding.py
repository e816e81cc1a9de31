"""The decoding loop: autoregressive sampling of image tokens, and of text tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dall3.models.interface import Cache, ImageTokenTransformer
from dall3.models.packed import prepare
from dall3.models.transformer import DalleTransformer
from dall3.tokens.batching import batches_that_fit
from dall3.tokens.cuda_graph import CudaGraph
from dall3.tokens.sampling import Sampling

# Largest number of rows for which a step is captured as a CUDA graph; with classifier-free guidance a candidate has two
# rows. With few rows, launching kernels from Python takes most of the time: on an H100, drawing 256 tokens (dim 512,
# depth 12) for 1 and 8 candidates takes 1.42 and 1.45 s without a graph, and 0.38 and 0.49 s with one.
GRAPHED_ROWS = 256
GRAPHS_PER_CACHE = 2  # captured steps that a cache keeps, for different sampling settings


def texts_of_rows(transformer: ImageTokenTransformer[Any], text_ids: Tensor, settings: Sampling) -> Tensor:
    """Input texts of the transformer, int64 (1, text_seq_len), or (2, text_seq_len) with classifier-free guidance.

    The second row is the unconditional input: the negative text if there is one, else the empty text. text_ids: int64
    (text_seq_len,), the text; or (2, text_seq_len), the text and a negative text.
    """
    texts = text_ids.view(-1, text_ids.shape[-1])
    if settings.cond_scale == 1:
        return texts[:1]
    return texts if len(texts) == 2 else torch.cat((texts, transformer.empty_text()[None]))


@dataclass(eq=False)
class DecodeState:
    """The tensors that a decode step reads and writes besides the transformer's cache, for one batch of candidates."""

    tokens: Tensor  # int64 (rows, grid_size²), the tokens so far
    uniforms: Tensor  # float (rows, grid_size²) in [0, 1), one random number per token
    kept: Tensor  # int64 (grid_size²,), fixed tokens, -1 where tokens are sampled
    place: Tensor  # int64 (1,), index in the grid of the last token that was written


def next_logits(
    transformer: ImageTokenTransformer[Any], cache: Cache, state: DecodeState, end: int | None = None
) -> Tensor:
    """Logits of the token after the last one, (prompts · rows, num_image_tokens). Advances `state.place` to it."""
    previous = state.tokens.index_select(1, state.place)
    logits = transformer.step(previous, state.place, cache, end)[:, 0]
    state.place.add_(1)
    return logits


def sample_token(state: DecodeState, settings: Sampling, logits: Tensor, vocabulary: int) -> None:
    """Write the token at `state.place`: its fixed value, or a sample from logits (prompts · rows, num_image_tokens)."""
    uniforms = state.uniforms.index_select(1, state.place)[:, 0]
    sampled = settings.choose(settings.guide(logits.float()), uniforms, vocabulary)
    kept = state.kept.index_select(0, state.place)
    state.tokens.index_copy_(1, state.place, torch.where(kept < 0, sampled, kept)[:, None])


def decode_step(
    transformer: ImageTokenTransformer[Any],
    cache: Cache,
    state: DecodeState,
    settings: Sampling,
    end: int | None = None,
    run: Callable[..., Tensor] = next_logits,
    sample: Callable[..., None] = sample_token,
) -> None:
    """Run the transformer on the last token and sample the next one.

    Everything that changes from token to token is in the tensors of `state`, so that one CUDA graph serves all tokens.
    end: as in `ImageTokenTransformer.step`; `state.place + 1`, or None for static shapes. run, sample: `next_logits`
    and `sample_token`, or compiled versions of them.
    """
    sample(state, settings, run(transformer, cache, state, end), transformer.top_k_vocabulary)


def compiled_step(transformer: ImageTokenTransformer[Any]) -> Callable[..., None] | None:
    """`decode_step`, compiled with the options of the transformer's `compile`; None if that was not called.

    Sampling is compiled separately, so that a change of its settings does not compile the transformer again.
    """
    options = transformer.compile_options
    if options is not None and transformer.compiled_step is None:
        run, sample = torch.compile(next_logits, **options), torch.compile(sample_token, **options)
        transformer.compiled_step = partial(decode_step, run=run, sample=sample)
    step: Callable[..., None] | None = transformer.compiled_step
    return step


class CapturedStep:
    """A decode step as a CUDA graph, with the static tensors that it reads and writes. It is kept with its cache."""

    def __init__(
        self,
        step: Callable[..., None],
        transformer: ImageTokenTransformer[Any],
        cache: Cache,
        state: DecodeState,
        settings: Sampling,
    ) -> None:
        """state: the first batch; its values are copied."""
        with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
            self.state = DecodeState(*(torch.empty_like(tensor) for tensor in vars(state).values()))
        self.load(state)
        self.graph = CudaGraph(
            lambda: step(transformer, cache, self.state, settings), device=state.place.device, modules=[transformer]
        )

    def load(self, state: DecodeState) -> None:
        """Begin a batch: copy the values of `state`."""
        for static_tensor, tensor in zip(vars(self.state).values(), vars(state).values(), strict=True):
            static_tensor.copy_(tensor)


def captured_step(
    step: Callable[..., None],
    transformer: ImageTokenTransformer[Any],
    cache: Cache,
    state: DecodeState,
    settings: Sampling,
) -> CapturedStep:
    """The captured step of a cache for these settings, loaded with `state`: one kept with the cache, or a new one."""
    captured: CapturedStep | None = cache.graphs.pop(settings, None)
    if captured is None or not captured.graph.reads([transformer]):
        captured = CapturedStep(step, transformer, cache, state, settings)
    captured.load(state)  # needed for a new one too, because its warm-up runs changed the tensors
    cache.graphs = dict([*cache.graphs.items()][-(GRAPHS_PER_CACHE - 1) :]) | {settings: captured}
    return captured


@torch.inference_mode()
def image_token_steps(
    transformer: ImageTokenTransformer[Any],
    text_ids: Tensor,
    uniforms: Tensor,
    settings: Sampling,
    batch_size: int | None = None,
    kept: Tensor | None = None,
) -> Iterator[tuple[Tensor, range, int]]:
    """Sample image tokens for one text; yields after every token.

    text_ids: int64 (text_seq_len,); or (2, text_seq_len), the text and a negative text, which is used if
    `settings.cond_scale` is not 1. uniforms: float (candidates, grid_size²) in [0, 1), on the transformer's device, one
    random number per token. batch_size: candidates per batch, halved when memory runs out; None for all. kept: int64
    (grid_size²,), fixed tokens, -1 where tokens are sampled.

    Yields a tuple: the tokens, int64 (candidates, grid_size²), the same tensor each time; the range of candidates of
    the current batch; the number of tokens sampled in this batch so far.
    """
    texts = texts_of_rows(transformer, text_ids, settings)
    if settings.quantize is not None or transformer.compile_options is None:
        transformer = prepare(
            transformer, settings.quantize, len(texts) * min(batch_size or len(uniforms), len(uniforms))
        )
    compiled = compiled_step(transformer)
    length, device = transformer.config.image_seq_len, uniforms.device
    with torch.inference_mode(False):  # callers may use the result with autograd
        drawn = torch.zeros(uniforms.shape, dtype=torch.int64, device=device)
        kept = torch.full((length,), -1, device=device) if kept is None else kept

    caches: dict[int, Any] = {}  # the caches of this call, by their number of rows

    def cache_of(rows: int) -> Any:
        if rows in caches:
            transformer.copy_text(texts, caches[rows], caches[rows])
        else:
            caches[rows] = transformer.prefill(texts, rows, *[*caches.values()][:1])
        return caches[rows]

    def draw(batch: range) -> Iterator[int]:
        cache, tokens = cache_of(len(batch)), drawn[batch.start : batch.stop]
        first = torch.zeros(1, dtype=torch.int64, device=device)
        state = DecodeState(tokens, uniforms[batch.start : batch.stop], kept, first)
        logits = cache.first_logits.repeat_interleave(len(batch), dim=0)
        sample_token(state, settings, logits, transformer.top_k_vocabulary)
        yield 1
        captured: CapturedStep | None = None
        if device.type == "cuda" and len(texts) * len(batch) <= GRAPHED_ROWS:
            captured = captured_step(compiled or decode_step, transformer, cache, state, settings)
        for i in range(1, length):
            if captured is not None:
                captured.graph()
                tokens[:, i] = captured.state.tokens[:, i]
            elif compiled is not None:
                compiled(transformer, cache, state, settings)
            else:
                decode_step(transformer, cache, state, settings, i)  # reads only the keys written so far
            yield i + 1

    def draw_or_free(batch: range) -> Iterator[int]:
        try:
            yield from draw(batch)
        except torch.cuda.OutOfMemoryError:
            caches.clear()
            transformer.free_caches()
            raise

    try:
        for batch, count in batches_that_fit(len(uniforms), batch_size or len(uniforms), draw_or_free):
            yield drawn, batch, count
    finally:
        for cache in caches.values():
            transformer.release(cache)


def draw_image_tokens(
    transformer: ImageTokenTransformer[Any],
    text_ids: Tensor,
    uniforms: Tensor,
    settings: Sampling,
    batch_size: int | None = None,
) -> Tensor:
    """Run `image_token_steps` to the end and return the tokens, int64 (candidates, grid_size²)."""
    for drawn, _, _ in image_token_steps(transformer, text_ids, uniforms, settings, batch_size):  # noqa: B007
        pass
    return drawn


@torch.no_grad()
def draw_text_tokens(transformer: DalleTransformer, given: Tensor, uniforms: Tensor, settings: Sampling) -> Tensor:
    """Complete a text autoregressively; returns ids, int64 (text_seq_len,), padded with 0.

    given: int64 (text_seq_len,), the ids that the text begins with, padded with 0. uniforms: float (1, text_seq_len) in
    [0, 1). The text ends at the first padding token that is sampled.
    """
    config = transformer.config
    start = int((given != 0).sum())
    ids = F.pad(given, (1, 0))[None]  # <bos> first
    state, index = transformer.new_state(), torch.arange(config.text_length, device=given.device)
    for i in range(start, config.text_seq_len):
        new = slice(0 if i == start else i, i + 1)
        hidden = transformer.run(transformer.embed_words(ids, new), index[new], i + 1, state)
        logits = transformer.text_logits(hidden[:, -1]).float()
        ids[:, i + 1] = settings.choose(logits, uniforms[:, i], config.text_vocabulary + config.num_image_tokens)
    text = ids[0, 1:]
    ended = (text >= config.num_text_tokens).cumsum(dim=0) > 0
    return torch.where(ended, 0, text)

"""The decoding loop: autoregressive sampling of image tokens, and of text tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dall3.models.interface import ImageTokenTransformer
from dall3.models.packed import prepare
from dall3.models.transformer import DalleTransformer
from dall3.tokens.batching import batches_that_fit
from dall3.tokens.cuda_graph import CudaGraph
from dall3.tokens.sampling import Sampling

# Largest number of rows for which a step is captured as a CUDA graph; with classifier-free guidance a candidate has two
# rows. With few rows, launching kernels from Python dominates: on an H100, 256 tokens (dim 512, depth 12) of 1 and 8
# candidates take 1.42 and 1.45 s without a graph, 0.38 and 0.49 s with one.
GRAPHED_ROWS = 32


def texts_of_rows(transformer: ImageTokenTransformer[Any], text_ids: Tensor, settings: Sampling) -> Tensor:
    """Input texts of the transformer, int64 (1, text_seq_len), or (2, text_seq_len) with classifier-free guidance.

    The second row is the unconditional input: the negative text if there is one, else the empty text. text_ids: int64
    (text_seq_len,), the text; or (2, text_seq_len), the text and a negative text.
    """
    texts = text_ids.view(-1, text_ids.shape[-1])
    if settings.cond_scale == 1:
        return texts[:1]
    return texts if len(texts) == 2 else torch.cat((texts, transformer.empty_text()[None]))


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
    compiled = transformer.compiled_step if settings.quantize is None else None
    texts = texts_of_rows(transformer, text_ids, settings)
    if compiled is None:
        transformer = prepare(
            transformer, settings.quantize, len(texts) * min(batch_size or len(uniforms), len(uniforms))
        )
    run, config, device = compiled or transformer.step, transformer.config, uniforms.device
    places = torch.arange(config.image_seq_len, device=device)
    with torch.inference_mode(False):  # callers may use the result with autograd
        drawn = torch.zeros(uniforms.shape, dtype=torch.int64, device=device)
    keeps = torch.full_like(places, -1) if kept is None else kept

    with_text: list[Any] = []  # a cache that holds the texts, once there is one

    def draw(batch: range) -> Iterator[int]:
        tokens, numbers = drawn[batch.start : batch.stop], uniforms[batch.start : batch.stop]
        cache = transformer.prefill(texts, len(batch), *with_text)
        with_text[:] = [cache]
        graphed = device.type == "cuda" and compiled is None and len(texts) * len(batch) <= GRAPHED_ROWS
        end: int | None = None

        def choose(logits: Tensor, row: Tensor, keep: Tensor) -> Tensor:
            chosen = settings.choose(settings.guide(logits.float()), row, transformer.top_k_vocabulary)
            return torch.where(keep < 0, chosen, keep)

        def step(previous: Tensor, place: Tensor, row: Tensor, keep: Tensor) -> Tensor:
            return choose(run(previous, place, cache, end)[:, 0], row, keep)

        first = cache.first_logits.repeat_interleave(len(batch), dim=0)
        tokens[:, 0] = choose(first, numbers[:, 0], keeps[0])
        yield 1
        advance: Callable[..., Tensor] = step
        for i in range(1, config.image_seq_len):
            inputs = tokens[:, i - 1 : i], places[i - 1 : i], numbers[:, i], keeps[i]
            if graphed and i == 1:
                advance = CudaGraph(step, *inputs)
            # A compiled or captured step has static shapes. Otherwise only the keys written so far are read.
            end = None if compiled or graphed else i
            tokens[:, i] = advance(*inputs)
            yield i + 1
        transformer.release(cache)

    for batch, count in batches_that_fit(len(uniforms), batch_size or len(uniforms), draw):
        yield drawn, batch, count


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
    caches, index = transformer.make_caches(), torch.arange(config.text_length, device=given.device)
    for i in range(start, config.text_seq_len):
        new = slice(0 if i == start else i, i + 1)
        hidden = transformer.run(transformer.embed_words(ids, new), index[new], i + 1, caches)
        logits = transformer.text_logits(hidden[:, -1]).float()
        ids[:, i + 1] = settings.choose(logits, uniforms[:, i], config.text_vocabulary + config.num_image_tokens)
    text = ids[0, 1:]
    ended = (text >= config.num_text_tokens).cumsum(dim=0) > 0
    return torch.where(ended, 0, text)

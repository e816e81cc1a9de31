"""The decoding loop: image tokens, and text tokens, drawn one after the other."""

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

# Rows up to which a step is recorded as a CUDA graph (a candidate counts twice with cond_scale). For few rows the time
# of a step is that of launching kernels from Python: an H100 drew 256 tokens (dim 512, depth 12) of 1 and of 8
# candidates in 1.42 and 1.45 s, with recorded steps in 0.38 and 0.49 s.
GRAPHED_ROWS = 32


def texts_for(transformer: ImageTokenTransformer[Any], text_ids: Tensor, settings: Sampling) -> Tensor:
    """The prompts of a draw, int64 (1 or 2, text_seq_len): with classifier-free guidance also what it leads away from.

    text_ids: int64 (text_seq_len,), the text; or (2, text_seq_len), the text and a negative one in place of the empty.
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
    """Draw image tokens for one text, and yield after every token.

    text_ids: int64 (text_seq_len,); or (2, text_seq_len), the second a negative text, used where `cond_scale` guides.
    uniforms: (candidates, grid_size²) in [0, 1), on the transformer's device. batch_size: candidates drawn at a time,
    fewer where the device's memory does not hold them; None for all. kept: int64 (grid_size²,), tokens that stay as
    they are, -1 where they are drawn. Yields the tokens, int64 (candidates, grid_size²), the same tensor each time;
    the range of candidates being drawn; and how many tokens these have.
    """
    compiled = transformer.compiled_step if settings.quantize is None else None
    texts = texts_for(transformer, text_ids, settings)
    if compiled is None:
        transformer = prepare(
            transformer, settings.quantize, len(texts) * min(batch_size or len(uniforms), len(uniforms))
        )
    run, config, device = compiled or transformer.step, transformer.config, uniforms.device
    places = torch.arange(config.image_seq_len, device=device)
    with torch.inference_mode(False):  # the result may go where gradients are taken
        drawn = torch.zeros(uniforms.shape, dtype=torch.int64, device=device)
    keeps = torch.full_like(places, -1) if kept is None else kept

    def draw(batch: range) -> Iterator[int]:
        tokens, numbers = drawn[batch.start : batch.stop], uniforms[batch.start : batch.stop]
        cache = transformer.prefill(texts, len(batch))
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
            # Compiled or recorded, every step has the same shapes; otherwise only the keys written so far are read.
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
    """The tokens, int64 (candidates, grid_size²), after all of `image_token_steps`."""
    for drawn, _, _ in image_token_steps(transformer, text_ids, uniforms, settings, batch_size):  # noqa: B007
        pass
    return drawn


@torch.no_grad()
def draw_text_tokens(transformer: DalleTransformer, given: Tensor, uniforms: Tensor, settings: Sampling) -> Tensor:
    """Complete a text: int64 (text_seq_len,), 0 for padding, from the ids that `given` (text_seq_len,) begins with.

    uniforms: (1, text_seq_len) in [0, 1). Ends at the first padding token.
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

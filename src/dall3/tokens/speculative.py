"""Speculative Jacobi decoding of image tokens (arXiv 2410.01699): several tokens per step, from the same distribution.

Each step runs a window of draft tokens. A draft is accepted with probability min(1, p / q), as in speculative sampling
(arXiv 2211.17192): p is its probability given the tokens before it, q the probability that it was sampled with in an
earlier step. The first rejected draft is sampled again from max(p - q, 0), normalised. The drafts after it are sampled
again from p and become the drafts of the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dall3.models.interface import ImageTokenTransformer
from dall3.models.packed import prepare
from dall3.tokens.decoding import texts_of_rows
from dall3.tokens.sampling import Sampling


def sample(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one id per row, int64 (n,), from weights (n, ids), which need not sum to 1."""
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


@torch.inference_mode()
def speculative_token_steps(
    transformer: ImageTokenTransformer[Any],
    text_ids: Tensor,
    generators: list[torch.Generator],
    settings: Sampling,
    kept: Tensor | None = None,
) -> Iterator[tuple[Tensor, range, int]]:
    """Sample image tokens for one text, one candidate after the other; yields after every step.

    text_ids: int64 (text_seq_len,); or (2, text_seq_len), the text and a negative text. generators: one for each
    candidate, on the CPU. settings: `jacobi_window` tokens are run per step. kept: int64 (grid_size²,), fixed tokens,
    -1 where tokens are sampled. Yields the same tuples as `image_token_steps`.

    Tokens are sampled on the CPU, and every step synchronises with the device. This is faster for few candidates, for
    which the fixed cost of a step dominates.
    """
    config, width = transformer.config, settings.jacobi_window or 1
    transformer, length = prepare(transformer, settings.quantize), config.image_seq_len
    codes, vocabulary = config.num_image_tokens, transformer.top_k_vocabulary
    texts = texts_of_rows(transformer, text_ids, settings)
    places = torch.arange(length, device=text_ids.device)
    with torch.inference_mode(False):  # callers may use the result with autograd
        drawn = torch.zeros(len(generators), length, dtype=torch.int64, device=text_ids.device)
    fixed = torch.zeros(length, dtype=torch.bool) if kept is None else kept.cpu() >= 0

    def probabilities(logits: Tensor) -> Tensor:
        guided = settings.guide(logits.float())[0]
        return settings.filter(guided, vocabulary).softmax(dim=-1).cpu()

    with_text: list[Any] = []  # the last cache, whose texts the next one copies
    for k, generator in enumerate(generators):
        cache = transformer.prefill(texts, 1, *with_text)
        with_text = [cache]
        tokens = torch.randint(codes, (length,), generator=generator)  # the first drafts are uniform,
        q = torch.full((length, codes), 1 / codes)  # and so is q
        if kept is not None:
            tokens = torch.where(fixed, kept.cpu(), tokens)
        tokens[:1] = torch.where(fixed[:1], tokens[:1], sample(probabilities(cache.first_logits[:, None]), generator))
        start = 1
        while start < length:
            end = min(start + width, length)
            previous = tokens[None, start - 1 : end - 1].to(places.device)
            p = probabilities(transformer.step(previous, places[start - 1 : end - 1], cache, end - 1))
            drafts = tokens[start:end, None]
            ratio = (p.gather(1, drafts) / q[start:end].gather(1, drafts))[:, 0]
            accepted = (torch.rand(end - start, generator=generator) < ratio) | fixed[start:end]
            rejected = start + int(accepted.long().cumprod(dim=0).sum())  # the first rejected position
            if rejected < end:
                weights = p[rejected - start :].clone()
                residual = (weights[0] - q[rejected]).clamp_min(0)
                # Rounding can make the whole residual 0.
                weights[0] = torch.where(residual.sum() > 0, residual, weights[0])
                sampled = sample(weights, generator)
                tokens[rejected:end] = torch.where(fixed[rejected:end], tokens[rejected:end], sampled)
                q[rejected:end] = p[rejected - start :]
            start = min(rejected + 1, end)
            drawn[k, :start] = tokens[:start].to(drawn.device)
            yield drawn, range(k, k + 1), start
        transformer.release(cache)

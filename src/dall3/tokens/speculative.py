"""Speculative Jacobi decoding of image tokens (arXiv 2410.01699): several tokens a step, from the same distribution.

A window of drafts is run at once. Each draft stands with the probability min(1, p / q) of speculative sampling (arXiv
2211.17192): p is its probability after the tokens before it, q the one that it was drawn with, a step ago. The first
that falls is drawn from what p has more than q; those behind it are drawn anew, and are the next step's drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dall3.models.interface import ImageTokenTransformer
from dall3.models.packed import prepare
from dall3.tokens.decoding import texts_for
from dall3.tokens.sampling import Sampling


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One id a row, int64 (n,), of weights (n, ids) that need not sum to 1."""
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


@torch.inference_mode()
def speculative_token_steps(
    transformer: ImageTokenTransformer[Any],
    text_ids: Tensor,
    generators: list[torch.Generator],
    settings: Sampling,
    kept: Tensor | None = None,
    empty_ids: Tensor | None = None,
) -> Iterator[tuple[Tensor, range, int]]:
    """Draw image tokens for one text, a candidate a generator, as `image_token_steps` does, and tell of each step.

    text_ids: int64 (text_seq_len,). generators: on the CPU. settings: `jacobi_window` tokens are run at a time. kept:
    int64 (grid_size²,), tokens that stay as they are, -1 where they are drawn. How far a step came is read back from
    the device, and the choice is made on the CPU: this is for few candidates where a step's overhead is what costs.
    """
    config, width = transformer.config, settings.jacobi_window or 1
    transformer, length = prepare(transformer, settings.quantize), config.image_seq_len
    codes, vocabulary = config.num_image_tokens, transformer.top_k_vocabulary
    texts = texts_for(transformer, text_ids, settings)
    places = torch.arange(length, device=text_ids.device)
    with torch.inference_mode(False):  # the result may go where gradients are taken
        drawn = torch.zeros(len(generators), length, dtype=torch.int64, device=text_ids.device)
    stays = torch.zeros(length, dtype=torch.bool) if kept is None else kept.cpu() >= 0

    def probabilities(logits: Tensor) -> Tensor:
        guided = settings.guide(logits.float())[0]
        return settings.filter(guided, vocabulary).softmax(dim=-1).cpu()

    for k, generator in enumerate(generators):
        cache = transformer.prefill(texts, 1)
        tokens = torch.randint(codes, (length,), generator=generator)  # the first drafts are mere guesses,
        q = torch.full((length, codes), 1 / codes)  # and known to be
        if kept is not None:
            tokens = torch.where(stays, kept.cpu(), tokens)
        tokens[:1] = torch.where(stays[:1], tokens[:1], draw(probabilities(cache.first_logits[:, None]), generator))
        start = 1
        while start < length:
            end = min(start + width, length)
            previous = tokens[None, start - 1 : end - 1].to(places.device)
            p = probabilities(transformer.step(previous, places[start - 1 : end - 1], cache, end - 1))
            drafts, before = tokens[start:end, None], q[start:end]
            chance = (p.gather(1, drafts) / before.gather(1, drafts))[:, 0]
            stands = (torch.rand(end - start, generator=generator) < chance) | stays[start:end]
            fallen = start + int(stands.long().cumprod(dim=0).sum())
            if fallen < end:
                anew = p[fallen - start :].clone()
                more = (anew[0] - q[fallen]).clamp_min(0)
                anew[0] = torch.where(more.sum() > 0, more, anew[0])  # 0 by rounding alone
                tokens[fallen:end] = torch.where(stays[fallen:end], tokens[fallen:end], draw(anew, generator))
                q[fallen:end] = p[fallen - start :]
            start = min(fallen + 1, end)
            drawn[k, :start] = tokens[:start].to(drawn.device)
            yield drawn, range(k, k + 1), start
        transformer.release(cache)

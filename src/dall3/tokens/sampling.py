"""Sampling settings, top-k and top-p filters, and sampling of one token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dall3.errors import require
from dall3.models.packed import QUANTIZATIONS


def check_counts(**counts: Any) -> None:
    """Raise ValueError for a value that is not a positive integer."""
    for name, value in counts.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0
        require(bool(whole), f"{name}={value}; expected a whole number from 1")


def filter_top_k(logits: Tensor, threshold: float, vocabulary: int | None = None) -> Tensor:
    """Keep the k largest of logits (batch, n) and set the others to -inf (DALLE-pytorch's top-k filter).

    k is max(int((1 - threshold) · vocabulary), 1). threshold: in [0, 1], the fraction that is dropped. vocabulary:
    number of ids that the fraction refers to; None for n. DALLE-pytorch counts text and image ids together.

    >>> filter_top_k(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 0.5)
    tensor([[-inf, 3., 2., -inf]])
    """
    k = max(int((1 - threshold) * (vocabulary or logits.shape[-1])), 1)
    if k >= logits.shape[-1]:
        return logits
    values, indices = logits.topk(k, sorted=False)
    return torch.full_like(logits, float("-inf")).scatter(-1, indices, values)


def filter_count(logits: Tensor, count: int) -> Tensor:
    """Keep the `count` largest of logits (batch, n), and ties with the smallest of these; set the others to -inf."""
    if count >= logits.shape[-1]:
        return logits
    smallest = logits.topk(count, sorted=False).values.amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < smallest, float("-inf"))


def sort_likeliest(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sort logits (batch, n) in descending order; returns values, indices and probabilities, each (batch, m), m ≤ n.

    The m largest probabilities sum to more than `threshold` unless m is n. On a CPU, sorting the whole vocabulary can
    cost as much as a step of the transformer, so m is n // 8 if that is enough. Elsewhere this test would synchronise
    with the device, and in a compiled step it would break the graph.
    """
    on_cpu = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and threshold < 1 and logits.shape[-1] >= 64:
        values, indices = logits.topk(logits.shape[-1] // 8)
        probabilities = (values - logits.logsumexp(dim=-1, keepdim=True)).exp()
        if (probabilities.sum(dim=-1) > threshold).all():
            return values, indices, probabilities
    values, indices = logits.sort(descending=True)
    return values, indices, values.softmax(dim=-1)


def filter_top_p(logits: Tensor, threshold: float) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751): keep the most likely of logits (batch, n) and set the others to -inf.

    The smallest set whose probability exceeds `threshold` is kept. threshold: in (0, 1].
    """
    values, indices, probabilities = sort_likeliest(logits, threshold)
    before = probabilities.cumsum(dim=-1).roll(1, dims=-1)
    before[..., 0] = 0
    return torch.full_like(logits, float("-inf")).scatter(
        -1, indices, values.masked_fill(before > threshold, float("-inf"))
    )


def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one id per row of logits (batch, n) by inverse transform sampling at uniforms (batch,) in [0, 1).

    Returns int64 (batch,). Each token takes one random number, so the numbers of a candidate can be drawn in advance
    and do not depend on the batch.
    """
    probabilities = logits.float().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # The total is 1 up to rounding. A parallel cumulative sum may not be monotone, so ids of probability 0 are skipped.
    reached = (cumulative >= uniforms[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    return reached.int().argmax(dim=-1)


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling image tokens, for `Dall3Pipeline.generate_tokens` and the pipeline call.

    temperature: above 0; divides the logits after filtering, as in DALLE-pytorch. top_k: in [0, 1), the fraction of the
    vocabulary that is dropped; or an integer from 1, the number of codes that are kept, as in DALL·E Mini and ruDALL-E.
    With an integer, codes equal to the last one are kept too, the temperature divides before filtering, and top_p may
    filter further. top_p: in (0, 1], the probability that is kept (nucleus sampling). cond_scale: scale of
    classifier-free guidance, as in DALLE-pytorch 1.6; 1 for none. quantize: "int8" for int8 weights: faster for a
    few candidates at a time, with nearly the same distribution; a GPU needs the extra `int8` and a compiled transformer
    for it. "float16" for weights rounded to float16 on a CPU (weights that float16 represents exactly are stored in it
    by default). jacobi_window: tokens per step of speculative Jacobi
    decoding (`dall3.tokens.speculative`), which draws one candidate after the other: faster for a few candidates, with
    the same distribution but other tokens for a seed.

    Raises ValueError for a value out of range, and if both `top_k` as a fraction and `top_p` are given.

    >>> Sampling(temperature=0.9, top_p=0.95).cond_scale
    1.0
    """

    temperature: float = 1.0
    top_k: float | None = None
    top_p: float | None = None
    cond_scale: float = 1.0
    quantize: str | None = None
    jacobi_window: int | None = None

    def __post_init__(self) -> None:
        top_k, top_p = self.top_k, self.top_p
        require(0 < self.temperature < math.inf, f"temperature={self.temperature}; expected a number above 0")
        require(math.isfinite(self.cond_scale), f"cond_scale={self.cond_scale}; expected a finite number")
        fits = top_k is None or self.counts_codes or 0 <= top_k < 1
        expected = "expected the fraction of the vocabulary to drop, in [0, 1), or the number of codes to keep, from 1"
        require(fits, f"top_k={top_k}; {expected}")
        require(top_p is None or 0 < top_p <= 1, f"top_p={top_p}; expected a probability to keep, in (0, 1]")
        require(
            top_k is None or top_p is None or self.counts_codes,
            "both top_k and top_p are given; choose one, or give top_k as a number of codes",
        )
        known = self.quantize is None or self.quantize in QUANTIZATIONS
        require(known, f"quantize={self.quantize!r} is not known; expected {', '.join(QUANTIZATIONS)} or None")
        check_counts(jacobi_window=1 if self.jacobi_window is None else self.jacobi_window)

    @property
    def counts_codes(self) -> bool:
        """Whether top_k is a number of codes to keep."""
        return isinstance(self.top_k, int) and not isinstance(self.top_k, bool) and self.top_k >= 1

    def guide(self, logits: Tensor) -> Tensor:
        """Apply classifier-free guidance. Returns one row of logits for each candidate.

        logits: (batch, …); with guidance (2 · batch, …), the conditional rows before the unconditional ones.
        """
        if self.cond_scale == 1:
            return logits
        with_text, without_text = logits.chunk(2)
        return without_text + (with_text - without_text) * self.cond_scale

    def filter(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Apply temperature, top_k and top_p to logits (batch, n). vocabulary: as in `filter_top_k`."""
        if self.counts_codes:
            logits = filter_count(logits / self.temperature, int(self.top_k or 0))
            return logits if self.top_p is None or self.top_p == 1 else filter_top_p(logits, self.top_p)
        if self.top_k is not None:
            logits = filter_top_k(logits, self.top_k, vocabulary)
        elif self.top_p is not None:
            logits = filter_top_p(logits, self.top_p)
        return logits / self.temperature

    def choose(self, logits: Tensor, uniforms: Tensor, vocabulary: int) -> Tensor:
        """Sample one id per row of logits (batch, n) at uniforms (batch,) in [0, 1): int64 (batch,).

        vocabulary: as in `filter_top_k`.
        """
        return choose(self.filter(logits, vocabulary), uniforms)

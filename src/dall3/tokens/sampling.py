"""Sampling settings: the filters of logits, and the draw of one token."""

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
    """Raise ValueError for a value that is not a whole number from 1."""
    for name, value in counts.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0
        require(bool(whole), f"{name}={value}; expected a whole number from 1")


def filter_top_k(logits: Tensor, threshold: float, vocabulary: int | None = None) -> Tensor:
    """Keep the max(int((1 - threshold) · vocabulary), 1) largest of logits (batch, n), the others become -inf.

    vocabulary: DALLE-pytorch counts text and image ids together; None for n. threshold in [0, 1].
    """
    k = max(int((1 - threshold) * (vocabulary or logits.shape[-1])), 1)
    if k >= logits.shape[-1]:
        return logits
    values, indices = logits.topk(k, sorted=False)
    return torch.full_like(logits, float("-inf")).scatter(-1, indices, values)


def filter_count(logits: Tensor, count: int) -> Tensor:
    """Keep the `count` largest of logits (batch, n) and those equal to the last of them; the others become -inf."""
    if count >= logits.shape[-1]:
        return logits
    smallest = logits.topk(count, sorted=False).values.amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < smallest, float("-inf"))


def sort_likeliest(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of logits (batch, n), largest first, with their indices and probabilities, which pass `threshold`.

    On a CPU, where sorting a whole vocabulary may cost as much as a step of the transformer and looking at a number is
    not waiting for it, an eighth is sorted if that is enough.
    """
    if logits.device.type == "cpu" and threshold < 1 and logits.shape[-1] >= 64:
        values, indices = logits.topk(logits.shape[-1] // 8)
        probabilities = (values - logits.logsumexp(dim=-1, keepdim=True)).exp()
        if (probabilities.sum(dim=-1) > threshold).all():
            return values, indices, probabilities
    values, indices = logits.sort(descending=True)
    return values, indices, values.softmax(dim=-1)


def filter_top_p(logits: Tensor, threshold: float) -> Tensor:
    """Keep the smallest set of logits (batch, n) whose probability passes `threshold` (nucleus sampling,
    arXiv 1904.09751), the token that passes it included; the others become -inf. threshold in (0, 1].
    """
    values, indices, probabilities = sort_likeliest(logits, threshold)
    before = probabilities.cumsum(dim=-1).roll(1, dims=-1)
    before[..., 0] = 0
    return torch.full_like(logits, float("-inf")).scatter(
        -1, indices, values.masked_fill(before > threshold, float("-inf"))
    )


def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one id a row from logits (batch, n) by inverting the distribution function at uniforms (batch,) in [0, 1).

    One random number a token: a candidate's draws can be made beforehand and do not depend on its batch.
    """
    probabilities = logits.float().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # The total is 1 but for rounding. Ids of probability 0 are passed over: a parallel sum may not be monotone there.
    reached = (cumulative >= uniforms[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    return reached.int().argmax(dim=-1)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: what `Dall3Pipeline.generate_tokens` and its call take.

    temperature: above 0; divides after filtering, as in 2021. top_k: in [0, 1), the share of the vocabulary that is
    dropped; top_p: in (0, 1], the probability that is kept; not both. top_k as a whole number from 1 is the count of
    codes that are kept, as DALL·E Mini and ruDALL-E have it: equal ones all stay, the temperature divides first, and
    top_p may further choose among them. cond_scale: how far to go from the logits without the text to those with it
    (classifier-free guidance, as DALLE-pytorch 1.6); 1 for the text's own.
    quantize: "int8" for weights of eight bits, on a CPU: faster for a few candidates at a time, and near the same
    distribution. jacobi_window: draw so many tokens at a time by speculative Jacobi decoding, one candidate after the
    other (`dall3.tokens.speculative`): other tokens for a seed, of the same distribution, faster for a few candidates.
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
        require(math.isfinite(self.cond_scale), f"cond_scale={self.cond_scale}; expected a number")
        fits = top_k is None or self.counts_codes or 0 <= top_k < 1
        expected = "expected a share of the words to drop, in [0, 1), or how many codes to keep, a whole number from 1"
        require(fits, f"top_k={top_k}; {expected}")
        require(top_p is None or 0 < top_p <= 1, f"top_p={top_p}; expected a probability to keep, in (0, 1]")
        require(
            top_k is None or top_p is None or self.counts_codes,
            "both top_k and top_p are given; choose one, or give top_k as a number of codes",
        )
        kinds = ", ".join(QUANTIZATIONS)
        known = self.quantize is None or self.quantize in QUANTIZATIONS
        require(known, f"quantize={self.quantize!r} is not known; expected {kinds} or None")
        check_counts(jacobi_window=1 if self.jacobi_window is None else self.jacobi_window)

    @property
    def counts_codes(self) -> bool:
        """Whether top_k is a number of codes to keep."""
        return isinstance(self.top_k, int) and not isinstance(self.top_k, bool) and self.top_k >= 1

    def guide(self, logits: Tensor) -> Tensor:
        """One row of logits a candidate: (batch, …), of twice as many where cond_scale guides, the text's first."""
        if self.cond_scale == 1:
            return logits
        with_text, without_text = logits.chunk(2)
        return without_text + (with_text - without_text) * self.cond_scale

    def filter(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Logits (batch, n) as they are drawn from; `vocabulary` as in `filter_top_k`."""
        if self.counts_codes:
            logits = filter_count(logits / self.temperature, int(self.top_k or 0))
            return logits if self.top_p is None or self.top_p == 1 else filter_top_p(logits, self.top_p)
        if self.top_k is not None:
            logits = filter_top_k(logits, self.top_k, vocabulary)
        elif self.top_p is not None:
            logits = filter_top_p(logits, self.top_p)
        return logits / self.temperature

    def choose(self, logits: Tensor, uniforms: Tensor, vocabulary: int) -> Tensor:
        """Draw one id a row from logits (batch, n) at uniforms (batch,); `vocabulary` as in `filter_top_k`."""
        return choose(self.filter(logits, vocabulary), uniforms)

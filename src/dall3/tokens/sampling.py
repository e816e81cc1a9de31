"""Choosing image tokens: the filters, one draw, and the loop that draws a whole grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dall3.errors import require
from dall3.models.attention import LayerCache
from dall3.models.packed import QUANTIZATIONS, prepare
from dall3.models.transformer import DalleTransformer
from dall3.tokens.cuda_graph import CudaGraph

# Of candidates at a time (each counts twice with cond_scale), up to which a GPU waits for Python more than for itself:
# an H100 drew 256 tokens (dim 512, depth 12) of 1 and of 8 in 1.42 and 1.45 s, with recorded steps in 0.38 and 0.49 s.
GRAPHED_ROWS = 32


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
    dropped; top_p: in (0, 1], the probability that is kept; not both. cond_scale: how far to go from the logits
    without the text to those with it (classifier-free guidance, as DALLE-pytorch 1.6); 1 for the text's own.
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
        require(top_k is None or 0 <= top_k < 1, f"top_k={top_k}; expected a share of the words to drop, in [0, 1)")
        require(top_p is None or 0 < top_p <= 1, f"top_p={top_p}; expected a probability to keep, in (0, 1]")
        require(top_k is None or top_p is None, "both top_k and top_p are given; choose one")
        kinds = ", ".join(QUANTIZATIONS)
        known = self.quantize is None or self.quantize in QUANTIZATIONS
        require(known, f"quantize={self.quantize!r} is not known; expected {kinds} or None")
        check_counts(jacobi_window=1 if self.jacobi_window is None else self.jacobi_window)

    def guide(self, logits: Tensor) -> Tensor:
        """One row of logits a candidate: (batch, …), of twice as many where cond_scale guides, the text's first."""
        if self.cond_scale == 1:
            return logits
        with_text, without_text = logits.chunk(2)
        return without_text + (with_text - without_text) * self.cond_scale

    def filter(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Logits (batch, n) as they are drawn from; `vocabulary` as in `filter_top_k`."""
        if self.top_k is not None:
            logits = filter_top_k(logits, self.top_k, vocabulary)
        elif self.top_p is not None:
            logits = filter_top_p(logits, self.top_p)
        return logits / self.temperature

    def choose(self, logits: Tensor, uniforms: Tensor, vocabulary: int) -> Tensor:
        """Draw one id a row from logits (batch, n) at uniforms (batch,); `vocabulary` as in `filter_top_k`."""
        return choose(self.filter(logits, vocabulary), uniforms)


MOST_AT_ONCE = {"cpu": 32}  # candidates, by device; on others 256: more are not faster


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a CUDA device; of others, those of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    return 4 * 2**30


def fitting_batch_size(transformer: DalleTransformer, settings: Sampling) -> int:
    """How many candidates to draw at a time: a power of two whose caches take at most half of the free memory."""
    c, weight = transformer.config, transformer.to_logits.weight
    width = c.depth * (2 * c.heads * c.dim_head + c.dim)  # keys, values, and what the token shift remembers
    prompts = 1 if settings.cond_scale == 1 else 2
    room = free_memory(weight.device) // (2 * width * (c.seq_len + 1) * weight.element_size() * prompts)
    most = min(max(room, 1), MOST_AT_ONCE.get(weight.device.type, 256))
    return int(2 ** (most.bit_length() - 1))


T = TypeVar("T")


def batches_that_fit(count: int, size: int, work: Callable[[range], Iterator[T]]) -> Iterator[tuple[range, T]]:
    """What `work` yields on ranges of `size` numbers, one after the other, up to `count`, each with its range.

    Where the device's memory does not hold a batch, half of it is tried from its beginning.
    """
    start = 0
    while start < count:
        batch, fits = range(start, min(start + size, count)), True
        try:
            for step in work(batch):
                yield batch, step
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            fits = False
        if fits:
            start = batch.stop
        else:  # outside of the handler, whose traceback holds on to the batch's tensors
            size = len(batch) // 2
            torch.cuda.empty_cache()


def run_text(
    transformer: DalleTransformer, text_ids: Tensor, settings: Sampling, empty_ids: Tensor | None = None
) -> tuple[Tensor, list[LayerCache]]:
    """The text's last hidden state (prompts, 1, dim), and caches that hold the text.

    text_ids: int64 (text_seq_len,). Prompts: the text, and where cond_scale guides `empty_ids`, the text to
    guide away from, an empty one if None.
    """
    empty = torch.zeros_like(text_ids) if empty_ids is None else empty_ids
    prompts = text_ids[None] if settings.cond_scale == 1 else torch.stack((text_ids, empty))
    caches, length = transformer.make_caches(), transformer.config.text_length
    index = torch.arange(length, device=text_ids.device)
    return transformer.run(transformer.embed_text(prompts), index, length, caches)[:, -1:], caches


@torch.inference_mode()
def image_token_steps(
    transformer: DalleTransformer,
    text_ids: Tensor,
    uniforms: Tensor,
    settings: Sampling,
    batch_size: int | None = None,
    kept: Tensor | None = None,
    empty_ids: Tensor | None = None,
) -> Iterator[tuple[Tensor, range, int]]:
    """Draw image tokens for one text, which is run once for all candidates, and tell of each step.

    text_ids: int64 (text_seq_len,). uniforms: (candidates, grid_size²) in [0, 1), on the transformer's device.
    batch_size: candidates at a time, fewer where the device's memory does not hold them; None for all. kept: int64
    (grid_size²,), tokens that stay as they are, -1 where they are drawn. empty_ids: as `run_text` has it. Yields the
    tokens, int64 (candidates, grid_size²), the same tensor each time, which candidates are being drawn, and how many
    tokens they have.
    """
    config, device, compiled = transformer.config, text_ids.device, transformer.compiled_run
    if compiled is None or settings.quantize is not None:
        prompts = 1 if settings.cond_scale == 1 else 2
        at_a_time = prompts * min(batch_size or len(uniforms), len(uniforms))
        transformer, compiled = prepare(transformer, settings.quantize, at_a_time), None
    last, text_caches = run_text(transformer, text_ids, settings, empty_ids)
    index = torch.arange(config.seq_len, device=device)
    with torch.inference_mode(False):  # the result may go where gradients are taken
        drawn = torch.zeros(uniforms.shape, dtype=torch.int64, device=device)
    keeps = torch.full_like(index[: config.image_seq_len], -1) if kept is None else kept

    def draw(batch: range) -> Iterator[int]:
        tokens, rows = drawn[batch.start : batch.stop], uniforms[batch.start : batch.stop]
        caches = [cache.repeat(len(batch)) for cache in text_caches]
        graphed = device.type == "cuda" and not compiled and len(last) * len(batch) <= GRAPHED_ROWS
        end: int | None = None

        def choose(hidden: Tensor, row: Tensor, keep: Tensor) -> Tensor:
            logits = settings.guide(transformer.image_logits(hidden)[:, 0].float())
            chosen = settings.choose(logits, row, config.text_vocabulary + config.num_image_tokens)
            return torch.where(keep < 0, chosen, keep)

        def step(previous: Tensor, place: Tensor, where: Tensor, row: Tensor, keep: Tensor) -> Tensor:
            x = transformer.embed_image(previous, place).repeat(len(last), 1, 1)
            return choose((compiled or transformer.run)(x, where, end, caches), row, keep)

        tokens[:, 0] = choose(last.repeat_interleave(len(batch), dim=0), rows[:, 0], keeps[0])
        yield 1
        advance: Callable[..., Tensor] = step
        for i in range(1, config.image_seq_len):
            where = config.text_length + i
            inputs = tokens[:, i - 1 : i], index[i - 1 : i], index[where - 1 : where], rows[:, i], keeps[i]
            if graphed and i == 1:
                advance = CudaGraph(step, *inputs)
            # Compiled or recorded, every step has the same shapes; otherwise, what is not there yet need not be read.
            end = None if compiled or graphed else where
            tokens[:, i] = advance(*inputs)
            yield i + 1

    for batch, count in batches_that_fit(len(uniforms), batch_size or len(uniforms), draw):
        yield drawn, batch, count


def draw_image_tokens(
    transformer: DalleTransformer, text_ids: Tensor, uniforms: Tensor, settings: Sampling, batch_size: int | None = None
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

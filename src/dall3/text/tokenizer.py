"""The interface of tokenizers, and shared helpers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

MAX_BYTES, MAX_TOKEN = 64 << 20, 1000  # upper bounds: bytes of a tokenizer file, characters of a token


class Tokenizer(Protocol):
    """Interface of a tokenizer: text to ids in [0, vocab_size) and back. Id 0 is padding and decodes to nothing."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Encode a text to ids, without special ids or padding. An empty text gives an empty list."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, also a 1-D tensor, to text, without padding. Raises ValueError for an id out of range."""


def without_padding(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids without zeros. Raises ValueError for an id outside of [0, vocab_size)."""
    kept = [i for i in map(int, ids) if i != 0]
    if any(not 0 < i < vocab_size for i in kept):
        raise ValueError(f"ids from {min(kept)} to {max(kept)}; this tokenizer has ids 0 to {vocab_size - 1}")
    return kept

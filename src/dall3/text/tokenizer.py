"""What every tokenizer offers, and what they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

MOST_BYTES, LONGEST = 64 << 20, 1000  # of a tokenizer's file, and characters of one token


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back; 0 is padding and has no text."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without start, end or padding; an empty list for an empty text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a 1-D tensor does too), zeros left out. ValueError at an id that no token has."""


def without_padding(ids: Iterable[int], vocab_size: int) -> list[int]:
    kept = [i for i in map(int, ids) if i != 0]
    if any(not 0 < i < vocab_size for i in kept):
        raise ValueError(f"ids from {min(kept)} to {max(kept)} are not all of this tokenizer's, 0 to {vocab_size - 1}")
    return kept

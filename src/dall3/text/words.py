"""The words that a transformer knows: those of its training captions, in the file words.txt of a pipeline folder.

Lines that begin with "#" are examples of captions, the others are words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

WORDS = "words.txt"
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")  # letters and digits, with apostrophes inside
PLAIN = re.compile(r"[a-z]+(?: [a-z]+){2,}", re.IGNORECASE)  # three words or more, without punctuation
MAX_BYTES = 8 << 20
EXAMPLES = 8  # maximum number of captions in a file


@dataclass(frozen=True)
class KnownWords:
    """The content of words.txt. words: in lower case. examples: captions of the training data."""

    words: frozenset[str]
    examples: tuple[str, ...] = ()

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that are not known, in order, each once."""
        return [word for word in dict.fromkeys(split_words(prompt)) if word not in self.words]

    def none_known(self, prompt: str) -> bool:
        """Whether a prompt has words, and none of them is known."""
        words = split_words(prompt)
        return bool(words) and not self.words.intersection(words)

    def to_text(self) -> str:
        """The content of words.txt."""
        return "".join(f"{line}\n" for line in (*(f"# {text}" for text in self.examples), *sorted(self.words)))


def split_words(text: str) -> list[str]:
    """The words of a text in lower case.

    >>> split_words("A red-haired girl's 3D cube")
    ['a', 'red', 'haired', "girl's", '3d', 'cube']
    """
    return WORD.findall(text.lower().replace("’", "'"))


def words_of(texts: Iterable[str], captions: Sequence[str]) -> KnownWords:
    """Collect the words of the texts, and a few short ones of the captions as examples."""
    short = [text for text in dict.fromkeys(captions) if len(text) <= 40 and PLAIN.fullmatch(text)]
    return KnownWords(frozenset(word for text in texts for word in split_words(text)), tuple(short[:EXAMPLES]))


def read_words(path: Path) -> KnownWords | None:
    """Read words.txt. Returns None if there is no such file; raises ValueError if it is not a list of words."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; expected a list of words, one per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; expected a list of words, one per line") from None
    examples = tuple(line[1:].strip() for line in lines if line.startswith("#") and line[1:].strip())
    return KnownWords(frozenset(line.strip() for line in lines if line.strip() and line[0] != "#"), examples)

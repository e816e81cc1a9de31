"""Prompt encoding of each family: normalisation of the text, special ids, truncation and padding."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dall3.text.tokenizer import Tokenizer
from dall3.text.words import KnownWords

MAX_CHARACTERS = 10_000  # of a prompt: tokenizing megabytes of text takes gigabytes of memory


class TextEncoder:
    """Text encoder of DALLE-pytorch's transformers: lower-cased text, no special ids, padded with 0.

    text_seq_len: length of the encoded prompt. num_text_tokens: size of the transformer's text vocabulary.
    known_words: the words of the captions that the transformer was trained on, or None if they are not recorded.

    >>> from dall3.text import load_tokenizer
    >>> TextEncoder(load_tokenizer(), text_seq_len=8, num_text_tokens=49408)("a red cube").shape
    torch.Size([8])
    """

    before: tuple[int, ...] = ()  # special ids before the prompt
    after: tuple[int, ...] = ()  # special ids after the prompt
    padding = 0
    special_ids = frozenset({0})  # ids that `decode` leaves out
    family = "this transformer"  # name of the family in error messages
    letters = "letters that its tokenizer knows"  # letters that the family reads, in error messages
    default_text_seq_len = 256
    default_example = "a cube"  # a prompt that the family can read

    known_words: KnownWords | None = None

    def __init__(self, tokenizer: Tokenizer, text_seq_len: int, num_text_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.text_seq_len = text_seq_len
        self.num_text_tokens = num_text_tokens

    def prepare(self, prompt: str) -> str:
        """Normalise a prompt for the tokenizer."""
        return prompt.lower()

    def __call__(self, prompt: str, truncate: bool = False) -> torch.Tensor:
        """Encode a prompt: ids, int64 (text_seq_len,), in [0, num_text_tokens), padded at the end.

        truncate: truncate a prompt that is too long instead of raising an error. Raises TypeError if `prompt` is not a
        str; ValueError if it is empty (for a family without special ids), has too many tokens, or has an id outside of
        the transformer's vocabulary.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"the prompt is a {type(prompt).__name__}; expected a str, one prompt at a time")
        ids = [*self.before, *(self.tokenizer.encode(self.prepare(prompt)) if prompt.strip() else []), *self.after]
        if not ids:
            raise ValueError(f"the prompt {prompt!r} is empty; expected text")
        if len(ids) > self.text_seq_len and not truncate:
            at_most = f"expected at most {self.text_seq_len}: shorten it, or pass truncate=True"
            raise ValueError(f"the prompt has {len(ids)} tokens; {at_most}")
        if max(ids) >= self.num_text_tokens:
            known = f"the transformer has ids 0 to {self.num_text_tokens - 1}: load its tokenizer"
            raise ValueError(f"the prompt has id {max(ids)}; {known}")
        ids = self.cut(ids)
        return torch.tensor(ids + [self.padding] * (self.text_seq_len - len(ids)), dtype=torch.int64)

    def cut(self, ids: list[int]) -> list[int]:
        """Truncate ids to `text_seq_len`."""
        return ids[: self.text_seq_len]

    def check(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is empty or that the transformer cannot draw.

        It cannot draw a prompt with more than MAX_CHARACTERS, one whose letters the tokenizer does not know (another
        script), or one without any word of the training captions. `__call__` accepts these, as the original code does.
        """
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"the prompt has {len(prompt):,} characters; expected at most {MAX_CHARACTERS:,}")
        if not prompt.strip():
            raise ValueError(f"the prompt {prompt!r} is empty; expected text")
        written = {letter for letter in prompt.lower() if letter.isalpha()}
        nothing = not self.tokenizer.encode(self.prepare(prompt))
        if nothing or (written and not self.readable_letters(prompt)):
            raise ValueError(f"{self.family} cannot read the prompt {prompt!r}: it reads {self.letters}")
        if self.known_words is not None and self.known_words.none_known(prompt):
            raise ValueError(
                f"no word of the prompt {prompt!r} was in the captions that these weights were trained on; they draw "
                f"{self.examples()}; for other prompts load larger weights, which `dall3 weights list` shows"
            )

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that do not occur in the training captions; none if the captions are not recorded.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().text_encoder.unknown_words("a small cube made of plutonium")
        ['plutonium']
        """
        return [] if self.known_words is None else self.known_words.unknown(prompt)

    def examples(self) -> str:
        """Prompts that the transformer can draw, for a message."""
        found = self.known_words.examples[:4] if self.known_words is not None else ()
        return " or ".join(map(repr, found)) or "the words in its words.txt"

    @property
    def example(self) -> str:
        """A prompt that `check` accepts."""
        if self.known_words is None:
            return self.default_example
        return next(iter(self.known_words.examples or sorted(self.known_words.words)), self.default_example)

    def readable_letters(self, prompt: str) -> set[str]:
        """Letters of a prompt that survive encoding and decoding."""
        text = self.prepare(prompt)
        return {letter for letter in text if letter.isalpha()} & {*self.tokenizer.decode(self.tokenizer.encode(text))}

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids (n,) to text. Padding, special ids and unknown ids are left out."""
        known = min(self.num_text_tokens, self.tokenizer.vocab_size)
        return self.tokenizer.decode([i for i in map(int, ids) if 0 < i < known and i not in self.special_ids])


class DalleMiniTextEncoder(TextEncoder):
    """Text encoder of DALL·E Mini and Mega: <s>, ids, </s>, padded with 1 (kuprel/min-dalle, `text_tokenizer.py`).

    Emoji are replaced by their names and non-ASCII characters are dropped. A truncated prompt keeps its </s>, as in
    training.
    """

    before, after, padding = (0,), (2,), 1
    special_ids = frozenset({0, 1, 2, 3})
    family = "DALL·E Mini"
    letters = "English, the letters a to z"
    default_text_seq_len = 64

    def prepare(self, prompt: str) -> str:
        if not prompt.isascii():
            from emoji import demojize

            prompt = demojize(prompt, delimiters=("", ""))
        return prompt.lower().encode("ascii", "ignore").decode()

    def cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self.text_seq_len else [*ids[: self.text_seq_len - 1], *self.after]


class RudalleTextEncoder(TextEncoder):
    """Text encoder of ruDALL-E: lower-cased and stripped text; 2, ids, 3, padded with 0."""

    before, after = (2,), (3,)
    special_ids = frozenset({0, 1, 2, 3})
    family = "ruDALL-E"
    letters = "Russian, in Cyrillic letters"
    default_text_seq_len = 128
    default_example = "куб"

    def prepare(self, prompt: str) -> str:
        return prompt.lower().strip()

    def readable_letters(self, prompt: str) -> set[str]:
        return {letter for letter in super().readable_letters(prompt) if "\u0400" <= letter <= "\u04ff"}


KINDS: dict[str, type[TextEncoder]] = {
    "dalle-pytorch": TextEncoder,
    "dalle-mini": DalleMiniTextEncoder,
    "rudalle": RudalleTextEncoder,
}


def check_kind(kind: str) -> None:
    """Raise ValueError for an unknown family."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")


def text_encoder_of(
    kind: str, tokenizer: Tokenizer, text_seq_len: int | None = None, num_text_tokens: int | None = None
) -> TextEncoder:
    """Build the text encoder of a family from a tokenizer.

    kind: "dalle-pytorch", "dalle-mini" or "rudalle". text_seq_len: length of the encoded prompt; by default 256, 64 or
    128. num_text_tokens: size of the transformer's text vocabulary; by default that of the tokenizer. Raises ValueError
    for an unknown kind.
    """
    check_kind(kind)
    encoder = KINDS[kind]
    return encoder(tokenizer, text_seq_len or encoder.default_text_seq_len, num_text_tokens or tokenizer.vocab_size)

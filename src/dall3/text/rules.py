"""How each family reads a prompt: what is cleaned, which special ids stand around it, how it is cut and padded."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dall3.text.tokenizer import Tokenizer


class TextEncoder:
    """A prompt as DALLE-pytorch's transformers read it: lower-cased, its ids, padding 0."""

    before: tuple[int, ...] = ()  # special ids around a prompt
    after: tuple[int, ...] = ()
    padding = 0
    special_ids = frozenset({0})  # those that are no text
    family = "this transformer"
    letters = "letters that its tokenizer knows"
    usual_length = 256

    def __init__(self, tokenizer: Tokenizer, text_seq_len: int, num_text_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.text_seq_len = text_seq_len
        self.num_text_tokens = num_text_tokens

    def prepare(self, prompt: str) -> str:
        """The text that the tokenizer is given."""
        return prompt.lower()

    def __call__(self, prompt: str, truncate: bool = False) -> torch.Tensor:
        """Ids of a prompt, int64 (text_seq_len,), in [0, num_text_tokens), padded at the end.

        truncate: cut a prompt that is too long instead of refusing it. Raises TypeError if `prompt` is not a str;
        ValueError if it has no tokens in a family without special ids around it, too many, or an id that the
        transformer does not know.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"the prompt must be a str, not {type(prompt).__name__}; encode several one by one")
        ids = [*self.before, *(self.tokenizer.encode(self.prepare(prompt)) if prompt.strip() else []), *self.after]
        if not ids:
            raise ValueError(f"the prompt {prompt!r} is empty: expected text to draw")
        if len(ids) > self.text_seq_len and not truncate:
            raise ValueError(f"{len(ids)} tokens, {self.text_seq_len} fit: shorten the prompt or pass truncate=True")
        if max(ids) >= self.num_text_tokens:
            raise ValueError(f"id {max(ids)} is not below {self.num_text_tokens}: load the transformer's own tokenizer")
        ids = self.cut(ids)
        return torch.tensor(ids + [self.padding] * (self.text_seq_len - len(ids)), dtype=torch.int64)

    def cut(self, ids: list[int]) -> list[int]:
        """The ids that fit."""
        return ids[: self.text_seq_len]

    def check(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is empty or has no letter that the family reads, such as one in another
        language. `__call__` encodes these as the originals do.
        """
        if not prompt.strip():
            raise ValueError(f"the prompt {prompt!r} is empty: expected text to draw")
        written = {letter for letter in prompt.lower() if letter.isalpha()}
        nothing = not self.tokenizer.encode(self.prepare(prompt))
        if nothing or (written and not self.letters_read(prompt)):
            raise ValueError(f"{self.family} cannot read the prompt {prompt!r}: it reads {self.letters}")

    def letters_read(self, prompt: str) -> set[str]:
        """Letters of a prompt that reach the transformer."""
        text = self.prepare(prompt)
        return {letter for letter in text if letter.isalpha()} & {*self.tokenizer.decode(self.tokenizer.encode(text))}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids of shape (n,), without padding, special ids and ids that no token has."""
        known = min(self.num_text_tokens, self.tokenizer.vocab_size)
        return self.tokenizer.decode([i for i in map(int, ids) if 0 < i < known and i not in self.special_ids])


class DalleMiniTextEncoder(TextEncoder):
    """A prompt as DALL·E Mini and Mega read it: <s>, its ids, </s>, padding 1. Rules and ids are min-dalle's.

    Emoji become their names, letters beyond ASCII are dropped. One that is too long keeps its </s>, as in training.
    """

    before, after, padding = (0,), (2,), 1
    special_ids = frozenset({0, 1, 2, 3})
    family = "DALL·E Mini"
    letters = "English, the letters a to z"
    usual_length = 64

    def prepare(self, prompt: str) -> str:
        if not prompt.isascii():
            from emoji import demojize

            prompt = demojize(prompt, delimiters=("", ""))
        return prompt.lower().encode("ascii", "ignore").decode()

    def cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self.text_seq_len else [*ids[: self.text_seq_len - 1], *self.after]


class RudalleTextEncoder(TextEncoder):
    """A prompt as ruDALL-E reads it: lower-cased and stripped, 2, its ids, 3, padding 0."""

    before, after = (2,), (3,)
    special_ids = frozenset({0, 1, 2, 3})
    family = "ruDALL-E"
    letters = "Russian, in Cyrillic letters"
    usual_length = 128

    def prepare(self, prompt: str) -> str:
        return prompt.lower().strip()

    def letters_read(self, prompt: str) -> set[str]:
        return {letter for letter in super().letters_read(prompt) if "\u0400" <= letter <= "\u04ff"}


KINDS: dict[str, type[TextEncoder]] = {
    "dalle-pytorch": TextEncoder,
    "dalle-mini": DalleMiniTextEncoder,
    "rudalle": RudalleTextEncoder,
}


def check_kind(kind: str) -> None:
    """Raise ValueError for a family that is not known."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; expected one of {', '.join(KINDS)}")


def text_encoder_of(
    kind: str, tokenizer: Tokenizer, text_seq_len: int | None = None, num_text_tokens: int | None = None
) -> TextEncoder:
    """A tokenizer with the rules of a family: "dalle-pytorch", "dalle-mini" or "rudalle".

    text_seq_len: ids of a prompt, by default the family's usual 256, 64 or 128. num_text_tokens: ids that the
    transformer knows, by default all of the tokenizer. Raises ValueError for another family.
    """
    check_kind(kind)
    encoder = KINDS[kind]
    return encoder(tokenizer, text_seq_len or encoder.usual_length, num_text_tokens or tokenizer.vocab_size)

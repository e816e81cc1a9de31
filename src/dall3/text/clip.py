"""CLIP's tokenizer, the default of DALLE-pytorch."""

from __future__ import annotations

from collections.abc import Iterable

from dall3.text.tokenizer import without_padding

CLIP_JSON = '{"tokenizer": "clip"}'


class ClipTokenizer:
    """CLIP's byte-level BPE with 49,408 tokens. The merges come with open_clip."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.bpe = SimpleTokenizer()
        self.vocab_size: int = self.bpe.vocab_size

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.bpe.encode(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in without_padding(ids, self.vocab_size) if i not in self.bpe.all_special_ids]
        text: str = self.bpe.decode(kept)
        return text.rstrip()

    def to_json(self) -> str:
        return CLIP_JSON  # a marker: the JSON format of `tokenizers` cannot express the ftfy cleaning of the text

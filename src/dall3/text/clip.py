"""CLIP's tokenizer, DALLE-pytorch's default."""

from __future__ import annotations

from collections.abc import Iterable

from dall3.text.tokenizer import without_padding

CLIP_JSON = '{"tokenizer": "clip"}'


class ClipTokenizer:
    """CLIP's byte-level BPE, 49408 tokens; open_clip ships the merges."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.bpe = SimpleTokenizer()
        self.vocab_size: int = self.bpe.vocab_size

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in without_padding(ids, self.vocab_size) if i not in self.bpe.all_special_ids]
        return self.bpe.decode(kept).rstrip()

    def to_json(self) -> str:
        return CLIP_JSON  # it mends its text with ftfy first, which no file of `tokenizers` can say

"""Tokenizers of Hugging Face's `tokenizers` library: DALLE-pytorch's `--hug` and `--chinese`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dall3.text.tokenizer import without_padding

PARTS = {  # accepted component types: those that cannot panic, access the network or expand a text without bound
    "model": ("BPE", "WordPiece", "WordLevel", "Unigram"),
    "normalizer": (
        *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend", "ByteLevel"),
        *("BertNormalizer", "Nmt", "Precompiled"),
    ),
    "pre_tokenizer": (
        *("ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Metaspace", "Punctuation", "Split"),
        *("Digits", "CharDelimiterSplit", "UnicodeScripts"),
    ),
    "decoder": ("ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "Replace", "Fuse", "Strip", "ByteFallback"),
}


def longest_replacement(charsmap: str) -> int:
    """Length in bytes of the longest replacement in sentencepiece's precompiled normalisation table (base64).

    The table holds the size of a trie, the trie, and the replacements, each terminated by a zero byte. Raises
    ValueError for a damaged table.
    """
    table = base64.b64decode(charsmap, validate=True)
    trie = int.from_bytes(table[:4], "little")
    if trie < 4 or trie % 4 or len(table) < 4 + trie:
        raise ValueError("its Precompiled normalizer has a damaged table")
    return max(map(len, table[4 + trie :].split(b"\0")))


def check_tokenizer(text: str) -> str:
    """Check a tokenizer's JSON and return it without truncation, padding and post-processor.

    Raises ValueError for component types that are not accepted, and for normalisation that can expand a text more than
    64 times.
    """
    found = json.loads(text)
    growth, lists = 1.0, {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}

    def check(place: str, part: Any) -> None:
        nonlocal growth
        if not isinstance(part, dict):
            raise ValueError(f"its {place} is not an object")
        kind = part.get("type", "BPE" if place == "model" else None)
        if kind == "Sequence" and place in lists:
            for inner in part[lists[place]]:
                check(place, inner)
        elif kind not in PARTS[place]:
            raise ValueError(f"its {place} is a {kind}; expected one of {', '.join(PARTS[place])}")
        if kind == "Precompiled":  # sentencepiece's, as XLM-R has it
            growth *= max(longest_replacement(part.get("precompiled_charsmap") or ""), 1)
        added = max(len(part.get(key) or "") for key in ("content", "prepend"))
        if added:  # replaces the pattern's characters; a pattern that can match nothing inserts at every position
            pattern = part.get("pattern")
            replaced = len(pattern.get("String") or "") if isinstance(pattern, dict) else 0
            growth *= max(added / replaced, 1) if replaced else 1 + added
        if growth > 64:
            raise ValueError("its normalizer can make a text more than 64 times as long")

    for place in PARTS:
        if found.get(place) is not None or place == "model":
            check(place, found.get(place))
    if found["model"].get("type", "BPE") == "BPE" and found["model"].get("continuing_subword_prefix"):
        raise ValueError("its BPE has a continuing_subword_prefix, which can split characters")
    # The text encoder truncates and pads, and adds the special ids.
    return json.dumps(found | {"truncation": None, "padding": None, "post_processor": None}, ensure_ascii=False)


@contextmanager
def as_value_error(action: str) -> Iterator[None]:
    """Convert the errors of `tokenizers` to ValueError: it raises plain Exception, and PanicException on a panic."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer cannot {action}: {' '.join(str(error).split())[:500]}") from error


class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face's `tokenizers`, from its JSON. Raises ValueError as `check_tokenizer` does."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer

        self.json = check_tokenizer(text)
        self.tokenizer = Tokenizer.from_str(self.json)
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        # DALLE-pytorch removes the post-processor, which could add start and end tokens.
        with as_value_error("encode this text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        kept = without_padding(ids, self.vocab_size)
        with as_value_error("decode these ids"):
            return self.tokenizer.decode(kept)

    def to_json(self) -> str:
        return self.json


def bert_json(vocabulary: str) -> str:
    """Convert the content of BERT's vocab.txt to the JSON of a tokenizer."""
    from tokenizers import BertWordPieceTokenizer

    ids = {token: i for i, token in enumerate(vocabulary.removesuffix("\n").split("\n"))}
    # transformers loads bert-base-chinese, a cased model, with do_lower_case=False, which keeps accents too.
    made: str = BertWordPieceTokenizer(ids, lowercase=False).to_str()
    return made

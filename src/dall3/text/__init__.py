"""Prompts to token ids, by the tokenizers and rules of DALLE-pytorch (`tokenizer.py`, `generate.py`)."""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import torch

_MOST_BYTES, _LONGEST = 64 << 20, 1000
_CLIP_JSON = '{"tokenizer": "clip"}'
_EXPECTED = "expected the youtokentome, tokenizers JSON or BERT vocab.txt file that the checkpoint was trained with"


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back; 0 is padding and has no text."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without start, end or padding; an empty list for an empty text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a 1-D tensor does too), zeros left out. ValueError at an id that no token has."""


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer in a file, its kind told by the content; without a file CLIP's own, DALLE-pytorch's default.

    The kinds are DALLE-pytorch's: a youtokentome model, a JSON file of Hugging Face's `tokenizers` (`--hug`), the
    `vocab.txt` of bert-base-chinese (`--chinese`). Raises FileNotFoundError or IsADirectoryError where there is no
    file, ValueError for one that is empty, damaged or of another kind.
    """
    if path is None:
        return _ClipTokenizer()
    path = Path(path)
    if not path.is_file():
        problem = IsADirectoryError if path.is_dir() else FileNotFoundError
        raise problem(f"{path} is not a file; {_EXPECTED}")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} is {path.stat().st_size:,} bytes large, which no tokenizer is; {_EXPECTED}")
    with path.open(encoding="utf-8-sig") as file:
        try:
            # By lines: a checkpoint of gigabytes, given by mistake, fails within its first bytes.
            text = "".join(file)
            if text.strip() == _CLIP_JSON:
                return _ClipTokenizer()
            if text.startswith("{"):
                return _HuggingFaceTokenizer(text)
            if "[UNK]" in text.split("\n"):
                return _HuggingFaceTokenizer(_bert_json(text))
            return _YttmTokenizer(text)
        except BaseException as error:  # tokenizers raises nothing more precise, and panics as no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            what = " ".join(str(error).split())[:500]
            raise ValueError(f"{path} is damaged or not a tokenizer ({what}); {_EXPECTED}") from error


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """A tokenizer of any kind that `load_tokenizer` knows as the text of a JSON file, which it reads again.

    Raises ValueError for a tokenizer of another kind.
    """
    if not isinstance(tokenizer, _HuggingFaceTokenizer | _YttmTokenizer | _ClipTokenizer):
        raise ValueError(f"a {type(tokenizer).__name__} has no JSON; expected a tokenizer of load_tokenizer")
    return tokenizer.to_json()


class TextEncoder:
    """A prompt as the transformer reads it: lower-cased, `text_seq_len` ids below `num_text_tokens`, padded with 0."""

    def __init__(self, tokenizer: Tokenizer, text_seq_len: int, num_text_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.text_seq_len = text_seq_len
        self.num_text_tokens = num_text_tokens

    def __call__(self, prompt: str, truncate: bool = False) -> torch.Tensor:
        """Ids of shape (text_seq_len,), int64, in [0, num_text_tokens); 0 after the prompt's end.

        Raises TypeError if `prompt` is not a str; ValueError if it has no tokens, more than `text_seq_len` (which
        `truncate` cuts off instead), or an id that the transformer does not know.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"the prompt must be a str, not {type(prompt).__name__}; encode several one by one")
        ids = self.tokenizer.encode(prompt.lower()) if prompt.strip() else []
        if not ids:
            raise ValueError(f"the prompt {prompt!r} is empty: expected text to draw")
        if len(ids) > self.text_seq_len and not truncate:
            raise ValueError(f"{len(ids)} tokens, {self.text_seq_len} fit: shorten the prompt or pass truncate=True")
        if max(ids) >= self.num_text_tokens:
            raise ValueError(f"id {max(ids)} is not below {self.num_text_tokens}: load the transformer's own tokenizer")
        return torch.tensor(ids[: self.text_seq_len] + [0] * (self.text_seq_len - len(ids)), dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids of shape (n,), without padding (0, `num_text_tokens` and up) and ids that no token has."""
        known = min(self.num_text_tokens, self.tokenizer.vocab_size)
        return self.tokenizer.decode([i for i in map(int, ids) if 0 < i < known])


def _without_padding(ids: Iterable[int], vocab_size: int) -> list[int]:
    kept = [i for i in map(int, ids) if i != 0]
    if any(not 0 < i < vocab_size for i in kept):
        raise ValueError(f"ids from {min(kept)} to {max(kept)} are not all of this tokenizer's, 0 to {vocab_size - 1}")
    return kept


class _YttmTokenizer:
    """youtokentome's `bpe.cpp`; a file lists characters (code point, id), merges (left, right, new id), special ids."""

    def __init__(self, text: str) -> None:
        from tokenizers.models import BPE

        if not re.match(r"\d+ \d+\n", text):
            raise ValueError("it is of no known kind" if text.strip() else "it is empty")
        num_characters, num_merges, *body, self.unknown, pad, bos, eos = map(int, text.split())
        if len(body) != 2 * num_characters + 3 * num_merges:
            raise ValueError(f"its length is not that of {num_characters} characters and {num_merges} merges")
        entries = iter(body)
        tokens = {i: chr(code) for code, i in islice(zip(entries, entries, strict=False), num_characters)}
        self.alphabet = set(tokens.values())
        self.merges: list[tuple[str, str]] = []
        size = 0
        for left, right, new in zip(entries, entries, entries, strict=True):
            self.merges.append((tokens[left], tokens[right]))
            tokens[new] = tokens[left] + tokens[right]
            size += len(tokens[new])
            if len(tokens[new]) > _LONGEST or size > _MOST_BYTES:  # tokens that double would soon fill all memory
                raise ValueError(f"it has tokens of more than {_LONGEST} characters, or too many long ones")
        special = {self.unknown: "<UNK>", pad: "<PAD>", bos: "<BOS>", eos: "<EOS>"}
        self.names = tokens | {i: name for i, name in special.items() if i >= 0}
        self.vocab_size = len(self.names)
        ids = {token: i for i, token in tokens.items()}
        if "▁" not in ids or len(ids) != num_characters + num_merges:
            raise ValueError("its tokens are not all different, or lack the word mark '▁'")
        self.bpe = BPE(ids, self.merges)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        # The whitespace of C's isspace and the word mark itself; str.split would also split at U+00A0 and the like.
        for word in re.findall(r"[^ \t\n\v\f\r▁]+", text):
            # No merge crosses an unknown character, and a run of them is one <UNK>.
            for known, run in groupby("▁" + word, self.alphabet.__contains__):
                ids += [token.id for token in self.bpe.tokenize("".join(run))] if known else [self.unknown]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text = "".join(self.names[i] for i in _without_padding(ids, self.vocab_size))
        return text.replace("▁", " ").removeprefix(" ")

    def to_json(self) -> str:
        from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
        from tokenizers.models import BPE

        # No merge leads to a special token's name, and an id that is no token's takes part in none either.
        vocabulary = {name: i for i, name in self.names.items()}
        if len(vocabulary) != len(self.names):
            raise ValueError("a merge of this youtokentome model has the name of a special token")
        made = Tokenizer(BPE(vocabulary, self.merges, unk_token=self.names[self.unknown], fuse_unk=True))
        # Words stand between spaces with the word mark before each; the mark in a text counts as a space.
        spaces = normalizers.Replace(Regex(r"[ \t\n\x0b\f\r▁]+"), " ")
        made.normalizer = normalizers.Sequence([spaces, normalizers.Replace(Regex("^ | $"), "")])
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
        made.decoder = decoders.Metaspace("▁", prepend_scheme="always")
        return made.to_str()


_PARTS = {  # of a tokenizer of `tokenizers`: the kinds that neither panic nor fetch nor blow a text up
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


def _longest_replacement(charsmap: str) -> int:
    """Bytes of the longest text in sentencepiece's table of replacements: its trie's size, its trie, and those texts,
    each with a zero after it. Raises ValueError for another table.
    """
    table = base64.b64decode(charsmap, validate=True)
    trie = int.from_bytes(table[:4], "little")
    if trie < 4 or trie % 4 or len(table) < 4 + trie:
        raise ValueError("its Precompiled normalizer has a damaged table")
    return max(map(len, table[4 + trie :].split(b"\0")))


def _vetted(text: str) -> str:
    """A tokenizer's JSON without what DALLE-pytorch does not use. Raises ValueError for parts that are a trap."""
    found = json.loads(text)
    growth, lists = 1.0, {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}

    def check(place: str, part: Any) -> None:
        nonlocal growth
        if not isinstance(part, dict):
            raise ValueError(f"its {place} is no object")
        kind = part.get("type", "BPE" if place == "model" else None)
        if kind == "Sequence" and place in lists:
            for inner in part[lists[place]]:
                check(place, inner)
        elif kind not in _PARTS[place]:
            raise ValueError(f"its {place} is a {kind}; expected some of {', '.join(_PARTS[place])}")
        if kind == "Precompiled":  # sentencepiece's, as XLM-R has it
            growth *= max(_longest_replacement(part.get("precompiled_charsmap") or ""), 1)
        added = max(len(part.get(key) or "") for key in ("content", "prepend"))
        if added:  # for so many characters, or, where the pattern may match nothing, beside every one
            pattern = part.get("pattern")
            replaced = len(pattern.get("String") or "") if isinstance(pattern, dict) else 0
            growth *= max(added / replaced, 1) if replaced else 1 + added
        if growth > 64:
            raise ValueError("it makes texts more than 64 times as long")

    for place in _PARTS:
        if found.get(place) is not None or place == "model":
            check(place, found.get(place))
    if found["model"].get("type", "BPE") == "BPE" and found["model"].get("continuing_subword_prefix"):
        raise ValueError("its BPE has a continuing_subword_prefix, which takes characters apart")
    # Ids are cut and padded by the text encoder, and no start or end is added.
    return json.dumps(found | {"truncation": None, "padding": None, "post_processor": None}, ensure_ascii=False)


@contextmanager
def _as_value_error(does: str) -> Iterator[None]:
    """`tokenizers` raises nothing more precise than Exception, and panics as no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer {does} no such text: {' '.join(str(error).split())[:500]}") from error


class _HuggingFaceTokenizer:
    """Any tokenizer of Hugging Face's `tokenizers`, from its JSON."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer

        self.json = _vetted(text)
        self.tokenizer = Tokenizer.from_str(self.json)
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        # DALLE-pytorch replaces the file's post-processor, which may add start and end tokens, by one that adds none.
        with _as_value_error("encodes"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        kept = _without_padding(ids, self.vocab_size)
        with _as_value_error("decodes"):
            return self.tokenizer.decode(kept)

    def to_json(self) -> str:
        return self.json


def _bert_json(vocabulary: str) -> str:
    from tokenizers import BertWordPieceTokenizer

    ids = {token: i for i, token in enumerate(vocabulary.removesuffix("\n").split("\n"))}
    # transformers loads bert-base-chinese, a cased model, with do_lower_case=False, which keeps accents too.
    return BertWordPieceTokenizer(ids, lowercase=False).to_str()


class _ClipTokenizer:
    """CLIP's byte-level BPE, 49408 tokens; open_clip ships the merges."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.bpe = SimpleTokenizer()
        self.vocab_size: int = self.bpe.vocab_size

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in _without_padding(ids, self.vocab_size) if i not in self.bpe.all_special_ids]
        return self.bpe.decode(kept).rstrip()

    def to_json(self) -> str:
        return _CLIP_JSON  # it mends its text with ftfy first, which no file of `tokenizers` can say

"""The tokenizer of DALL·E Mini and Mega, as in min-dalle: BART's byte-level BPE with words split only at spaces."""

from __future__ import annotations

import json
from pathlib import Path

from dall3.text.hugging_face import HuggingFaceTokenizer

WORD_MARK = "Ġ"


def find_merges(vocabulary: Path) -> Path:
    """Path of the merges that belong to a vocabulary: merges_mini.txt in the folder of vocab_mini.json."""
    return vocabulary.with_name(vocabulary.name.replace("vocab", "merges")).with_suffix(".txt")


def merges_of(text: str) -> list[tuple[str, str]]:
    """The pairs of tokens in a list of merges, whose first line is a header. Raises ValueError for another text."""
    lines = [tuple(line.split()) for line in text.split("\n")[1:] if line]
    pairs = [(pair[0], pair[1]) for pair in lines if len(pair) == 2]
    if len(pairs) != len(lines):
        raise ValueError("a line of its merges is not a pair of tokens")
    return pairs


def dalle_mini_tokenizer(vocabulary: str, merges: str) -> HuggingFaceTokenizer:
    """Build the tokenizer from the contents of `vocab.json` and `merges.txt`. The first line of merges is a header.

    Every word starts with the word mark; tokens that the vocabulary lacks become <unk>. Raises ValueError if the
    vocabulary or the merges are damaged.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    ids = json.loads(vocabulary)
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()) or ids.get("<unk>") != 3:
        raise ValueError("its vocabulary is not a JSON object of ids with <unk> as 3")
    made = Tokenizer(BPE(ids, merges_of(merges), unk_token="<unk>"))
    ends = normalizers.Replace(Regex("^ | $"), "")
    made.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" +"), " "), ends])
    made.pre_tokenizer = pre_tokenizers.Metaspace(WORD_MARK, prepend_scheme="always", split=True)
    made.decoder = decoders.Metaspace(WORD_MARK, prepend_scheme="always")
    return HuggingFaceTokenizer(made.to_str())

"""youtokentome's byte-pair encoding: DALLE-pytorch's `--bpe_path` and ruDALL-E's `bpe.model`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby, islice

from dall3.text.tokenizer import MAX_BYTES, MAX_TOKEN, without_padding


class YttmTokenizer:
    """youtokentome's BPE (`bpe.cpp`), from the content of a model file.

    The file lists characters (code point, id), merges (left, right, new id) and the special ids. Raises ValueError for
    a damaged file.
    """

    def __init__(self, text: str) -> None:
        from tokenizers.models import BPE

        if not re.match(r"\d+ \d+\n", text):
            raise ValueError("unknown format" if text.strip() else "it is empty")
        num_characters, num_merges, *body, self.unknown, pad, bos, eos = map(int, text.split())
        if len(body) != 2 * num_characters + 3 * num_merges:
            raise ValueError(f"its length does not match {num_characters} characters and {num_merges} merges")
        entries = iter(body)
        tokens = {i: chr(code) for code, i in islice(zip(entries, entries, strict=False), num_characters)}
        self.alphabet = set(tokens.values())
        self.merges: list[tuple[str, str]] = []
        size = 0
        for left, right, new in zip(entries, entries, entries, strict=True):
            self.merges.append((tokens[left], tokens[right]))
            tokens[new] = tokens[left] + tokens[right]
            size += len(tokens[new])
            if len(tokens[new]) > MAX_TOKEN or size > MAX_BYTES:  # merges can double the length each time
                raise ValueError(f"it has a token of more than {MAX_TOKEN} characters, or too many long tokens")
        special = {self.unknown: "<UNK>", pad: "<PAD>", bos: "<BOS>", eos: "<EOS>"}
        self.names = tokens | {i: name for i, name in special.items() if i >= 0}
        self.vocab_size = len(self.names)
        ids = {token: i for i, token in tokens.items()}
        if "▁" not in ids or len(ids) != num_characters + num_merges:
            raise ValueError("its tokens are not distinct, or do not contain the word mark '▁'")
        self.bpe = BPE(ids, self.merges)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        # Split at the whitespace of C's isspace and at the word mark. str.split would also split at U+00A0.
        for word in re.findall(r"[^ \t\n\v\f\r▁]+", text):
            # No merge crosses an unknown character, and a run of unknown characters becomes one <UNK>.
            for known, run in groupby("▁" + word, self.alphabet.__contains__):
                ids += [token.id for token in self.bpe.tokenize("".join(run))] if known else [self.unknown]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text = "".join(self.names[i] for i in without_padding(ids, self.vocab_size))
        return text.replace("▁", " ").removeprefix(" ")

    def to_json(self) -> str:
        from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
        from tokenizers.models import BPE

        # Special tokens are in the vocabulary for decoding only: no merge produces their names.
        vocabulary = {name: i for i, name in self.names.items()}
        if len(vocabulary) != len(self.names):
            raise ValueError("a merge of this youtokentome model has the name of a special token")
        made = Tokenizer(BPE(vocabulary, self.merges, unk_token=self.names[self.unknown], fuse_unk=True))
        # Words are separated by whitespace and get a word mark in front. A word mark in the text counts as whitespace.
        spaces = normalizers.Replace(Regex(r"[ \t\n\x0b\f\r▁]+"), " ")
        made.normalizer = normalizers.Sequence([spaces, normalizers.Replace(Regex("^ | $"), "")])
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
        made.decoder = decoders.Metaspace("▁", prepend_scheme="always")
        return made.to_str()

"""Train a byte-level BPE tokenizer (arXiv 1508.07909) on the captions of the training data, and list their words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dall3.text.words import WORDS, words_of
from dall3.weights.folder import TOKENIZER

PADDING = "<pad>"  # id 0, the transformer's padding


@dataclass(frozen=True)
class TokenizerConfig:
    """Settings of the tokenizer: the table [tokenizer].

    vocab_size: maximum number of tokens. captions: number of captions that are read. kinds: as in `PoolConfig`.
    replacements: lower-case text to replace everywhere before tokenizing, such as {"gray": "grey"}, for words that the
    captions lack.
    """

    vocab_size: int = 2048
    captions: int = 24_000
    kinds: Mapping[str, float] = field(default_factory=lambda: {"scenes": 1.0})
    replacements: Mapping[str, str] = field(default_factory=dict)


def train_tokenizer(captions: Iterable[str], vocab_size: int, replacements: Mapping[str, str] | None = None) -> str:
    """Train a tokenizer with at most `vocab_size` tokens and return its JSON, in the format of Hugging Face's
    tokenizers.

    Id 0 is padding. Every byte is a token, so that any text can be encoded. replacements: as in `TokenizerConfig`.

    Raises ValueError for a vocabulary smaller than the byte alphabet, and for a replacement of the empty text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size={vocab_size}; expected more than {len(alphabet)}, one for every byte and padding")
    tokenizer = Tokenizer(models.BPE())
    replacements = replacements or {}
    if "" in replacements:
        raise ValueError("replacements: expected some text in place of ''")
    alike = [normalizers.Replace(found, meant) for found, meant in replacements.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *alike])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PADDING], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer.to_str(pretty=True)


def write_tokenizer(folder: Path, captions: Sequence[str], config: TokenizerConfig, more: Iterable[str] = ()) -> None:
    """Train the tokenizer and write it to a pipeline folder, with the list of the captions' words.

    more: further texts, whose words are listed as known because training captions contain them.
    """
    text = train_tokenizer(captions, config.vocab_size, config.replacements)
    folder.mkdir(parents=True, exist_ok=True)
    words = words_of([*captions, *more, *config.replacements], captions)
    for name, content in ((WORDS, words.to_text()), (TOKENIZER, text)):
        new = folder / f".{name}.new"
        new.write_text(content, encoding="utf-8")
        new.replace(folder / name)

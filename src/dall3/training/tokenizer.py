"""Train a byte-level BPE tokenizer (arXiv 1508.07909) on the captions of the training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tqdm.auto import tqdm

from dall3.training.data import Mixture

PADDING = "<pad>"  # id 0, the transformer's padding


def train_tokenizer(captions: Iterable[str], vocab_size: int, replacements: Mapping[str, str] | None = None) -> str:
    """Train a tokenizer with at most `vocab_size` tokens and return its JSON, in the format of Hugging Face's
    tokenizers.

    Id 0 is padding. Every byte is a token, so that any text can be encoded. replacements: lower-case text to replace
    everywhere before tokenizing, such as {"gray": "grey"}, for words that the captions lack.

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


def draw_captions(data: Mixture, count: int) -> Iterator[str]:
    """Yield the captions of the first `count` items."""
    for i in tqdm(range(count), desc="captions"):
        yield data[i][1]

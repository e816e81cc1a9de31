"""A byte-level BPE tokenizer (arXiv 1508.07909) made from the captions of the training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tqdm.auto import tqdm

from dall3.training.data import Mixture

PADDING = "<pad>"  # id 0, as the transformer expects it


def train_tokenizer(captions: Iterable[str], vocab_size: int, replacements: Mapping[str, str] | None = None) -> str:
    """The JSON of a tokenizer of Hugging Face's `tokenizers` with at most `vocab_size` tokens; 0 is padding.

    Every byte is a token, so that no text is unknown. replacements: text, lower case, that is read as other text
    wherever it stands, such as {"gray": "grey"}: a prompt may have a word that the captions have not. Raises ValueError
    for a vocabulary without room for the bytes, and for a replacement of no text.
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
    """The captions of the first `count` items, each drawn when it is asked for, its picture as small as can be."""
    for i in tqdm(range(count), desc="captions"):
        yield data[i][1]

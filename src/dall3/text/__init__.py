"""Text encoding: one file per tokenizer family, `rules` for lengths, padding and special ids, `load` for files."""

from dall3.text.load import check_tokenizer_file, load_text_encoder, load_tokenizer, tokenizer_json
from dall3.text.rules import DalleMiniTextEncoder, RudalleTextEncoder, TextEncoder, text_encoder_of
from dall3.text.tokenizer import Tokenizer
from dall3.text.words import WORDS, KnownWords, read_words

__all__ = [
    "WORDS",
    "DalleMiniTextEncoder",
    "KnownWords",
    "RudalleTextEncoder",
    "TextEncoder",
    "Tokenizer",
    "check_tokenizer_file",
    "load_text_encoder",
    "load_tokenizer",
    "read_words",
    "text_encoder_of",
    "tokenizer_json",
]

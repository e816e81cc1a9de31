"""Tokenizers and text encoders from files."""

from __future__ import annotations

import json
from pathlib import Path

from dall3.text.clip import CLIP_JSON, ClipTokenizer
from dall3.text.dalle_mini import dalle_mini_tokenizer, merges_beside, merges_of
from dall3.text.hugging_face import HuggingFaceTokenizer, bert_json
from dall3.text.rules import TextEncoder, check_kind, text_encoder_of
from dall3.text.tokenizer import MOST_BYTES, Tokenizer
from dall3.text.yttm import YttmTokenizer

EXPECTED = "expected the youtokentome, tokenizers JSON or BERT vocab.txt file that the checkpoint was trained with"
TokenizerPath = str | Path | tuple[str | Path, str | Path]


def load_text_encoder(
    path: TokenizerPath | None,
    kind: str = "dalle-pytorch",
    text_seq_len: int | None = None,
    num_text_tokens: int | None = None,
) -> TextEncoder:
    """Load a tokenizer with the rules of a family of transformers: what encodes its prompts.

    path: as `load_tokenizer` takes it; of "dalle-mini" also the folder of its two files. kind: "dalle-pytorch",
    "dalle-mini" (Mini and Mega) or "rudalle". text_seq_len: ids of a prompt, by default 256, 64 or 128.
    num_text_tokens: ids that the transformer knows, by default all of the tokenizer.

    Raises FileNotFoundError where there is no file, ValueError for one that is not a tokenizer or another kind.

    >>> encode = load_text_encoder("bpe.model", kind="rudalle")  # doctest: +SKIP
    >>> encode("кот")  # doctest: +SKIP
    """
    check_kind(kind)
    if kind == "dalle-mini" and isinstance(path, str | Path) and Path(path).is_dir():
        path = vocabulary_in(Path(path))
    return text_encoder_of(kind, load_tokenizer(path), text_seq_len, num_text_tokens)


def vocabulary_in(folder: Path) -> Path:
    found = [path for path in sorted(folder.glob("vocab*.json")) if merges_beside(path).is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder}: expected one vocab*.json with its merges*.txt, found {names}; give a file")
    return found[0]


def load_tokenizer(path: TokenizerPath | None = None) -> Tokenizer:
    """The tokenizer in a file, its kind told by the content; without a file CLIP's own, DALLE-pytorch's default.

    The kinds are DALLE-pytorch's: a youtokentome model (ruDALL-E's too), a JSON file of Hugging Face's `tokenizers`
    (`--hug`), the `vocab.txt` of bert-base-chinese (`--chinese`); and DALL·E Mini's `vocab.json` with its `merges.txt`
    beside it, or both as a pair. Raises FileNotFoundError or IsADirectoryError where there is no file, ValueError for
    one that is empty, damaged or of another kind.
    """
    if path is None:
        return ClipTokenizer()
    path, merges = (Path(path[0]), Path(path[1])) if isinstance(path, tuple | list) else (Path(path), None)
    text = read_text(path)
    try:
        if text.strip() == CLIP_JSON:
            return ClipTokenizer()
        if merges is not None or is_vocabulary(text):
            return dalle_mini_tokenizer(text, read_text(merges or merges_beside(path)))
        if text.startswith("{"):
            return HuggingFaceTokenizer(text)
        if "[UNK]" in text.split("\n"):
            return HuggingFaceTokenizer(bert_json(text))
        return YttmTokenizer(text)
    except OSError:
        raise
    except BaseException as error:  # tokenizers raises nothing more precise, and panics as no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise damaged(path, error) from error


def check_tokenizer_file(path: Path) -> None:
    """Raise ValueError for a file that is neither a tokenizer nor one of the two that DALL·E Mini's consists of."""
    text = read_text(path)
    if text.startswith("#version"):  # the header of a list of merges
        merges_of(text)
    elif not is_vocabulary(text):
        load_tokenizer(path)


def read_text(path: Path) -> str:
    if not path.is_file():
        problem = IsADirectoryError if path.is_dir() else FileNotFoundError
        raise problem(f"{path} is not a file; {EXPECTED}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is {path.stat().st_size:,} bytes large, which no tokenizer is; {EXPECTED}")
    with path.open(encoding="utf-8-sig") as file:
        try:
            return "".join(file)  # by lines: a checkpoint, given by mistake, fails within its first bytes
        except UnicodeDecodeError as error:
            raise damaged(path, error) from None


def damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path} is damaged or not a tokenizer ({' '.join(str(error).split())[:500]}); {EXPECTED}")


def is_vocabulary(text: str) -> bool:
    """Whether a text is the vocabulary alone of a tokenizer: an object with an id for <s>."""
    found = json.loads(text) if text.startswith("{") and '"<s>"' in text else None
    return isinstance(found, dict) and type(found.get("<s>")) is int


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """A tokenizer of any kind that `load_tokenizer` knows as the text of a JSON file, which it reads again.

    Raises ValueError for a tokenizer of another kind.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer | YttmTokenizer | ClipTokenizer):
        raise ValueError(f"a {type(tokenizer).__name__} has no JSON; expected a tokenizer of load_tokenizer")
    return tokenizer.to_json()

"""Loading of tokenizers and text encoders from files."""

from __future__ import annotations

import json
from pathlib import Path

from dall3.text.clip import CLIP_JSON, ClipTokenizer
from dall3.text.dalle_mini import dalle_mini_tokenizer, find_merges, merges_of
from dall3.text.hugging_face import HuggingFaceTokenizer, bert_json
from dall3.text.rules import TextEncoder, check_kind, text_encoder_of
from dall3.text.tokenizer import MAX_BYTES, Tokenizer
from dall3.text.yttm import YttmTokenizer

EXPECTED = "expected the youtokentome, tokenizers JSON or BERT vocab.txt file that the checkpoint was trained with"
TokenizerPath = str | Path | tuple[str | Path, str | Path]


def load_text_encoder(
    path: TokenizerPath | None,
    kind: str = "dalle-pytorch",
    text_seq_len: int | None = None,
    num_text_tokens: int | None = None,
) -> TextEncoder:
    """Load the text encoder of a family of transformers: a tokenizer with the family's rules for prompts.

    path: as for `load_tokenizer`; for "dalle-mini" also the folder of its two files. kind: "dalle-pytorch",
    "dalle-mini" (Mini and Mega) or "rudalle". text_seq_len: length of the encoded prompt; by default 256, 64 or 128.
    num_text_tokens: size of the transformer's text vocabulary; by default that of the tokenizer.

    Raises FileNotFoundError if there is no such file; ValueError for a file that is not a tokenizer, and for an unknown
    kind.

    >>> encode = load_text_encoder("bpe.model", kind="rudalle")  # doctest: +SKIP
    >>> encode("кот").shape  # doctest: +SKIP
    torch.Size([128])
    """
    check_kind(kind)
    if kind == "dalle-mini" and isinstance(path, str | Path) and Path(path).is_dir():
        path = find_vocabulary(Path(path))
    return text_encoder_of(kind, load_tokenizer(path), text_seq_len, num_text_tokens)


def find_vocabulary(folder: Path) -> Path:
    """Path of the vocabulary of DALL·E Mini in a folder. Raises FileNotFoundError if there is none, or several."""
    found = [path for path in sorted(folder.glob("vocab*.json")) if find_merges(path).is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder}: expected one vocab*.json with its merges*.txt, found {names}; pass a file")
    return found[0]


def load_tokenizer(path: TokenizerPath | None = None) -> Tokenizer:
    """Load a tokenizer from a file; the content decides its type. Without a path, return CLIP's tokenizer.

    path: a youtokentome model (DALLE-pytorch's `--bpe_path`, ruDALL-E), a JSON file of Hugging Face's `tokenizers`
    (`--hug`), the `vocab.txt` of bert-base-chinese (`--chinese`), or DALL·E Mini's `vocab.json` with its `merges.txt`
    in the same folder. A pair (vocab, merges) gives both files of DALL·E Mini.

    Raises FileNotFoundError or IsADirectoryError if there is no such file; ValueError for a file that is empty, damaged
    or not a tokenizer.

    >>> tokenizer = load_tokenizer()
    >>> tokenizer.decode(tokenizer.encode("a red cube"))
    'a red cube'
    """
    if path is None:
        return ClipTokenizer()
    path, merges = (Path(path[0]), Path(path[1])) if isinstance(path, tuple | list) else (Path(path), None)
    text = read_text(path)
    try:
        if text.strip() == CLIP_JSON:
            return ClipTokenizer()
        if merges is not None or is_vocabulary(text):
            return dalle_mini_tokenizer(text, read_text(merges or find_merges(path)))
        if text.startswith("{"):
            return HuggingFaceTokenizer(text)
        if "[UNK]" in text.split("\n"):
            return HuggingFaceTokenizer(bert_json(text))
        return YttmTokenizer(text)
    except OSError:
        raise
    except BaseException as error:  # `tokenizers` raises plain Exception, and PanicException on a panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise damaged_error(path, error) from error


def check_tokenizer_file(path: Path) -> None:
    """Raise ValueError for a file that is not a tokenizer, nor one of the two files of DALL·E Mini's tokenizer."""
    text = read_text(path)
    if text.startswith("#version"):  # the header of a list of merges
        merges_of(text)
    elif not is_vocabulary(text):
        load_tokenizer(path)


def read_text(path: Path) -> str:
    """Read a file as UTF-8 text. Raises the errors of `load_tokenizer`."""
    if not path.is_file():
        problem = IsADirectoryError if path.is_dir() else FileNotFoundError
        raise problem(f"{path} is not a file; {EXPECTED}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for a tokenizer; {EXPECTED}")
    with path.open(encoding="utf-8-sig") as file:
        try:
            return "".join(file)  # line by line, so that a checkpoint given by mistake fails at once
        except UnicodeDecodeError as error:
            raise damaged_error(path, error) from None


def damaged_error(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path} is damaged or not a tokenizer ({' '.join(str(error).split())[:500]}); {EXPECTED}")


def is_vocabulary(text: str) -> bool:
    """Whether a text is a bare vocabulary, as DALL·E Mini's: a JSON object with an id for <s>."""
    found = json.loads(text) if text.startswith("{") and '"<s>"' in text else None
    return isinstance(found, dict) and type(found.get("<s>")) is int


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Serialise a tokenizer as JSON that `load_tokenizer` reads.

    Raises ValueError for a tokenizer that `load_tokenizer` did not make.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer | YttmTokenizer | ClipTokenizer):
        raise ValueError(f"a {type(tokenizer).__name__} cannot be saved; expected a tokenizer of load_tokenizer")
    return tokenizer.to_json()

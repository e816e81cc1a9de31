"""Reading a file of prompts, and the random seed of every prompt."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dall3.errors import require

SURROGATE = re.compile("[\ud800-\udfff]")  # lone surrogates: JSON can contain them, but they cannot be encoded


class Prompt(NamedTuple):
    """One prompt: its number from 0, its text, and its random seed."""

    number: int
    text: str
    seed: int


def prompt_seed(seed: int, number: int) -> int:
    """The random seed of a prompt, in [0, 2**63). It depends on the run's seed and the prompt's number alone.

    >>> prompt_seed(0, 7) == prompt_seed(0, 7), prompt_seed(0, 7) == prompt_seed(7, 0)
    (True, False)
    """
    state = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def read_prompts(source: str | Path | Sequence[str], seed: int = 0) -> list[Prompt]:
    """Read the prompts of a file or a list of texts, in order. A prompt's number is that of its line, from 0.

    A .txt holds one prompt per line. A .csv, .jsonl or .parquet holds them in the column "prompt". Its optional column
    "seed", integers in [0, 2**63), replaces the seeds that follow from `seed`, the run's.

    Raises ValueError for a file of another kind, without the column "prompt", or with a prompt that is not Unicode
    text.

    >>> [prompt.text for prompt in read_prompts(["a cube", "a cloud"])]
    ['a cube', 'a cloud']
    """
    if isinstance(source, str | Path):
        kind = Path(source).suffix.lower()
        known = ", ".join(READERS)
        require(kind in READERS, f"{source}: unknown kind of file; expected one of {known}")
        try:
            rows, place = list(READERS[kind](Path(source).read_bytes())), str(source)
        except (ValueError, KeyError, RecursionError, csv.Error) as error:
            raise ValueError(f"{source}: not a {kind} with a column 'prompt' ({error})") from None
    else:
        rows, place = [(text, None) for text in source], "prompts"
    require(bool(rows), f"{place}: holds no prompt; expected at least one")
    found = []
    for number, (text, given) in enumerate(rows):
        text = "" if text is None else text  # an empty cell is an empty prompt, which is recorded as a failure
        where = f"{place}, prompt {number}"
        require(isinstance(text, str), f"{where}: the prompt is {type(text).__name__}; expected text")
        broken = SURROGATE.search(text)
        require(
            broken is None, f"{where}: contains the lone surrogate {broken and ascii(broken[0])}; expected Unicode text"
        )
        whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
        valid = given is None or (whole and 0 <= given < 2**63)
        require(bool(valid), f"{where}: seed={given!r}; expected an integer in [0, 2**63), or an empty field")
        found.append(Prompt(number, text, prompt_seed(seed, number) if given is None else int(given)))
    return found


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the texts and the seeds, 16 hexadecimal digits."""
    text = json.dumps([(prompt.text, prompt.seed) for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Row = tuple[Any, Any]  # a prompt and its seed, unvalidated


def read_txt(data: bytes) -> Iterable[Row]:
    return [(line.removesuffix("\r"), None) for line in text_lines(data)]


def read_csv(data: bytes) -> Iterable[Row]:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    require("prompt" in (reader.fieldnames or ()), f"its columns are {', '.join(reader.fieldnames or ())}")
    for row in reader:
        given = row.get("seed")
        yield row["prompt"], int(given) if given else None


def read_jsonl(data: bytes) -> Iterable[Row]:
    for i, line in enumerate(text_lines(data)):
        row = json.loads(line) if line.strip() else {"prompt": ""}
        require(isinstance(row, dict) and "prompt" in row, f"line {i + 1} is not an object with a 'prompt'")
        yield row["prompt"], row.get("seed")


def read_parquet(data: bytes) -> Iterable[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(data))
    require("prompt" in table.column_names, f"its columns are {', '.join(table.column_names)}")
    seeds = table["seed"].to_pylist() if "seed" in table.column_names else [None] * len(table)
    return zip(table["prompt"].to_pylist(), seeds, strict=True)


def text_lines(data: bytes) -> list[str]:
    lines = data.decode("utf-8-sig").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


READERS: dict[str, Callable[[bytes], Iterable[Row]]] = {
    ".txt": read_txt,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}

"""The output folder of a run: webdataset shards, a Parquet index, and the state that resuming needs.

manifest.json           the settings; a resumed run must have the same
prompts/00000012.tar    a finished prompt of a shard that is not complete yet
pictures-000000.tar     a shard: the images of `prompts_per_shard` prompts, in order
index/000000.parquet    the shard's rows of the index; written after the shard, it marks the shard as done
index.parquet           all rows, written at the end

Every file is written atomically, so a run may be killed at any moment. Prompts without a complete file are drawn again.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from dall3.batch.prompts import Prompt
from dall3.errors import require
from dall3.tar import read_members

logger = logging.getLogger(__name__)

# Names of the files of a prompt, a shard and a part of the index, each with its number.
PROMPT, SHARD, PART = r"(\d{8})\.tar", r"pictures-(\d{6})\.tar", r"(\d{6})\.parquet"
SHARD_SIZE = b"shard bytes"  # key of the metadata of a part of the index: size of the shard in bytes

SCHEMA = pa.schema(
    {
        "number": pa.int64(),  # of the prompt
        "prompt": pa.string(),
        "seed": pa.int64(),
        "place": pa.int32(),  # rank of the image among the prompt's, best first from 0; null if the prompt failed
        "candidate": pa.int32(),  # the candidate's number
        "score": pa.float32(),  # CLIP's cosine similarity; null without CLIP
        "tokens": pa.list_(pa.int32()),
        "file": pa.string(),  # the shard
        "key": pa.string(),  # the image's name in the shard, before the first dot
        "recipe": pa.string(),  # JSON: the settings; the rest of the PNG's recipe is in the columns above
        "error": pa.string(),  # why the prompt failed; null if it did not
        "retry": pa.bool_(),  # whether a resumed run tries it again
    }
)


class Store:
    """The folder of a new or a resumed run. Files that are missing or damaged are made again.

    Raises ValueError if the folder holds a run with other settings or files of something else, or if another run is
    using it.
    """

    def __init__(
        self, folder: str | Path, prompts: Sequence[Prompt], settings: dict[str, Any], prompts_per_shard: int
    ) -> None:
        self.folder, self.prompts, self.per_shard = Path(folder), prompts, prompts_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / "lock")
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f"another run is using {folder}; wait for its end, or choose another folder") from None
        try:
            wanted = settings | {"prompts_per_shard": prompts_per_shard}
            self._check(self.folder / "manifest.json", json.loads(json.dumps(wanted)))
            for part in ("prompts", "index"):
                (self.folder / part).mkdir(exist_ok=True)
            self._remove_unfinished()
            self._find()
        except BaseException:
            self.lock.release()
            raise

    def _check(self, manifest: Path, wanted: dict[str, Any]) -> None:
        if not manifest.exists():
            others = {path.name for path in self.folder.iterdir()} - {"lock", "manifest.json.tmp"}
            require(not others, f"{self.folder} holds other files ({', '.join(sorted(others)[:3])}); choose another")
            write_whole(manifest, lambda file: file.write((json.dumps(wanted, indent=2) + "\n").encode()))
            return
        try:
            before = json.loads(manifest.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{manifest} is damaged ({error}); choose another folder") from None
        require(isinstance(before, dict), f"{manifest} is damaged: it holds no settings; choose another folder")
        there, here = flatten(before), flatten(wanted)
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        differences = "; ".join(f"{name} was {there.get(name)!r}, now {here.get(name)!r}" for name in names[:5])
        advice = "Use the same settings, or another folder"
        require(not names, f"{self.folder} holds a run with other settings: {differences}. {advice}")

    def _remove_unfinished(self) -> None:
        """Remove the temporary files that `write_whole` left in a killed run, and no others."""
        for folder, names in (
            (self.folder, rf"manifest\.json|index\.parquet|{SHARD}"),
            (self.folder / "prompts", PROMPT),
            (self.folder / "index", PART),
        ):
            for path in folder.glob("*.tmp"):
                if re.fullmatch(rf"({names})\.tmp", path.name) and path.is_file():
                    path.unlink()

    def _numbered(self, folder: str, pattern: str, count: int) -> dict[int, Path]:
        """The files of a folder by their numbers. Raises ValueError for a file that this run did not write."""
        found = {}
        for path in sorted((self.folder / folder).iterdir()):
            match = re.fullmatch(pattern, path.name)
            belongs = match is not None and int(match[1]) < count and path.is_file()
            require(
                belongs or path.suffix not in (".tar", ".parquet"), f"{path} is not a file of this run; move it away"
            )
            if match is not None and belongs:
                found[int(match[1])] = path
        return found

    def _find(self) -> None:
        """Find the finished shards and prompts.

        A prompt is drawn again if its failure may have been temporary, or if its files are missing or damaged.
        """
        shards = self._numbered("index", PART, -(-len(self.prompts) // self.per_shard))
        for shard, part in list(shards.items()):
            size, retry = read_part(part)
            path = self._shard_path(shard)
            if size is None or not path.is_file() or path.stat().st_size != size:
                logger.warning("%s is missing or damaged; drawing its prompts again", path if size else part)
                shards.pop(shard).unlink()
            elif retry:
                self._split_shard(shard)
                shards.pop(shard).unlink()
        saved = self._numbered("prompts", PROMPT, len(self.prompts))
        for number, path in list(saved.items()):
            if number // self.per_shard in shards:
                # The run ended after the shard's index was written and before this file was removed.
                saved.pop(number).unlink()
            elif not is_complete_tar(path):
                logger.warning("%s is damaged; drawing its prompt again", path)
                saved.pop(number).unlink()
        self.shards, self.saved = set(shards), set(saved)
        self.failed: dict[int, tuple[str, bool]] = {}
        for shard in sorted({number // self.per_shard for number in self.saved}):
            if self._is_whole(shard):
                self._finish_shard(shard)

    def is_done(self, number: int) -> bool:
        return number // self.per_shard in self.shards or number in self.saved or number in self.failed

    def add(self, number: int, files: bytes, error: str, retry: bool) -> None:
        """Store the result of a prompt. Images are in a file when this returns; failures are written with their shard.

        The file of a prompt is not flushed, which takes longer than all else here. If a power failure damages it, the
        resumed run makes it again.
        """
        if self.is_done(number):
            return
        if error:
            self.failed[number] = (error.encode(errors="backslashreplace").decode(), retry)
        else:
            write_whole(self._path(number), lambda file: file.write(files), flush=False)
            self.saved.add(number)
        shard = number // self.per_shard
        if self._is_whole(shard) and not any(self.failed.get(n, ("", False))[1] for n in self._numbers(shard)):
            self._finish_shard(shard)

    def finish(self) -> Path:
        """Write the shards that are incomplete because of failures, and the whole index. Returns the index's path."""
        for shard in {number // self.per_shard for number in {*self.saved, *self.failed}}:
            self._finish_shard(shard)
        parts, index = sorted((self.folder / "index").glob("*.parquet")), self.folder / "index.parquet"

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part, schema=SCHEMA))

        write_whole(index, write)
        return index

    def failures(self) -> dict[int, str]:
        """The reasons why prompts failed, by the prompt's number, from the index."""
        rows = pq.read_table(self.folder / "index.parquet", columns=["number", "error"]).to_pylist()
        return {row["number"]: row["error"] for row in rows if row["error"] is not None}

    def close(self) -> None:
        self.lock.release()

    def _path(self, number: int) -> Path:
        return self.folder / "prompts" / f"{number:08}.tar"

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"pictures-{shard:06}.tar"

    def _numbers(self, shard: int) -> range:
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, len(self.prompts)))

    def _is_whole(self, shard: int) -> bool:
        return shard not in self.shards and all(self.is_done(number) for number in self._numbers(shard))

    def _finish_shard(self, shard: int) -> None:
        numbers, path, rows = self._numbers(shard), self._shard_path(shard), []

        def write(file: BinaryIO) -> None:
            for number in numbers:
                if number in self.failed:
                    rows.append(self._failure(number))
                    continue
                data, end = self._path(number).read_bytes(), 0
                with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                    for member in tar:
                        content = data[member.offset_data : member.offset_data + member.size]
                        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                        if member.name.endswith(".json"):
                            rows.append(index_row(json.loads(content), path.name, member.name.partition(".")[0]))
                file.write(data[:end])  # the members, without the end of the archive
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))

        write_whole(path, write)
        size = str(path.stat().st_size).encode()
        table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({SHARD_SIZE: size}))
        part = self.folder / "index" / f"{shard:06}.parquet"
        write_whole(part, lambda file: pq.write_table(table, file, compression="zstd"))
        self.shards.add(shard)
        for number in numbers:
            self._path(number).unlink(missing_ok=True)
            self.saved.discard(number)
            self.failed.pop(number, None)

    def _split_shard(self, shard: int) -> None:
        """Split a shard into the tars of its prompts, as they were before; failed prompts have none."""
        with tarfile.open(self._shard_path(shard)) as tar:
            for number, members in groupby(tar, key=lambda member: int(member.name.partition("-")[0])):
                buffer = io.BytesIO()
                with tarfile.open(fileobj=buffer, mode="w") as one:
                    for member in members:
                        one.addfile(member, tar.extractfile(member))
                data = buffer.getvalue()
                write_whole(self._path(number), lambda file, data=data: file.write(data))  # type: ignore[misc]

    def _failure(self, number: int) -> dict[str, Any]:
        (error, retry), prompt = self.failed[number], self.prompts[number]
        return {"number": number, "prompt": prompt.text, "seed": prompt.seed, "error": error, "retry": retry}


def read_part(path: Path) -> tuple[int | None, bool]:
    """Read a part of the index: the size of its shard in bytes, None if the part is damaged; and whether the next run
    tries one of its failed prompts again.
    """
    try:
        rows = pq.read_table(path, columns=["retry"])
        return int((rows.schema.metadata or {})[SHARD_SIZE]), any(rows["retry"].to_pylist())
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None, False


def is_complete_tar(path: Path) -> bool:
    """Whether a prompt's tar is complete and not empty."""
    try:
        members, whole = read_members(path)
    except ValueError:
        return False
    return whole and bool(members)


def index_row(recipe: dict[str, Any], file: str, key: str) -> dict[str, Any]:
    """The row of an image in the index. file: name of its shard. key: name of the image in the shard."""
    settings = recipe["settings"]
    columns = {name: recipe[name] for name in ("number", "prompt", "place", "candidate", "tokens")}
    return columns | {
        "seed": settings["seed"],
        "score": recipe["clip_score"],
        "file": file,
        "key": key,
        "recipe": json.dumps({"settings": settings}),
        "retry": False,
    }


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def write_whole(path: Path, write: Callable[[BinaryIO], Any], flush: bool = True) -> None:
    """Write a file atomically. flush: also flush it to disk, so that it survives a power failure."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if not flush:
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

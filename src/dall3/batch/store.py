"""The folder that a run writes: webdataset shards, a Parquet index, and what a run that goes on needs to know.

manifest.json           the settings, which a run that goes on must have too
prompts/00000012.tar    prompts that are done, of shards that are not whole yet
pictures-000000.tar     a shard: the pictures of so many prompts, in order
index/000000.parquet    its rows of the index, written after it: with this file the shard is done
index.parquet           all rows, at the end

A file appears whole or not at all, so that a run may end at any moment: prompts without a file are done again.
"""

from __future__ import annotations

import io
import json
import os
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

SCHEMA = pa.schema(
    {
        "number": pa.int64(),  # of the prompt
        "prompt": pa.string(),
        "seed": pa.int64(),
        "place": pa.int32(),  # of the picture among the prompt's, best first; null where the prompt failed
        "candidate": pa.int32(),  # the number of the draw
        "score": pa.float32(),  # CLIP's cosine similarity; null without CLIP
        "tokens": pa.list_(pa.int32()),
        "file": pa.string(),  # the shard
        "key": pa.string(),  # the picture's name in it, before the first dot
        "recipe": pa.string(),  # JSON: with the columns above what the PNG carries
        "error": pa.string(),  # why the prompt failed; null where it did not
        "retry": pa.bool_(),  # whether a run that goes on tries it again
    }
)


class Store:
    """A run's folder, made or gone on with. Raises ValueError where it holds a run with other settings, or a run is at
    work in it.
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
            raise ValueError(f"another run is at work in {folder}; let it end, or give another folder") from None
        try:
            wanted = settings | {"prompts_per_shard": prompts_per_shard}
            self._check(self.folder / "manifest.json", json.loads(json.dumps(wanted)))
            for part in ("prompts", "index"):
                (self.folder / part).mkdir(exist_ok=True)
            for unfinished in self.folder.rglob("*.tmp"):
                unfinished.unlink()
            self._find()
        except BaseException:
            self.lock.release()
            raise

    def _check(self, manifest: Path, wanted: dict[str, Any]) -> None:
        if not manifest.exists():
            own = {"lock", "manifest.json.tmp"}
            others = [path.name for path in self.folder.iterdir() if path.name not in own]
            require(not others, f"{self.folder} holds {', '.join(others[:3])} but no batch; give another folder")
            write_whole(manifest, lambda file: file.write((json.dumps(wanted, indent=2) + "\n").encode()))
            return
        there, here = flatten(json.loads(manifest.read_text("utf-8"))), flatten(wanted)
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        differences = "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in names[:5])
        require(not names, f"{self.folder} holds a run with other settings: {differences}. Give them, or another --out")

    def _find(self) -> None:
        """What is done. Prompts that failed for a reason that may have passed are to be done again."""
        shards = {int(path.stem): path for path in (self.folder / "index").glob("*.parquet")}
        for shard in sorted(shards):
            rows = pq.read_table(shards[shard], columns=["retry"])
            if any(rows["retry"].to_pylist()):
                self._take_apart(shard)
                shards.pop(shard).unlink()
        saved = {int(path.stem): path for path in (self.folder / "prompts").glob("*.tar")}
        for number in [number for number in saved if number // self.per_shard in shards]:
            saved.pop(number).unlink()  # the run ended between the shard's index and this
        self.shards, self.saved = set(shards), set(saved)
        self.failed: dict[int, tuple[str, bool]] = {}
        for shard in sorted({number // self.per_shard for number in self.saved}):
            if self._is_whole(shard):
                self._finish_shard(shard)

    def is_done(self, number: int) -> bool:
        return number // self.per_shard in self.shards or number in self.saved or number in self.failed

    def add(self, number: int, files: bytes, error: str, retry: bool) -> None:
        """Keep what came of a prompt: on disk when this returns, but for a failure, which is found again."""
        if self.is_done(number):
            return
        if error:
            self.failed[number] = (error, retry)
        else:
            write_whole(self._path(number), lambda file: file.write(files))
            self.saved.add(number)
        shard = number // self.per_shard
        if self._is_whole(shard) and not any(self.failed.get(n, ("", False))[1] for n in self._numbers(shard)):
            self._finish_shard(shard)

    def finish(self) -> Path:
        """Write the shards that only failures kept open, and the index of all. Returns the index's path."""
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
        """Why prompts failed, by their number, as the index has it."""
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
            with tarfile.open(fileobj=file, mode="w") as tar:
                for number in numbers:
                    if number in self.failed:
                        rows.append(self._failure(number))
                        continue
                    with tarfile.open(self._path(number)) as files:
                        for member in files:
                            content = files.extractfile(member)
                            assert content is not None
                            data = content.read()
                            tar.addfile(member, io.BytesIO(data))
                            if member.name.endswith(".json"):
                                rows.append(index_row(json.loads(data), path.name, member.name.partition(".")[0]))

        write_whole(path, write)
        table = pa.Table.from_pylist(rows, SCHEMA)
        part = self.folder / "index" / f"{shard:06}.parquet"
        write_whole(part, lambda file: pq.write_table(table, file, compression="zstd"))
        self.shards.add(shard)
        for number in numbers:
            self._path(number).unlink(missing_ok=True)
            self.saved.discard(number)
            self.failed.pop(number, None)

    def _take_apart(self, shard: int) -> None:
        """A shard's prompts, each as it was before they were put together; failed ones have none."""
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


def index_row(recipe: dict[str, Any], file: str, key: str) -> dict[str, Any]:
    settings = recipe["settings"]
    same = {name: recipe[name] for name in ("number", "prompt", "place", "candidate", "tokens")}
    return same | {
        "seed": settings["seed"],
        "score": recipe["clip_score"],
        "file": file,
        "key": key,
        "recipe": json.dumps({"settings": settings}),
        "retry": False,
    }


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by one name each."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file that is there whole, and on disk, or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

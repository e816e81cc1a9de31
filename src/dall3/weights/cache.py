"""The cache of downloaded weights: the location, the expected hash and the download state of each file.

The cache is the folder `DALL3_HOME`, or `dall3` in the user's cache folder; nothing is written outside of it. With
`DALL3_OFFLINE=1`, nothing is downloaded. For a file x, x.json holds its pins: the SHA-256 that it had when it was first
downloaded and must have from then on. During a download, x.part holds the partial file and x.part.json its source.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dall3.errors import FetchError
from dall3.weights.registry import File, Part, Place, WeightsSet

SAME = "every place that holds the same bytes"  # key of the pin that all places with the same content share


@dataclass(frozen=True)
class Pins:
    """The verified state of a file in the cache.

    sha256, size, mtime_ns: hash, size in bytes and modification time when the file was last verified; the file counts
    as unchanged while size and time are the same. hashes: the SHA-256 of the first download from each place; the keys
    are those of `pin_key`.
    """

    sha256: str = ""
    size: int = -1
    mtime_ns: int = -1
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedFile:
    """A file of a set of weights, and its location in the cache."""

    weights: WeightsSet
    part: Part
    file: File

    @property
    def name(self) -> str:
        return f"{self.part.cache_folder}/{self.file.name}"

    @property
    def target(self) -> Path:
        return cache_dir() / self.part.cache_folder / self.file.name

    @property
    def pins_path(self) -> Path:
        return with_suffix_added(self.target, ".json")

    @property
    def pins(self) -> Pins:
        """The stored pins; empty if there are none or they cannot be read."""
        try:
            found = Pins(**json.loads(self.pins_path.read_text(encoding="utf-8")))
            return found if isinstance(found.hashes, dict) else Pins()
        except (OSError, ValueError, TypeError):
            return Pins()

    def set_pin(self, sha256: str, key: str, status: os.stat_result) -> None:
        """Store the hash of the file. key: the `pin_key` of its place. status: from stat() before it was hashed."""
        hashes = {key: sha256} | self.pins.hashes
        make_folder(self.target.parent)
        write_json(self.pins_path, asdict(Pins(sha256, status.st_size, status.st_mtime_ns, hashes)))

    def find(self) -> Path | None:
        """Path of the file on this machine: at one of its places on disk, else in the cache, else None."""
        on_disk = (place.path for place in self.file.places if place.path is not None)
        return next((path for path in (*on_disk, self.target) if path.is_file()), None)

    def sha256_at(self, place: Place) -> str | None:
        """Expected hash of the file at a place: from weights.toml, else from the pins; None if it is unknown."""
        return place.sha256 or self.pins.hashes.get(pin_key(place))


def pin_key(place: Place) -> str:
    """Key of the pin of a place: its URL, or `SAME` if its file is that of the other places."""
    return place.url if place.own_content else SAME


def cache_dir() -> Path:
    """The cache: `DALL3_HOME`, or `dall3` in the user's cache folder."""
    return Path(os.environ.get("DALL3_HOME") or default_cache_dir()).absolute()


def default_cache_dir() -> Path:
    """`dall3` in the user's cache folder, as is customary on the operating system."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "dall3" / "dall3" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/dall3"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dall3"


def make_folder(folder: Path) -> None:
    """Create a folder of the cache with its parents. Raises FetchError if it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"{folder} cannot be created ({short_message(error)}); set DALL3_HOME to a writable folder"
        ) from None


def offline() -> bool:
    """Whether the environment variable DALL3_OFFLINE forbids downloads."""
    return os.environ.get("DALL3_OFFLINE", "").lower() not in ("", "0", "false", "no")


def with_suffix_added(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    new = with_suffix_added(path, f".{os.getpid()}-{threading.get_ident()}")
    new.write_text(json.dumps(value), encoding="utf-8")
    os.replace(new, path)


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def files_of(weights: WeightsSet) -> list[CachedFile]:
    return [CachedFile(weights, part, file) for part in weights.parts for file in part.files]


def delete_partial(partial: Path) -> None:
    """Delete a partial download and its state file."""
    for path in (partial, with_suffix_added(partial, ".json")):
        path.unlink(missing_ok=True)


def offline_message(wanted: CachedFile, problem: str) -> str:
    return f"{wanted.name} {problem}, and DALL3_OFFLINE is set; unset it, or put a copy at {wanted.target}"


def read_partial_state(partial: Path) -> dict[str, Any]:
    """Read the state file of a partial download; empty if there is none or it cannot be read."""
    try:
        state = json.loads(with_suffix_added(partial, ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def short_message(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters, or the name of its class."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def file_size(wanted: CachedFile) -> int:
    """The size of a file in bytes: of the one that is here, else as weights.toml states it, 0 if unknown."""
    path = wanted.find()
    return path.stat().st_size if path else max((place.size or 0 for place in wanted.file.places), default=0)

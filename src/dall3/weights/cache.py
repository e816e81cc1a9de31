"""The cache of fetched weights: where a file of a set is, what it must be, and what is known of it.

The cache is the folder `DALL3_HOME`, or `dall3` in the user's cache folder; nothing is written outside of it. With
`DALL3_OFFLINE=1` nothing is fetched. A file x has its pins in x.json: the SHA-256 that it must have ever after. While
it comes it is x.part, and x.part.json tells where from.
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

SAME = "every place that holds the same bytes"  # the key of their pin


@dataclass(frozen=True)
class Pins:
    """What a file was when it was verified: while its size and time are the same, so is the file. hashes: the SHA-256
    that it had when it first came, for the places that hold the same bytes and for each that holds others.
    """

    sha256: str = ""
    size: int = -1
    mtime_ns: int = -1
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """A file of a set, and where it goes in the cache."""

    weights: WeightsSet
    part: Part
    file: File

    @property
    def name(self) -> str:
        return f"{self.part.kept}/{self.file.name}"

    @property
    def target(self) -> Path:
        return home() / self.part.kept / self.file.name

    @property
    def pins_at(self) -> Path:
        return beside(self.target, ".json")

    @property
    def pins(self) -> Pins:
        """Empty where there are none, or none that can be read."""
        try:
            found = Pins(**json.loads(self.pins_at.read_text(encoding="utf-8")))
            return found if isinstance(found.hashes, dict) else Pins()
        except (OSError, ValueError, TypeError):
            return Pins()

    def set_pin(self, sha256: str, key: str, found: os.stat_result) -> None:
        """found: the file's, from before it was read."""
        hashes = {key: sha256} | self.pins.hashes
        make_folder(self.target.parent)
        write_json(self.pins_at, asdict(Pins(sha256, found.st_size, found.st_mtime_ns, hashes)))

    def find(self) -> Path | None:
        """Where the file is on this machine: at one of its places on disk, else in the cache; or None."""
        on_disk = (place.path for place in self.file.places if place.path is not None)
        return next((path for path in (*on_disk, self.target) if path.is_file()), None)

    def sha256_at(self, place: Place) -> str | None:
        """What the file at a place must have: as weights.toml says, else as it was when it first came from there."""
        return place.sha256 or self.pins.hashes.get(key_of(place))


def key_of(place: Place) -> str:
    return place.url if place.other else SAME


def home() -> Path:
    """The cache: `DALL3_HOME`, or `dall3` in the user's cache folder."""
    return Path(os.environ.get("DALL3_HOME") or default_home()).absolute()


def default_home() -> Path:
    """`dall3` in the user's folder for caches, by the rules of the system."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "dall3" / "dall3" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/dall3"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dall3"


def make_folder(folder: Path) -> None:
    """Make a folder of the cache. Raises FetchError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"{folder} cannot be made ({reason(error)}); set DALL3_HOME to a folder that can be written"
        ) from None


def offline() -> bool:
    return os.environ.get("DALL3_OFFLINE", "").lower() not in ("", "0", "false", "no")


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """In one move: a reader finds the old file or the new one."""
    new = beside(path, f".{os.getpid()}-{threading.get_ident()}")
    new.write_text(json.dumps(value), encoding="utf-8")
    os.replace(new, path)


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def files_of(weights: WeightsSet) -> list[Wanted]:
    return [Wanted(weights, part, file) for part in weights.parts for file in part.files]


def forget(partial: Path) -> None:
    """Remove what came of a file so far, and what tells where from."""
    for path in (partial, beside(partial, ".json")):
        path.unlink(missing_ok=True)


def offline_message(wanted: Wanted, problem: str) -> str:
    return f"{wanted.name} {problem}, and DALL3_OFFLINE is set; put a copy at {wanted.target}, or unset it"


def read_progress(partial: Path) -> dict[str, Any]:
    try:
        state = json.loads(beside(partial, ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def reason(error: BaseException) -> str:
    """An error in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__

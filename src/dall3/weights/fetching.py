"""Files of weights to the cache: fetched once, resumed where it broke off, verified before they have their name.

The cache is the folder `DALL3_HOME`, or `dall3` in the user's cache folder; nothing is written outside of it. With
`DALL3_OFFLINE=1` nothing is fetched. A file x has its pins in x.json: the SHA-256 that it must have ever after. While
it comes it is x.part, and x.part.json tells where from.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dall3.errors import FetchError
from dall3.weights.registry import NAME, File, Part, Place, WeightsSet, no_such_set, read_registry

ATTEMPTS = 5  # at one place
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces
BACK_OFF, LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the one before
SLOWEST, PATIENCE = 1024, 60.0  # bytes a second, for so many seconds: below that a host is as good as gone
RESERVE = 64 << 20  # bytes of the disk that are left free
PIECE = 1 << 20
SAME = "every place that holds the same bytes"  # the key of their pin
LATER = (408, 425, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed

logger = logging.getLogger("dall3")


class Unlucky(Exception):
    """What may go well at the next attempt. wait: seconds that the host asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Refused(Exception):
    """What will not go well at this place."""


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
        return f"{self.weights.name}/{self.part.name}/{self.file.name}"

    @property
    def target(self) -> Path:
        return home() / self.weights.name / self.part.name / self.file.name

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
        self.target.parent.mkdir(parents=True, exist_ok=True)
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
    import pooch

    return Path(os.environ.get("DALL3_HOME") or pooch.os_cache("dall3")).absolute()


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
    import pooch

    return pooch.file_hash(str(path), alg="sha256")


def files_of(weights: WeightsSet) -> list[Wanted]:
    return [Wanted(weights, part, file) for part in weights.parts for file in part.files]


def check_here(wanted: Wanted, path: Path, thorough: bool = False) -> str | None:
    """What is wrong with a file on this machine, or None. What nobody knows a hash of is looked at and pinned.

    thorough: read it in any case, not only where its size or time are not those that it was verified with.
    """
    pins, found = wanted.pins, path.stat()
    known = {sha256 for place in wanted.file.places if (sha256 := wanted.sha256_at(place))}
    same = (pins.size, pins.mtime_ns) == (found.st_size, found.st_mtime_ns)
    if same and not thorough and pins.sha256 in known:
        return None
    in_cache = path == wanted.target
    if not in_cache and not known and not thorough:  # the user's own, of which nothing is known
        return None
    sha256 = sha256_of(path)
    # A copy that nothing was known of may come from the place whose hash nobody knows.
    unknown = next((place for place in wanted.file.places if wanted.sha256_at(place) is None), None)
    first = not pins.sha256 and unknown is not None
    if known and sha256 not in known and not first:
        pinned = "" if any(place.sha256 for place in wanted.file.places) else f" ({wanted.pins_at} says)"
        return f"has SHA-256 {sha256}; expected {' or '.join(sorted(known))}{pinned}"
    if sha256 not in known:
        try:
            look_at(path, wanted)
        except Exception as error:
            return f"is not the file ({reason(error)})"
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        return "changes while it is read"
    if known or in_cache:
        known_at = (place for place in wanted.file.places if wanted.sha256_at(place) == sha256)
        place = next(known_at, unknown)
        key = SAME if place is None else key_of(place)
        with suppress(OSError):  # a cache that cannot be written to is good for reading
            wanted.set_pin(sha256, key, found)
    return None


def fetch_set(weights: WeightsSet, progress: bool = True) -> dict[str, tuple[Path, Path | None]]:
    """The files of every part of a set, fetched where they are not here yet: (file, config) by the part's name.

    Raises FetchError that says what is missing, what was tried and what to do.
    """
    wanted = files_of(weights)
    absent = [one for one in wanted if one.find() is None]
    if absent and offline():  # before the others are looked at, which may take long
        raise FetchError(offline_message(absent[0], "is not here"))
    paths = {(one.part.name, one.file.name): fetch_file(one, progress) for one in wanted}
    return {
        part.name: (paths[part.name, part.file.name], paths[part.name, part.config.name] if part.config else None)
        for part in weights.parts
    }


def offline_message(wanted: Wanted, problem: str) -> str:
    return f"{wanted.name} {problem}, and DALL3_OFFLINE is set; put a copy at {wanted.target}, or unset it"


def fetch_file(wanted: Wanted, progress: bool = True) -> Path:
    """The file on this machine: at a place on disk, in the cache, or fetched from the first place that has it.

    Raises FetchError that says what happened at each place, and how to do without them.
    """
    from filelock import FileLock, Timeout

    target, problems = wanted.target, []
    for path in (*(place.path for place in wanted.file.places if place.path is not None), target):
        wrong = check_here(wanted, path) if path.is_file() else "is not here"
        if wrong is None:
            return path
        if path != target or path.is_file():
            problems.append(f"{path} {wrong}")
    if offline():
        raise FetchError(offline_message(wanted, "; ".join(problems) or "is not here"))
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(beside(target, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process fetches %s; waiting for it", wanted.name)
        lock.acquire()
    try:
        if target.is_file() and check_here(wanted, target) is None:  # while this one waited
            return target
        for place in (place for place in wanted.file.places if place.path is None):
            try:
                fetch_from(place, wanted, progress)
                return target
            except Refused as problem:
                problems.append(f"{place.url}: {problem}")
                logger.warning("%s: %s", wanted.name, problems[-1])
    finally:
        lock.release()
    raise FetchError(
        f"{wanted.name} could not be fetched; {'; '.join(problems)}. If you have a copy, put it at {target}, "
        "or name its path among the places in a weights.toml of your own (DALL3_WEIGHTS)"
    )


def fetch_from(place: Place, wanted: Wanted, progress: bool) -> None:
    """Fetch the file from one place, verify it and give it its name.

    Raises Refused where the place does not have it, FetchError where no place would do.
    """
    target, expected = wanted.target, wanted.sha256_at(place)
    partial = beside(target, ".part")
    try:
        url, headers = address(place)
    except ValueError as error:
        raise Refused(reason(error)) from None
    failures, problem, most = 0, Unlucky("not tried"), size_of(partial)
    while failures < ATTEMPTS:
        if failures:
            time.sleep(min(max(problem.wait, BACK_OFF * 2 ** (failures - 1)), LONGEST_WAIT))
        try:
            fresh = transfer(url, headers, partial, place.size, expected, wanted.name, progress)
            found, sha256 = partial.stat(), sha256_of(partial)
            if expected in (None, sha256):
                break
            most = max(most, size_of(partial))
            forget(partial)
            if fresh:
                pinned = "" if place.sha256 else f", as {wanted.pins_at} says"
                raise Refused(f"holds other bytes, with SHA-256 {sha256}; expected {expected}{pinned}")
            problem, failures = Unlucky("the parts of two attempts did not fit each other"), failures + 1
        except Unlucky as error:
            # A host that breaks off again and again, but brings something each time, gets there in the end.
            further = size_of(partial) > most + PIECE  # than ever before, so that this ends
            problem, failures, most = error, 1 if further else failures + 1, max(most, size_of(partial))
            logger.info("%s: %s (attempt %d of %d)", wanted.name, error, failures, ATTEMPTS)
    else:
        raise Refused(f"{problem}, {ATTEMPTS} times")
    if expected is None:
        try:
            look_at(partial, wanted)
        except Exception as error:
            forget(partial)
            raise Refused(f"what it sends is not the file ({reason(error)})") from None
    wanted.set_pin(sha256, key_of(place), found)
    os.replace(partial, target)
    forget(partial)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def address(place: Place) -> tuple[str, dict[str, str]]:
    """The URL of a place, and the headers that its host wants."""
    if not place.url.startswith("hf:"):
        return place.url, {}
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    owner, name, path = place.url.removeprefix("hf:").split("/", 2)
    return hf_hub_url(f"{owner}/{name}", path), build_hf_headers(library_name="dall3")


def transfer(
    url: str, headers: dict[str, str], partial: Path, size: int | None, expected: str | None, name: str, progress: bool
) -> bool:
    """Bring what `partial` lacks of the file; whether all of it came now, in one piece.

    size, expected: of the file, its bytes and SHA-256, None where not known. Without a hash that will tell, a file is
    only continued where the host says that it is still the same. Raises Unlucky, Refused, FetchError.
    """
    import requests

    state = read_state(partial)
    tag = state.get("validator") if state.get("url") == url else None
    offset = size_of(partial) if tag or (expected is not None and state.get("sha256") == expected) else 0
    if size is not None and offset == size:
        return False
    headers = {**headers, "Accept-Encoding": "identity"}  # compressed bytes could not be counted
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    headers |= {"If-Range": tag} if offset and tag else {}
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)  # follows what redirects it
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Unlucky(f"no answer ({reason(error)})") from None
    except Exception as error:  # an address that no library can read is as good as none
        raise Refused(f"no answer ({reason(error)})") from None
    with response:
        whole = response.headers.get("Content-Range") == f"bytes */{offset}"
        if offset and response.status_code == 416 and whole:
            return False  # and what came after it was interrupted
        offset, total = read_head(response, url, offset, state if tag else {}, partial)
        if size is not None and total not in (None, size):
            raise Refused(f"has {total:,} bytes; expected {size:,}")
        total = size if total is None else total
        chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if expected is None and total is None and not chunked:
            raise Refused("does not say how long the file is, whose SHA-256 nobody knows")
        if not offset:
            forget(partial)  # before what is said of it changes: the old bytes must never go by the new validator
        room = has_room(partial, (total or 0) - offset)
        if not room and size is None:
            raise Refused(f"has {total:,} bytes, as it says, for which there is no room")
        if not room:
            raise FetchError(room_message(partial, (total or 0) - offset, name))
        write_json(
            beside(partial, ".json"),
            {"url": url, "validator": validator_of(response), "total": total, "sha256": expected},
        )
        bar = tqdm(total=total, initial=offset, desc=name, unit="B", unit_scale=True, disable=not progress)
        with bar, partial.open("ab" if offset else "wb") as file:
            for piece in pieces(response):
                file.write(piece)
                bar.update(len(piece))
                if total is None and not has_room(partial, 0):
                    file.truncate(0)
                    raise Refused("sends more than there is room for, without an end")
                if total is not None and file.tell() > total:
                    break
            file.flush()
            os.fsync(file.fileno())
    found = size_of(partial)
    if total is not None and found < total:
        raise Unlucky(f"broke off after {found:,} of {total:,} bytes")
    if total is not None and found > total:
        forget(partial)
        raise Refused(f"sends more than the {total:,} bytes that it promised")
    return offset == 0


def validator_of(response: Any) -> str | None:
    """What tells that the host still has the same file: a strong ETag, or else the time of its last change."""
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag


def read_head(response: Any, url: str, offset: int, state: dict[str, Any], partial: Path) -> tuple[int, int | None]:
    """Where the bytes that come belong, and the file's size, None where the host does not say. state: what it said of
    the file when the first of them came.

    Raises Unlucky or Refused where none come, or not those that were asked for.
    """
    status, headers = response.status_code, response.headers
    addresses = [answer.url for answer in (*response.history, response)]
    if url.startswith("https://") and not all(address.startswith("https://") for address in addresses):
        raise Refused(f"leads to {addresses[-1]} by a way that is not encrypted")
    if status in LATER:
        raise Unlucky(f"answers {status}", float(whole_number(headers.get("Retry-After", "")) or 0))
    if status == 416:
        forget(partial)  # it is not a beginning of what the host has now
        raise Unlucky("answers 416 to the rest of the file")
    if status not in (200, 206):
        raise Refused(f"answers {status} {response.reason}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"sends it as {headers['Content-Encoding']}, which was not asked for")
    length = whole_number(headers.get("Content-Length", ""))
    if status == 200:
        return 0, length
    said = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", headers.get("Content-Range", ""), re.ASCII)
    tags = {response.headers.get("ETag"), response.headers.get("Last-Modified")} - {None}
    changed = bool(tags) and state.get("validator") not in (None, *tags)
    changed = changed or (said is not None and state.get("total") not in (None, int(said[3])))
    if not offset or said is None or int(said[1]) != offset or changed:
        forget(partial)
        raise Unlucky("answers 206 with another part than the rest of the same file")
    return offset, int(said[3])


def whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def pieces(response: Any) -> Iterator[bytes]:
    """The body as it comes. Raises Unlucky where it stops."""
    import requests
    import urllib3

    started, received = time.monotonic(), 0
    while True:
        try:
            piece = response.raw.read1(PIECE)
        except (urllib3.exceptions.HTTPError, requests.RequestException, OSError, ValueError) as error:
            raise Unlucky(f"broke off ({reason(error)})") from None
        if not piece:
            return
        yield piece
        received += len(piece)
        spent = time.monotonic() - started
        if spent > PATIENCE:
            if received < SLOWEST * spent:
                raise Unlucky(f"sends less than {SLOWEST} bytes a second")
            started, received = time.monotonic(), 0


def has_room(partial: Path, needed: int) -> bool:
    return shutil.disk_usage(partial.parent).free >= needed + RESERVE


def room_message(partial: Path, needed: int, name: str) -> str:
    free = shutil.disk_usage(partial.parent).free
    return (
        f"{name} needs {(needed + RESERVE) / 1e6:,.0f} MB in {partial.parent}, where {free / 1e6:,.0f} MB are free; "
        "make room, or set DALL3_HOME to another disk"
    )


def read_state(partial: Path) -> dict[str, Any]:
    try:
        state = json.loads(beside(partial, ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def forget(partial: Path) -> None:
    """Remove what came of a file so far, and what tells where from."""
    for path in (partial, beside(partial, ".json")):
        path.unlink(missing_ok=True)


def look_at(path: Path, wanted: Wanted) -> None:
    """Read a file whose hash nobody knows as far as tells that it is whole, and what it should be.

    Raises ValueError where it is not.
    """
    from dall3.text import load_tokenizer
    from dall3.weights.archive import CheckpointError, read_archive
    from dall3.weights.checkpoints import (
        DALLE,
        DVAE,
        OPENAI_CLIP,
        UNET,
        VQGAN,
        read_flags,
        read_state,
        read_taming_config,
    )

    kinds = {"transformer": (DALLE,), "vqgan": (VQGAN, DVAE), "clip": (OPENAI_CLIP,)}
    suffix, part = Path(wanted.file.name).suffix, wanted.part
    if part.name == "tokenizer":
        load_tokenizer(path)
    elif suffix in (".yaml", ".yml"):
        read_taming_config(path)
    elif suffix == ".json":
        settings = read_flags(path)
        if not settings.keys() & {"model", "image_size", "large_size", "num_channels", "num_heads", "noise_schedule"}:
            raise ValueError("no settings of a model")
    elif suffix == ".safetensors" and part.config is not None:  # a part that save_pretrained wrote
        read_archive(path)
    else:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"its entry {broken} is damaged")
        problems = []
        for kind in kinds.get(part.name, (UNET,)):
            try:
                read_state(path, kind)
                return
            except CheckpointError as error:
                problems.append(error)
        raise problems[0]


def reason(error: BaseException) -> str:
    """An error in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def find_weights(name: str | Path, registry: str | Path | None = None) -> WeightsSet | Path:
    """What a name means: a set of weights.toml, a folder, or "owner/name" of the Hugging Face hub as a folder.

    Raises ValueError for a name that is none of them, FetchError for a repository that cannot be had.
    """
    known = read_registry(registry)
    if isinstance(name, str) and name in known:
        return known[name]
    if isinstance(name, Path) or Path(name).exists():
        return Path(name)
    if NAME.fullmatch(name):
        raise ValueError(f"no folder and {no_such_set(name, known)}")
    owner, _, rest = name.partition("/")
    return fetch_repository(name) if NAME.fullmatch(owner) and NAME.fullmatch(rest) else Path(name)


def fetch_repository(name: str) -> Path:
    """A repository of the Hugging Face hub, "owner/name", as a folder in the cache; only files of the formats that
    `save_pretrained` writes. Raises FetchError.
    """
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "README.md"]
    cache = home() / "hub"
    try:
        path = snapshot_download(
            name, cache_dir=cache, allow_patterns=kinds, local_files_only=offline(), library_name="dall3"
        )
    except Exception as error:  # of the hub's library, of its HTTP library, of the system
        hint = "DALL3_OFFLINE is set" if offline() else reason(error)
        raise FetchError(
            f"{name} is no folder, and could not be had from the Hugging Face hub ({hint}); nothing of it is in {cache}"
        ) from None
    return Path(path)


def remove_set(weights: WeightsSet) -> int:
    """Remove a set's fetched files, whole or begun, from the cache; how many bytes that were. Pins stay: a file that
    is fetched again must be the one that it was. Raises FetchError for one that is being fetched.
    """
    from filelock import FileLock, Timeout

    removed = 0
    for one in files_of(weights):
        if not one.target.parent.is_dir():
            continue
        try:
            # The lock's file stays: another process may be waiting for it.
            with FileLock(beside(one.target, ".lock"), timeout=0):
                partial = beside(one.target, ".part")
                removed += size_of(one.target) + size_of(partial)
                one.target.unlink(missing_ok=True)
                forget(partial)
        except Timeout:
            raise FetchError(f"{one.name} is being fetched; remove it when that has ended") from None
    return removed

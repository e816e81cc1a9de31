"""Files of weights to the cache: fetched once, resumed where it broke off, verified before they have their name.

The cache is the folder `DALL3_HOME`, or `dall3` in the user's cache folder; nothing is written outside of it. With
`DALL3_OFFLINE=1` nothing is fetched. A file x has its pin in x.json: the SHA-256 that it must have ever after. While
it comes it is x.part, and x.part.json tells where from.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dall3.errors import FetchError
from dall3.registry import NAME, File, Part, Place, WeightsSet, no_such_set, read_registry

ATTEMPTS = 5  # at one place
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces
BACK_OFF, LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the one before
SLOWEST, PATIENCE = 1024, 60.0  # bytes a second, for so many seconds: below that a host is as good as gone
RESERVE = 64 << 20  # bytes of the disk that are left free
PIECE = 1 << 20
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
class Pin:
    """What a file was when it was verified. While its size and time are the same, so is the file."""

    sha256: str
    size: int
    mtime_ns: int
    url: str


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
    def pin(self) -> Pin | None:
        """None where there is none, or none that can be read."""
        try:
            return Pin(**json.loads(beside(self.target, ".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def set_pin(self, sha256: str, path: Path, url: str) -> None:
        found = path.stat()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside(self.target, ".json"), asdict(Pin(sha256, found.st_size, found.st_mtime_ns, url)))

    def find(self) -> Path | None:
        """Where the file is on this machine: at one of its places on disk, else in the cache; or None."""
        on_disk = (place.path for place in self.file.places if place.path is not None)
        return next((path for path in (*on_disk, self.target) if path.is_file()), None)

    def sha256_at(self, place: Place) -> str | None:
        """What the file at a place must have: as weights.toml says, else as it was when it was first fetched."""
        pin = self.pin
        pinned = pin is not None and (pin.url == place.url if place.other else True)
        return place.sha256 or (pin.sha256 if pin is not None and pinned else None)


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
    new = beside(path, f".{os.getpid()}")
    new.write_text(json.dumps(value), encoding="utf-8")
    os.replace(new, path)


def sha256_of(path: Path) -> str:
    import pooch

    return pooch.file_hash(str(path), alg="sha256")


def files_of(weights: WeightsSet) -> list[Wanted]:
    return [Wanted(weights, part, file) for part in weights.parts for file in part.files]


def check_here(wanted: Wanted, path: Path, thorough: bool = False) -> str | None:
    """What is wrong with a file on this machine, or None; what had no pin is pinned.

    thorough: read it in any case, not only where its size or time are not those of its pin.
    """
    pin, found = wanted.pin, path.stat()
    known = {sha256 for place in wanted.file.places if (sha256 := wanted.sha256_at(place))}
    known |= {pin.sha256} if pin is not None else set()
    same = pin is not None and (pin.size, pin.mtime_ns) == (found.st_size, found.st_mtime_ns)
    if same and not thorough and pin is not None and pin.sha256 in known:
        return None
    if path != wanted.target and not known and not thorough:  # the user's own, of which nothing is known
        return None
    sha256 = sha256_of(path)
    if known and sha256 not in known:
        return f"has SHA-256 {sha256}; expected {' or '.join(sorted(known))}"
    if known or path == wanted.target:
        wanted.set_pin(sha256, path, pin.url if pin is not None else str(path))
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

    here, target = wanted.find(), wanted.target
    wrong = check_here(wanted, here) if here is not None else "is not here"
    if here is not None and wrong is None:
        return here
    if here is not None and here != target:
        raise FetchError(f"{wanted.name}: {here} {wrong}")
    if offline():
        raise FetchError(offline_message(wanted, str(wrong)))
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
        problems = []
        for place in wanted.file.places:
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
    if place.path is not None:
        raise Refused("no such file")
    target, expected = wanted.target, wanted.sha256_at(place)
    partial = beside(target, ".part")
    url, headers = address(place)
    problem, fresh = Unlucky("not tried"), False
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(max(problem.wait, BACK_OFF * 2 ** (attempt - 1)), LONGEST_WAIT))
        try:
            fresh = transfer(url, headers, partial, place.size, expected is not None, wanted.name, progress)
            sha256 = sha256_of(partial)
            if expected in (None, sha256):
                break
            forget(partial)
            if fresh:
                raise Refused(f"holds other bytes, with SHA-256 {sha256}; expected {expected}")
            problem = Unlucky("the parts of two attempts did not fit each other")
        except Unlucky as error:
            problem = error
            logger.info("%s: %s (attempt %d of %d)", wanted.name, error, attempt + 1, ATTEMPTS)
    else:
        raise Refused(f"{problem}, {ATTEMPTS} times")
    if expected is None:
        try:
            look_at(partial, wanted)
        except ValueError as error:
            forget(partial)
            raise Refused(f"what it sends is not the file ({error})") from None
    wanted.set_pin(sha256, partial, place.url)
    os.replace(partial, target)
    forget(partial)


def address(place: Place) -> tuple[str, dict[str, str]]:
    """The URL of a place, and the headers that its host wants."""
    if not place.url.startswith("hf:"):
        return place.url, {}
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    owner, name, path = place.url.removeprefix("hf:").split("/", 2)
    return hf_hub_url(f"{owner}/{name}", path), build_hf_headers(library_name="dall3")


def transfer(
    url: str, headers: dict[str, str], partial: Path, size: int | None, verified: bool, name: str, progress: bool
) -> bool:
    """Bring what `partial` lacks of the file; whether all of it came now, in one piece.

    size: of the file, None where not known. verified: whether its hash will tell that it is right; where not, it is
    only continued when the host can tell that it is still the same. Raises Unlucky, Refused, FetchError.
    """
    import requests

    state = read_state(partial)
    tag = state.get("validator") if state.get("url") == url else None
    offset = partial.stat().st_size if partial.exists() and (tag or (verified and state.get("url") == url)) else 0
    if size is not None and offset == size:
        return False
    headers = {**headers, "Accept-Encoding": "identity"}  # compressed bytes could not be counted
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    headers |= {"If-Range": tag} if offset and tag else {}
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)  # follows what redirects it
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Unlucky(f"no answer ({reason(error)})") from None
    except requests.RequestException as error:
        raise Refused(reason(error)) from None
    with response:
        if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{offset}":
            return False  # it was whole, and what came after it was interrupted
        length = read_head(response, url, offset, partial)
        if response.status_code != 206:
            offset = 0
        total = size if length is None else offset + length
        if size is not None and total != size:
            raise Refused(f"has {total:,} bytes; expected {size:,}")
        check_disk(partial, (total or 0) - offset, name)
        tag = response.headers.get("ETag", "")
        tag = response.headers.get("Last-Modified") if tag.startswith("W/") or not tag else tag
        write_json(beside(partial, ".json"), {"url": url, "validator": tag})
        bar = tqdm(total=total, initial=offset, desc=name, unit="B", unit_scale=True, disable=not progress)
        with bar, partial.open("ab" if offset else "wb") as file:
            for piece in pieces(response):
                file.write(piece)
                bar.update(len(piece))
                if total is None:
                    check_disk(partial, 0, name)
                elif file.tell() > total:
                    break
            file.flush()
            os.fsync(file.fileno())
    found = partial.stat().st_size
    if total is not None and found < total:
        raise Unlucky(f"broke off after {found:,} of {total:,} bytes")
    if total is not None and found > total:
        forget(partial)
        raise Refused(f"sends more than the {total:,} bytes that it promised")
    return offset == 0


def read_head(response: Any, url: str, offset: int, partial: Path) -> int | None:
    """How many bytes will come, None where the host does not say. Raises Unlucky or Refused where none will."""
    status, headers = response.status_code, response.headers
    if url.startswith("https://") and not response.url.startswith("https://"):
        raise Refused(f"leads to {response.url}, which is not encrypted")
    if status in LATER:
        wait = headers.get("Retry-After", "")
        raise Unlucky(f"answers {status}", float(wait) if wait.isdigit() else 0.0)
    if status == 416 or (status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {offset}-")):
        forget(partial)  # it is not a beginning of what the host has now
        raise Unlucky(f"answers {status} to the rest of the file")
    if status not in (200, 206):
        raise Refused(f"answers {status} {response.reason}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"sends it as {headers['Content-Encoding']}, which was not asked for")
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


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


def check_disk(partial: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(partial.parent).free
    if free < needed + RESERVE:
        raise FetchError(
            f"{name} needs {(needed + RESERVE) / 1e6:,.0f} MB in {partial.parent}, where {free / 1e6:,.0f} MB are "
            "free; make room, or set DALL3_HOME to another disk"
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
    """Read a file whose hash nobody knows as far as tells that it is whole. Raises ValueError where it is not."""
    from dall3.archive import read_archive
    from dall3.text import load_tokenizer

    suffix = Path(wanted.file.name).suffix
    if wanted.part.name == "tokenizer":
        load_tokenizer(path)
    elif suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif suffix in (".yaml", ".yml"):
        import yaml

        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"no YAML: {reason(error)}") from None
        if not isinstance(found, dict):
            raise ValueError("no YAML of settings")
    else:
        read_archive(path)


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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kinds = ["*.json", "*.safetensors", "README.md"]
    cache = home() / "hub"
    try:
        path = snapshot_download(
            name, cache_dir=cache, allow_patterns=kinds, local_files_only=offline(), library_name="dall3"
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        hint = "DALL3_OFFLINE is set" if offline() else reason(error)
        raise FetchError(
            f"{name} is no folder, and could not be had from the Hugging Face hub ({hint}); nothing of it is in {cache}"
        ) from None
    return Path(path)


def remove_set(weights: WeightsSet) -> int:
    """Remove a set's fetched files, whole or begun, from the cache; how many bytes that were. Pins stay: a file that
    is fetched again must be the one that it was.
    """
    removed = 0
    for one in files_of(weights):
        for path in (one.target, beside(one.target, ".part")):
            removed += path.stat().st_size if path.is_file() else 0
            path.unlink(missing_ok=True)
        forget(beside(one.target, ".part"))
        beside(one.target, ".lock").unlink(missing_ok=True)
    return removed

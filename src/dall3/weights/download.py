"""One file of weights to the cache: fetched once, resumed where it broke off, verified before it has its name."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dall3.errors import FetchError
from dall3.weights.cache import (
    Wanted,
    beside,
    forget,
    key_of,
    make_folder,
    offline,
    offline_message,
    read_progress,
    reason,
    sha256_of,
    size_of,
    write_json,
)
from dall3.weights.registry import Place
from dall3.weights.verify import check_here, look_at

ATTEMPTS = 5  # at one place
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two chunks
BACK_OFF, LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the one before
SLOWEST, PATIENCE = 1024, 60.0  # bytes a second, for so many seconds: below that a host is as good as gone
RESERVE = 64 << 20  # bytes of the disk that are left free
CHUNK = 1 << 20
LATER = (408, 425, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed

logger = logging.getLogger("dall3")


class RetryableError(Exception):
    """A failure that the next attempt may not have. wait: seconds that the host asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class UnusableSource(Exception):
    """A failure that every attempt at this place will have."""


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
    make_folder(target.parent)
    lock = FileLock(beside(target, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process fetches %s; waiting for it", wanted.name)
        lock.acquire()
    except OSError as error:
        raise FetchError(
            f"{target.parent} cannot be written ({reason(error)}); set DALL3_HOME to another folder"
        ) from None
    try:
        if target.is_file() and check_here(wanted, target) is None:  # while this one waited
            return target
        for place in (place for place in wanted.file.places if place.path is None):
            try:
                fetch_from(place, wanted, progress)
                return target
            except UnusableSource as problem:
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

    Raises UnusableSource where the place does not have it, FetchError where no place would do.
    """
    target, expected = wanted.target, wanted.sha256_at(place)
    partial = beside(target, ".part")
    try:
        url, headers = address(place)
    except ValueError as error:
        raise UnusableSource(reason(error)) from None
    failures, problem, most = 0, RetryableError("not tried"), size_of(partial)
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
                raise UnusableSource(f"holds other bytes, with SHA-256 {sha256}; expected {expected}{pinned}")
            problem, failures = RetryableError("the parts of two attempts did not fit each other"), failures + 1
        except RetryableError as error:
            # A host that breaks off again and again, but brings something each time, gets there in the end.
            further = size_of(partial) > most + CHUNK  # than ever before, so that this ends
            problem, failures, most = error, 1 if further else failures + 1, max(most, size_of(partial))
            logger.info("%s: %s (attempt %d of %d)", wanted.name, error, failures, ATTEMPTS)
    else:
        raise UnusableSource(f"{problem}, {ATTEMPTS} times")
    if expected is None:
        try:
            look_at(partial, wanted)
        except Exception as error:
            forget(partial)
            raise UnusableSource(f"what it sends is not the file ({reason(error)})") from None
    wanted.set_pin(sha256, key_of(place), found)
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
    url: str, headers: dict[str, str], partial: Path, size: int | None, expected: str | None, name: str, progress: bool
) -> bool:
    """Bring what `partial` lacks of the file; whether all of it came now, in one piece.

    size, expected: of the file, its bytes and SHA-256, None where not known. Without a hash that will tell, a file is
    only continued where the host says that it is still the same. Raises RetryableError, UnusableSource, FetchError.
    """
    import requests

    state = read_progress(partial)
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
        raise RetryableError(f"no answer ({reason(error)})") from None
    except Exception as error:  # an address that no library can read is as good as none
        raise UnusableSource(f"no answer ({reason(error)})") from None
    with response:
        whole = response.headers.get("Content-Range") == f"bytes */{offset}"
        if offset and response.status_code == 416 and whole:
            return False  # and what came after it was interrupted
        offset, total = read_head(response, url, offset, state if tag else {}, partial)
        if size is not None and total not in (None, size):
            raise UnusableSource(f"has {total:,} bytes; expected {size:,}")
        total = size if total is None else total
        chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if expected is None and total is None and not chunked:
            raise UnusableSource("does not say how long the file is, whose SHA-256 nobody knows")
        if not offset:
            forget(partial)  # before what is said of it changes: the old bytes must never go by the new validator
        room = has_room(partial, (total or 0) - offset)
        if not room and size is None:
            raise UnusableSource(f"has {total:,} bytes, as it says, for which there is no room")
        if not room:
            raise FetchError(room_message(partial, (total or 0) - offset, name))
        write_json(
            beside(partial, ".json"),
            {"url": url, "validator": validator_of(response), "total": total, "sha256": expected},
        )
        bar = tqdm(total=total, initial=offset, desc=name, unit="B", unit_scale=True, disable=not progress)
        with bar, partial.open("ab" if offset else "wb") as file:
            for chunk in chunks(response):
                file.write(chunk)
                bar.update(len(chunk))
                if total is None and not has_room(partial, 0):
                    file.truncate(0)
                    raise UnusableSource("sends more than there is room for, without an end")
                if total is not None and file.tell() > total:
                    break
            file.flush()
            os.fsync(file.fileno())
    found = size_of(partial)
    if total is not None and found < total:
        raise RetryableError(f"broke off after {found:,} of {total:,} bytes")
    if total is not None and found > total:
        forget(partial)
        raise UnusableSource(f"sends more than the {total:,} bytes that it promised")
    return offset == 0


def validator_of(response: Any) -> str | None:
    """What tells that the host still has the same file: a strong ETag, or else the time of its last change."""
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag


def read_head(response: Any, url: str, offset: int, state: dict[str, Any], partial: Path) -> tuple[int, int | None]:
    """Where the bytes that come belong, and the file's size, None where the host does not say. state: what it said of
    the file when the first of them came.

    Raises RetryableError or UnusableSource where none come, or not those that were asked for.
    """
    status, headers = response.status_code, response.headers
    addresses = [answer.url for answer in (*response.history, response)]
    if url.startswith("https://") and not all(address.startswith("https://") for address in addresses):
        raise UnusableSource(f"leads to {addresses[-1]} by a way that is not encrypted")
    if status in LATER:
        raise RetryableError(f"answers {status}", float(whole_number(headers.get("Retry-After", "")) or 0))
    if status == 416:
        forget(partial)  # it is not a beginning of what the host has now
        raise RetryableError("answers 416 to the rest of the file")
    if status not in (200, 206):
        raise UnusableSource(f"answers {status} {response.reason}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise UnusableSource(f"sends it as {headers['Content-Encoding']}, which was not asked for")
    length = whole_number(headers.get("Content-Length", ""))
    if status == 200:
        return 0, length
    said = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", headers.get("Content-Range", ""), re.ASCII)
    tags = {response.headers.get("ETag"), response.headers.get("Last-Modified")} - {None}
    changed = bool(tags) and state.get("validator") not in (None, *tags)
    changed = changed or (said is not None and state.get("total") not in (None, int(said[3])))
    if not offset or said is None or int(said[1]) != offset or changed:
        forget(partial)
        raise RetryableError("answers 206 with another part than the rest of the same file")
    return offset, int(said[3])


def whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def chunks(response: Any) -> Iterator[bytes]:
    """The body as it comes. Raises RetryableError where it stops."""
    import requests
    import urllib3

    started, received = time.monotonic(), 0
    while True:
        try:
            chunk = response.raw.read1(CHUNK)
        except (urllib3.exceptions.HTTPError, requests.RequestException, OSError, ValueError) as error:
            raise RetryableError(f"broke off ({reason(error)})") from None
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        spent = time.monotonic() - started
        if spent > PATIENCE:
            if received < SLOWEST * spent:
                raise RetryableError(f"sends less than {SLOWEST} bytes a second")
            started, received = time.monotonic(), 0


def has_room(partial: Path, needed: int) -> bool:
    return shutil.disk_usage(partial.parent).free >= needed + RESERVE


def room_message(partial: Path, needed: int, name: str) -> str:
    free = shutil.disk_usage(partial.parent).free
    return (
        f"{name} needs {(needed + RESERVE) / 1e6:,.0f} MB in {partial.parent}, where {free / 1e6:,.0f} MB are free; "
        "make room, or set DALL3_HOME to another disk"
    )

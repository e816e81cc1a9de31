"""Download of one file of weights to the cache: resumable, and verified before it gets its final name."""

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
    CachedFile,
    delete_partial,
    make_folder,
    offline,
    offline_message,
    pin_key,
    read_partial_state,
    sha256_of,
    short_message,
    size_of,
    with_suffix_added,
    write_json,
)
from dall3.weights.registry import Place
from dall3.weights.verify import check_content, verify_file

ATTEMPTS = 5  # consecutive failures at one place
TIMEOUT = (10.0, 30.0)  # seconds to connect, and to wait for data
BACK_OFF, LONGEST_WAIT = 1.0, 60.0  # seconds; the wait doubles after each failure
SLOWEST, PATIENCE = 1024, 60.0  # a download below SLOWEST bytes per second for PATIENCE seconds is interrupted
RESERVE = 64 << 20  # bytes of disk space to leave free
CHUNK = 1 << 20  # bytes
RETRYABLE_STATUS = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that a retry may fix

logger = logging.getLogger("dall3")


class RetryableError(Exception):
    """An error that a retry may fix. wait: seconds to wait, from the host's Retry-After header."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class UnusablePlace(Exception):
    """A place cannot provide the file, and a retry cannot fix it."""


def fetch_file(wanted: CachedFile, progress: bool = True) -> Path:
    """Return the path of a file: on disk, in the cache, or downloaded from the first place that has it.

    progress: show a progress bar. Raises FetchError with the problem of each place, and with what to do.
    """
    from filelock import FileLock, Timeout

    target, problems = wanted.target, []
    for path in (*(place.path for place in wanted.file.places if place.path is not None), target):
        problem = verify_file(wanted, path) if path.is_file() else "is not here"
        if problem is None:
            return path
        if path != target or path.is_file():
            problems.append(f"{path} {problem}")
    if offline():
        raise FetchError(offline_message(wanted, "; ".join(problems) or "is not here"))
    make_folder(target.parent)
    lock = FileLock(with_suffix_added(target, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is downloading %s; waiting for it", wanted.name)
        lock.acquire()
    except OSError as error:
        raise FetchError(
            f"{target.parent} is not writable ({short_message(error)}); set DALL3_HOME to another folder"
        ) from None
    try:
        if target.is_file() and verify_file(wanted, target) is None:  # another process has downloaded it meanwhile
            return target
        for place in (place for place in wanted.file.places if place.path is None):
            try:
                fetch_from(place, wanted, progress)
                return target
            except UnusablePlace as error:
                problems.append(f"{place.url}: {error}")
                logger.warning("%s: %s", wanted.name, problems[-1])
    finally:
        lock.release()
    raise FetchError(
        f"{wanted.name} could not be downloaded; {'; '.join(problems)}. If you have a copy, put it at {target}, "
        "or add its path to the places in a weights.toml of your own (DALL3_WEIGHTS)"
    )


def fetch_from(place: Place, wanted: CachedFile, progress: bool) -> None:
    """Download a file from one place, verify it and move it to its final name.

    Raises UnusablePlace if this place cannot provide the file; FetchError if no place could, as with a full disk.
    """
    target, expected = wanted.target, wanted.sha256_at(place)
    partial = with_suffix_added(target, ".part")
    try:
        url, headers = url_and_headers(place)
    except ValueError as error:
        raise UnusablePlace(short_message(error)) from None
    failures, problem, largest = 0, RetryableError("not tried"), size_of(partial)
    while failures < ATTEMPTS:
        if failures:
            time.sleep(min(max(problem.wait, BACK_OFF * 2 ** (failures - 1)), LONGEST_WAIT))
        try:
            whole = transfer(url, headers, partial, place.size, expected, wanted.name, progress)
            found, sha256 = partial.stat(), sha256_of(partial)
            if expected in (None, sha256):
                break
            largest = max(largest, size_of(partial))
            delete_partial(partial)
            if whole:
                pinned = "" if place.sha256 else f", according to {wanted.pins_path}"
                raise UnusablePlace(f"holds a file with SHA-256 {sha256}; expected {expected}{pinned}")
            problem, failures = RetryableError("the resumed download has another SHA-256"), failures + 1
        except RetryableError as error:
            # Failures only count without progress: an unreliable host that sends more data each time is used to the
            # end. Progress is measured against the largest size so far, so the loop terminates.
            progressed = size_of(partial) > largest + CHUNK
            problem, failures = error, 1 if progressed else failures + 1
            largest = max(largest, size_of(partial))
            logger.info("%s: %s (attempt %d of %d)", wanted.name, error, failures, ATTEMPTS)
    else:
        raise UnusablePlace(f"{problem}, {ATTEMPTS} times")
    if expected is None:
        try:
            check_content(partial, wanted)
        except Exception as error:
            delete_partial(partial)
            raise UnusablePlace(f"sends another file ({short_message(error)})") from None
    wanted.set_pin(sha256, pin_key(place), found)
    os.replace(partial, target)
    delete_partial(partial)


def url_and_headers(place: Place) -> tuple[str, dict[str, str]]:
    """The URL of a place, and the HTTP headers for its host."""
    if not place.url.startswith("hf:"):
        return place.url, {}
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    owner, name, path = place.url.removeprefix("hf:").split("/", 2)
    return hf_hub_url(f"{owner}/{name}", path), build_hf_headers(library_name="dall3")


def transfer(
    url: str, headers: dict[str, str], partial: Path, size: int | None, expected: str | None, name: str, progress: bool
) -> bool:
    """Download what is missing of `partial`. Returns True if this call downloaded the whole file.

    size, expected: size in bytes and SHA-256 of the file, None if unknown. Without an expected hash, a partial file is
    only resumed if the host confirms that the file has not changed. Raises RetryableError, UnusablePlace or
    FetchError.
    """
    import requests

    state = read_partial_state(partial)
    tag = state.get("validator") if state.get("url") == url else None
    offset = size_of(partial) if tag or (expected is not None and state.get("sha256") == expected) else 0
    if size is not None and offset == size:
        return False
    headers = {**headers, "Accept-Encoding": "identity"}  # compression would change the byte offsets
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    headers |= {"If-Range": tag} if offset and tag else {}
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)  # follows redirects
    except (requests.ConnectionError, requests.Timeout) as error:
        raise RetryableError(f"no answer ({short_message(error)})") from None
    except Exception as error:  # requests raises various exceptions for malformed URLs
        raise UnusablePlace(f"no answer ({short_message(error)})") from None
    with response:
        complete = response.headers.get("Content-Range") == f"bytes */{offset}"
        if offset and response.status_code == 416 and complete:
            return False  # the partial file is complete; only its verification was interrupted
        offset, total = check_response(response, url, offset, state if tag else {}, partial)
        if size is not None and total not in (None, size):
            raise UnusablePlace(f"has {total:,} bytes; expected {size:,}")
        total = size if total is None else total
        chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if expected is None and total is None and not chunked:
            raise UnusablePlace("sends no size of the file, whose SHA-256 is unknown")
        if not offset:
            delete_partial(partial)  # before the state changes: old bytes must never be paired with the new validator
        room = has_room(partial, (total or 0) - offset)
        if not room and size is None:
            raise UnusablePlace(f"reports {total:,} bytes, more than the free disk space")
        if not room:
            raise FetchError(room_message(partial, (total or 0) - offset, name))
        write_json(
            with_suffix_added(partial, ".json"),
            {"url": url, "validator": validator_of(response), "total": total, "sha256": expected},
        )
        bar = tqdm(total=total, initial=offset, desc=name, unit="B", unit_scale=True, disable=not progress)
        with bar, partial.open("ab" if offset else "wb") as file:
            for chunk in chunks(response):
                file.write(chunk)
                bar.update(len(chunk))
                if total is None and not has_room(partial, 0):
                    file.truncate(0)
                    raise UnusablePlace("sends more data than the free disk space")
                if total is not None and file.tell() > total:
                    break
            file.flush()
            os.fsync(file.fileno())
    found = size_of(partial)
    if total is not None and found < total:
        raise RetryableError(f"the connection broke after {found:,} of {total:,} bytes")
    if total is not None and found > total:
        delete_partial(partial)
        raise UnusablePlace(f"sends more than the announced {total:,} bytes")
    return offset == 0


def validator_of(response: Any) -> str | None:
    """The validator for If-Range: a strong ETag, else Last-Modified, else None."""
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag


def check_response(
    response: Any, url: str, offset: int, state: dict[str, Any], partial: Path
) -> tuple[int, int | None]:
    """Check the status and headers of a response. Returns the offset of its body and the file's size, None if unknown.

    state: the stored state of the partial file. Raises RetryableError or UnusablePlace if the response is an error, or
    does not hold the requested range of the same file.
    """
    status, headers = response.status_code, response.headers
    urls = [answer.url for answer in (*response.history, response)]
    if url.startswith("https://") and not all(one.startswith("https://") for one in urls):
        raise UnusablePlace(f"redirects to {urls[-1]} over an unencrypted connection")
    if status in RETRYABLE_STATUS:
        raise RetryableError(f"answers {status}", float(whole_number(headers.get("Retry-After", "")) or 0))
    if status == 416:
        delete_partial(partial)  # the file on the host has changed
        raise RetryableError("answers 416 to the rest of the file")
    if status not in (200, 206):
        raise UnusablePlace(f"answers {status} {response.reason}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise UnusablePlace(f"sends the content encoding {headers['Content-Encoding']}, which was not requested")
    length = whole_number(headers.get("Content-Length", ""))
    if status == 200:
        return 0, length
    content_range = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", headers.get("Content-Range", ""), re.ASCII)
    tags = {response.headers.get("ETag"), response.headers.get("Last-Modified")} - {None}
    changed = bool(tags) and state.get("validator") not in (None, *tags)
    changed = changed or (content_range is not None and state.get("total") not in (None, int(content_range[3])))
    if not offset or content_range is None or int(content_range[1]) != offset or changed:
        delete_partial(partial)
        raise RetryableError("answers 206 with another range than requested, or of another file")
    return offset, int(content_range[3])


def whole_number(text: str) -> int | None:
    """The number in a header, None for anything else."""
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def chunks(response: Any) -> Iterator[bytes]:
    """Iterate over the body of a response. Raises RetryableError if the connection breaks or is too slow."""
    import requests
    import urllib3

    started, received = time.monotonic(), 0
    while True:
        try:
            chunk = response.raw.read1(CHUNK)
        except (urllib3.exceptions.HTTPError, requests.RequestException, OSError, ValueError) as error:
            raise RetryableError(f"the connection broke ({short_message(error)})") from None
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
        "free some space, or set DALL3_HOME to a folder on another disk"
    )

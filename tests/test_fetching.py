"""Weights by name: reading weights.toml, and downloads from faulty hosts."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filelock  # noqa: F401  imported here, so that a process that is forked is at work at once
import pytest
import requests  # noqa: F401
import torch

from dall3.errors import FetchError
from dall3.weights import download
from dall3.weights.cache import CachedFile, files_of
from dall3.weights.download import fetch_file
from dall3.weights.find import fetch_set, remove_set
from dall3.weights.registry import find_set, read_registry
from dall3.weights.verify import verify_file

DATA = random.Random(0).randbytes(1_500_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


def saved(value: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"time_embed.0.weight": torch.full((50_000,), value)}, buffer)  # as a UNet has it
    return buffer.getvalue()


UNET = saved(1.0)


class Handler(BaseHTTPRequestHandler):
    """Responds with the server's next behaviour, and correctly if none is left."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        behaviour = server.behaviours.pop(0) if server.behaviours else "good"
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, behaviour)()

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Connection", "close")
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self, data: bytes) -> None:
        for start in range(0, len(data), 1 << 16):
            self.wfile.write(data[start : start + (1 << 16)])
            self.server.sent += len(data[start : start + (1 << 16)])
            time.sleep(self.server.pause)

    def part(self) -> tuple[int, dict[str, str]]:
        """The offset that Range and If-Range request, and the headers of the response."""
        wanted, tag = self.headers.get("Range"), self.headers.get("If-Range")
        size, headers = len(self.server.data), {"ETag": self.server.tag} if self.server.tag else {}
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and tag in (None, self.server.tag) else 0
        return start, headers | ({"Content_Range": f"bytes {start}-{size - 1}/{size}"} if start else {})

    def good(self) -> None:
        start, headers = self.part()
        if start >= len(self.server.data):
            return self.head(416, 0, Content_Range=f"bytes */{len(self.server.data)}")
        self.head(206 if start else 200, len(self.server.data) - start, **headers)
        self.body(self.server.data[start:])

    def truncate(self) -> None:
        start, headers = self.part()
        self.head(206 if start else 200, len(self.server.data) - start, **headers)
        self.body(self.server.data[start : start + (len(self.server.data) - start) // 3])

    def reset(self) -> None:
        self.truncate()
        self.connection.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SO_LINGER: close with a reset
        self.connection.close()

    def hang_up(self) -> None:
        self.connection.close()

    def stall(self) -> None:
        self.truncate()
        self.server.stop.wait(3)

    def stall_at_once(self) -> None:
        self.server.stop.wait(3)

    def short(self) -> None:
        """Announces fewer bytes than it sends."""
        self.head(200, 1000)
        self.body(self.server.data[:1000])

    def long(self) -> None:
        """Announces more bytes than it sends."""
        start, headers = self.part()
        self.head(206 if start else 200, len(self.server.data) - start + 99, **headers)
        self.body(self.server.data[start:])

    def endless(self) -> None:
        self.head(200, None)
        for _ in range(2000):
            self.wfile.write(bytes(1 << 16))

    def chunked(self) -> None:
        self.head(200, None, Transfer_Encoding="chunked")
        for start in range(0, len(self.server.data), 100_000):
            piece = self.server.data[start : start + 100_000]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def chunked_and_cut(self) -> None:
        self.head(200, None, Transfer_Encoding="chunked")
        self.wfile.write(b"186a0\r\n" + self.server.data[:5000])

    def until_closed(self) -> None:
        self.head(200, None)
        self.body(self.server.data)

    def redirect(self) -> None:
        self.head(302, 0, Location=self.path + "?again")

    def redirect_to_nothing(self) -> None:
        self.head(302, 0, Location="http://127.0.0.1:1/gone")

    def no_range(self) -> None:
        """Ignores Range and sends the whole file."""
        self.head(200, len(self.server.data))
        self.body(self.server.data)

    def other_range(self) -> None:
        size = len(self.server.data)
        self.head(206, size - 7, Content_Range=f"bytes 7-{size - 1}/{size}")
        self.body(self.server.data[7:])

    def deaf(self) -> None:
        """Ignores If-Range and sends the rest, with the validator of the new file."""
        wanted, size = self.headers.get("Range"), len(self.server.data)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        headers = {"ETag": self.server.tag} | ({"Content_Range": f"bytes {start}-{size - 1}/{size}"} if start else {})
        self.head(206 if start else 200, size - start, **headers)
        self.body(self.server.data[start:])

    def capped(self) -> None:
        """Sends a part of the rest, as its headers say."""
        start, headers = self.part()
        size = len(self.server.data)
        if not start:
            return self.truncate()
        end = min(start + size // 4, size)
        headers["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
        self.head(206, end - start, **headers)
        self.body(self.server.data[start:end])

    def unasked(self) -> None:
        self.head(206, 1000, Content_Range=f"bytes 0-999/{len(self.server.data)}")
        self.body(self.server.data[:1000])

    def odd_length(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "\u00b2")
        self.end_headers()
        self.body(self.server.data)

    def odd_redirect(self) -> None:
        self.head(302, 0, Location="http://[::1/")

    def huge(self) -> None:
        self.head(200, 10**15)
        self.body(self.server.data)

    def not_found(self) -> None:
        self.head(404, 0)

    def not_satisfiable(self) -> None:
        self.head(416, 0)

    def too_many(self) -> None:
        self.head(429, 0, Retry_After="0")

    def broken(self) -> None:
        self.head(500, 0)

    def wrong(self) -> None:
        self.head(200, len(self.server.data), ETag='"wrong"')
        self.body(bytes(len(self.server.data)))

    def page(self) -> None:
        text = b"<!DOCTYPE html><title>This domain is for sale</title>" * 9
        self.head(200, len(text))
        self.body(text)

    def zipped(self) -> None:
        self.head(200, len(self.server.data), Content_Encoding="gzip")
        self.body(self.server.data)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, data: bytes = DATA) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.tag, self.pause, self.sent = data, '"one"', 0.0, 0
        self.behaviours: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.stop = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args: Any) -> None:
        pass  # clients that disconnect are expected in these tests


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("DALL3_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DALL3_OFFLINE", raising=False)
    monkeypatch.delenv("DALL3_WEIGHTS", raising=False)
    monkeypatch.setattr(download, "BACK_OFF", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", (0.5, 0.2))
    servers: list[Server] = []

    def start(data: bytes = DATA) -> Server:
        servers.append(Server(data))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop.set()
        server.shutdown()
        server.server_close()


def want(folder: Path, *places: str, sha256: str | None = SHA256, size: int | None = None) -> CachedFile:
    """The `CachedFile` of a set with these places."""
    lines = [f'file = "model.pt"\nplaces = {json.dumps(list(places))}']
    lines += [f'sha256 = "{sha256}"'] if sha256 else []
    lines += [f"size = {size}"] if size else []
    (folder / "weights.toml").write_text("[own.upsampler]\n" + "\n".join(lines))
    return files_of(find_set("own", folder / "weights.toml"))[0]


RIGHT: list[list[str]] = [
    [],
    ["truncate"],
    ["truncate", "truncate", "truncate"],
    ["reset"],
    ["hang_up", "hang_up"],
    ["stall"],
    ["stall_at_once", "stall"],
    ["long"],
    ["chunked"],
    ["chunked_and_cut"],
    ["until_closed"],
    ["redirect", "redirect"],
    ["truncate", "redirect"],
    ["truncate", "no_range"],
    ["truncate", "other_range"],
    ["truncate", "not_satisfiable"],
    ["too_many", "broken", "too_many"],
    ["truncate", "broken", "truncate", "reset"],
    ["truncate", "deaf"],
    ["truncate", "capped", "capped", "capped"],
    ["unasked"],
    ["odd_length"],
]


@pytest.mark.parametrize("known", (True, False))
@pytest.mark.parametrize("behaviours", RIGHT, ids="-".join)
def test_downloads_that_succeed(
    serve: Callable[..., Server], tmp_path: Path, behaviours: list[str], known: bool
) -> None:
    """With and without a known hash of the file."""
    server = serve(DATA if known else UNET)
    server.behaviours = list(behaviours)
    wanted = want(tmp_path, server.url + "/model.pt", sha256=SHA256 if known else None)
    if not known and behaviours in (["until_closed"], ["odd_length"]):
        with pytest.raises(FetchError, match="sends no size of the file"):
            fetch_file(wanted, progress=False)
        return
    path = fetch_file(wanted, progress=False)
    assert path.read_bytes() == server.data and path == tmp_path / "home/own/upsampler/model.pt"
    left = {file.name for file in path.parent.iterdir()} - {"model.pt", "model.pt.json", "model.pt.lock"}
    assert not left and not server.behaviours
    asked = len(server.requests)
    assert fetch_file(wanted, progress=False) == path and len(server.requests) == asked


WRONG = (
    (["short"], "SHA-256 .* expected"),
    (["wrong"], "holds a file with SHA-256"),
    (["page"], "holds a file with SHA-256"),
    (["not_found"], "answers 404"),
    (["broken"] * 5, "answers 500, 5 times"),
    (["too_many"] * 5, "answers 429, 5 times"),
    (["hang_up"] * 5, "no answer .*, 5 times"),
    (["stall_at_once"] * 5, "no answer .*, 5 times"),
    (["redirect"] * 40, "Exceeded 30 redirects"),
    (["redirect_to_nothing"] * 5, "no answer"),
    (["zipped"], "content encoding gzip"),
    (["odd_redirect"], "no answer"),
    (["huge"], "more than the free disk space"),
)


@pytest.mark.parametrize(("behaviours", "words"), WRONG, ids=lambda value: "-".join(value[:2]))
def test_downloads_that_fail(serve: Callable[..., Server], tmp_path: Path, behaviours: list[str], words: str) -> None:
    server = serve()
    server.behaviours = list(behaviours)
    wanted = want(tmp_path, server.url + "/model.pt")
    with pytest.raises(FetchError, match=words) as error:
        fetch_file(wanted, progress=False)
    assert str(wanted.target) in str(error.value) and "\n" not in str(error.value)
    assert not wanted.target.exists()


def test_any_sequence_of_faults_ends_with_the_file_or_an_error(serve: Callable[..., Server], tmp_path: Path) -> None:
    kinds = [name for name in vars(Handler) if name in {kind for kinds in RIGHT for kind in kinds}]
    kinds += ["short", "wrong", "page", "not_found", "zipped"]
    kinds = [kind for kind in kinds if "stall" not in kind]  # those wait
    ended = set()
    for seed in range(60):
        draw, server = random.Random(seed), serve()
        server.behaviours = draw.choices(kinds, k=draw.randrange(1, 7))
        wanted = want(tmp_path, f"{server.url}/{seed}", sha256=SHA256, size=draw.choice((None, len(DATA))))
        try:
            assert fetch_file(wanted, progress=False).read_bytes() == DATA
            ended.add("well")
        except FetchError:
            assert not wanted.target.exists()
            ended.add("error")
        remove_set(wanted.weights)
    assert ended == {"well", "error"}


def test_a_host_without_progress_is_abandoned(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CHUNK", 1 << 14)
    server = serve(bytes(len(DATA)))  # wrong bytes, and always truncated
    server.behaviours = ["truncate", "good"] * 20
    with pytest.raises(FetchError, match="5 times"):
        fetch_file(want(tmp_path, server.url + "/model.pt"), progress=False)
    assert len(server.requests) < 20


def test_the_next_place_is_tried(serve: Callable[..., Server], tmp_path: Path) -> None:
    bad, good = serve(), serve()
    bad.behaviours = ["truncate", "wrong"]
    path = fetch_file(want(tmp_path, "http://127.0.0.1:1/model.pt", bad.url + "/a", good.url + "/b"), progress=False)
    assert path.read_bytes() == DATA and bad.requests and good.requests == [("/b", None)]


def test_more_bytes_than_announced_are_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    server.behaviours = ["endless"]
    with pytest.raises(FetchError, match="sends more than the announced 1,500,000 bytes"):
        fetch_file(want(tmp_path, server.url + "/model.pt", size=len(DATA)), progress=False)
    with pytest.raises(FetchError, match="has 1,500,000 bytes; expected 7"):
        fetch_file(want(tmp_path, server.url + "/model.pt", size=7), progress=False)


def test_a_broken_download_is_resumed(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    server.behaviours = ["truncate"]
    fetch_file(want(tmp_path, server.url + "/model.pt"), progress=False)
    assert server.requests[1] == ("/model.pt", f"bytes={len(DATA) // 3}-") and server.sent == len(DATA)


def test_parts_of_different_files_are_never_joined(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(saved(1.0))
    server.behaviours = ["truncate", *["broken"] * 4]
    wanted = want(tmp_path, server.url + "/model.pt", sha256=None)
    with pytest.raises(FetchError):
        fetch_file(wanted, progress=False)
    server.data, server.tag = saved(2.0), '"two"'
    assert fetch_file(wanted, progress=False).read_bytes() == server.data
    remove_set(wanted.weights)
    wanted.target.with_name("model.pt.json").unlink()
    server.data, server.tag, server.behaviours = saved(3.0), '"three"', ["truncate", *["broken"] * 4]
    with pytest.raises(FetchError):
        fetch_file(wanted, progress=False)
    server.data, server.tag, server.behaviours = saved(4.0), '"four"', ["deaf"]  # a host that ignores If-Range
    assert fetch_file(wanted, progress=False).read_bytes() == server.data
    remove_set(wanted.weights)
    wanted.target.with_name("model.pt.json").unlink()
    server.tag = ""  # a host without a validator
    server.behaviours = ["truncate", "good"]
    assert fetch_file(wanted, progress=False).read_bytes() == server.data
    assert server.requests[-1] == ("/model.pt", None)


def test_a_file_without_a_known_hash_is_checked_and_pinned(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(saved(1.0))
    wanted = want(tmp_path, server.url + "/model.pt", sha256=None)
    for behaviour in ("page", "short"):
        server.behaviours = [behaviour]
        with pytest.raises(FetchError, match="sends another file"):
            fetch_file(wanted, progress=False)
        assert not wanted.target.exists()
    first = fetch_file(wanted, progress=False).read_bytes()
    remove_set(wanted.weights)
    server.data, server.tag = saved(2.0), '"two"'
    with pytest.raises(FetchError, match="holds a file with SHA-256"):
        fetch_file(wanted, progress=False)
    server.data = first
    assert fetch_file(wanted, progress=False).read_bytes() == first


def test_a_file_changed_on_disk_is_downloaded_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    wanted = want(tmp_path, server.url + "/model.pt")
    path = fetch_file(wanted, progress=False)
    path.write_bytes(DATA[:-1] + b"?")
    assert "SHA-256" in str(verify_file(wanted, path, thorough=True))
    assert fetch_file(wanted, progress=False).read_bytes() == DATA


def test_a_full_disk_is_an_error_before_the_download(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    usage = download.shutil.disk_usage(tmp_path)._replace(free=download.RESERVE + 1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FetchError, match="needs 69 MB in .* 67 MB are free; free some space, or set DALL3_HOME"):
        fetch_file(want(tmp_path, server.url + "/model.pt", size=len(DATA)), progress=False)
    with pytest.raises(FetchError, match="reports 1,500,000 bytes, more than the free disk space"):
        fetch_file(want(tmp_path, server.url + "/model.pt"), progress=False)
    assert not list((tmp_path / "home").rglob("*.part"))


def test_nothing_is_downloaded_offline(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    wanted = want(tmp_path, server.url + "/model.pt")
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    with pytest.raises(
        FetchError, match="own/upsampler/model.pt is not here, and DALL3_OFFLINE is set; unset it, or put a copy at"
    ):
        fetch_set(wanted.weights)
    assert not server.requests
    wanted.target.parent.mkdir(parents=True)
    wanted.target.write_bytes(DATA)
    assert fetch_set(wanted.weights) == {"upsampler": (wanted.target, None)}
    wanted.target.write_bytes(DATA[:-1])
    with pytest.raises(FetchError, match="has SHA-256 .*, and DALL3_OFFLINE is set"):
        fetch_set(wanted.weights)


def test_a_set_that_draws_is_loaded_without_an_unavailable_super_resolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    (tmp_path / "t.pt").write_bytes(DATA)
    away = 'file = "r.pth"\nplaces = ["https://example.org/r.pth"]\n'
    part = '[own.transformer]\nfile = "t.pt"\nplaces = ["t.pt"]\n'
    (tmp_path / "weights.toml").write_text(f"{part}[own.super_resolution]\n{away}[alone.super_resolution]\n{away}")
    monkeypatch.setenv("DALL3_WEIGHTS", str(tmp_path / "weights.toml"))
    with caplog.at_level(logging.WARNING, "dall3"):
        assert fetch_set(find_set("own")) == {"transformer": (tmp_path / "t.pt", None)}
    assert "the weights are loaded without their super_resolution" in caplog.text
    with pytest.raises(FetchError, match="r.pth is not here"):
        fetch_set(find_set("alone"))


def test_a_hash_added_later_is_checked(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(UNET)
    fetch_file(want(tmp_path, server.url + "/model.pt", sha256=None), progress=False)
    server.data = DATA
    wanted = want(tmp_path, server.url + "/model.pt")
    assert "SHA-256" in str(verify_file(wanted, wanted.target))
    assert fetch_file(wanted, progress=False).read_bytes() == DATA


def test_an_incomplete_copy_is_neither_used_nor_pinned(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = want(tmp_path, "http://127.0.0.1:1/gone", sha256=None)
    wanted.target.parent.mkdir(parents=True)
    wanted.target.write_bytes(UNET[:1000])
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    with pytest.raises(FetchError, match="is not the file"):
        fetch_file(wanted)
    wanted.target.write_bytes(UNET)
    assert fetch_file(wanted) == wanted.target
    wanted.target.write_bytes(saved(2.0))  # it is pinned now
    with pytest.raises(FetchError, match="according to .*model.pt.json"):
        fetch_file(wanted)


def test_a_manual_copy_may_be_the_file_of_the_place_without_a_hash(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'[own.upsampler]\nfile = "model.pt"\nsha256 = "{SHA256}"\n'
    text += 'places = ["http://127.0.0.1:1/a", { url = "http://127.0.0.1:1/b" }]\n'
    (tmp_path / "weights.toml").write_text(text)
    wanted = files_of(find_set("own", tmp_path / "weights.toml"))[0]
    wanted.target.parent.mkdir(parents=True)
    monkeypatch.setenv("DALL3_OFFLINE", "1")
    wanted.target.write_bytes(UNET[:-9])
    with pytest.raises(FetchError, match="is not the file"):
        fetch_file(wanted)
    wanted.target.write_bytes(UNET)
    assert fetch_file(wanted) == wanted.target
    assert wanted.pins.hashes == {"http://127.0.0.1:1/b": hashlib.sha256(UNET).hexdigest()}
    wanted.target.write_bytes(saved(2.0))
    with pytest.raises(FetchError, match="has SHA-256"):
        fetch_file(wanted)


def test_removing_a_file_during_its_download_is_an_error(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    server.pause = 0.02
    wanted = want(tmp_path, server.url + "/model.pt")
    process = fetch_in_a_process(wanted)
    while not server.sent:
        time.sleep(0.01)
    with pytest.raises(FetchError, match="is being downloaded; remove it afterwards"):
        remove_set(wanted.weights)
    process.join()
    assert process.exitcode == 0 and wanted.target.read_bytes() == DATA
    assert remove_set(wanted.weights) == len(DATA) and not wanted.target.exists()


def test_a_host_that_breaks_off_but_makes_progress_is_used_to_the_end(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CHUNK", 1 << 14)
    server = serve()
    server.behaviours = ["capped"] * 12
    monkeypatch.setattr(Handler, "truncate", lambda self: Handler.good(self))
    other = serve()
    other.behaviours = ["not_found"] * 3
    wanted = want(tmp_path, other.url + "/a", server.url + "/b")
    assert fetch_file(wanted, progress=False).read_bytes() == DATA


def test_a_copy_on_disk_is_used_in_place(tmp_path: Path, serve: Callable[..., Server]) -> None:
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies/mine.pt").write_bytes(DATA)
    path = fetch_file(want(tmp_path, "http://127.0.0.1:1/gone", "copies/mine.pt"))
    assert path == tmp_path / "copies/mine.pt"
    (tmp_path / "copies/mine.pt").write_bytes(b"other")
    server = serve()
    assert fetch_file(want(tmp_path, "copies/mine.pt", server.url), progress=False).read_bytes() == DATA
    remove_set(want(tmp_path, "copies/mine.pt").weights)
    with pytest.raises(FetchError, match="mine.pt has SHA-256"):
        fetch_file(want(tmp_path, "copies/mine.pt"))


fork = multiprocessing.get_context("fork")


def fetch_in_a_process(wanted: CachedFile) -> Any:
    process = fork.Process(target=fetch_file, args=(wanted, False))
    process.start()
    return process


def test_a_download_killed_at_any_moment_can_be_repeated(serve: Callable[..., Server], tmp_path: Path) -> None:
    draw, resumed = random.Random(0), 0
    for trial in range(20):
        server = serve()
        server.pause = 0.004
        wanted = want(tmp_path, f"{server.url}/{trial}")
        process = fetch_in_a_process(wanted)
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not wanted.target.exists() or wanted.target.read_bytes() == DATA
        again = fetch_in_a_process(wanted)
        again.join()
        assert wanted.target.read_bytes() == DATA and server.sent <= 2 * len(DATA)
        resumed += any(wish for _, wish in server.requests)
        remove_set(wanted.weights)
    assert resumed > 5


def test_two_processes_download_a_file_once(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", (10.0, 30.0))  # a slow response is not requested again
    server = serve()
    server.pause = 0.005
    wanted = want(tmp_path, server.url + "/model.pt")
    processes = [fetch_in_a_process(wanted) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(server.requests) == 1 and wanted.target.read_bytes() == DATA


def test_nothing_is_written_outside_of_the_cache(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, before = serve(), set(Path.cwd().iterdir()) | set(Path.home().iterdir())
    fetch_file(want(tmp_path, server.url + "/model.pt"), progress=False)
    assert set(Path.cwd().iterdir()) | set(Path.home().iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"home", "weights.toml"}


GOOD = '[own.vqgan]\nfile = "last.ckpt"\nplaces = ["https://host/x"]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("[", "not TOML"),
        ("[own]\n", "has no part"),
        ('["../own".vqgan]\n', "invalid name; expected letters"),
        ('[own."../x"]\n', "unknown part ../x"),
        ("[own]\nvqgan = 1\n", "unknown part vqgan"),
        (GOOD.replace("last.ckpt", "../last.ckpt"), "expected a name without folders"),
        (GOOD.replace("last.ckpt", "/etc/passwd"), "expected a name without folders"),
        (GOOD.replace("last.ckpt", ".."), "expected a name without folders"),
        (GOOD.replace("last.ckpt", "a\\u0000b"), "expected a name without folders"),
        (GOOD.replace("last.ckpt", ""), "expected a name without folders"),
        (GOOD.replace('"https://host/x"', ""), "places is not a list"),
        (GOOD.replace('"https://host/x"', "3"), "a place is 3; expected a URL or a path"),
        (GOOD.replace("https://host/x", "package:../../../etc/passwd"), "is outside of the package"),
        (GOOD.replace("https://host/x", "ftp://host/x"), "expected https://, hf: or a path"),
        (GOOD.replace("https://host/x", "hf:owner"), "expected hf:owner/name/path"),
        (GOOD + 'sha256 = "12"\n', "expected 64 digits"),
        (GOOD + "size = -1\n", "expected a number of bytes"),
        (GOOD + "shasum = 1\n", "unknown key shasum"),
        (GOOD + 'config = "x"\n', "config is not a table"),
        (GOOD + "settings = 1\n", "settings is not a table"),
        (GOOD + 'same_as = "mini.vqgan"\n', "same_as is combined with other keys"),
        ('[own.vqgan]\nsame_as = "mini.clip"\n', "expected 'SET.vqgan', where SET is defined before this set"),
        ('[own.vqgan]\nsame_as = "nowhere.vqgan"\n', "expected 'SET.vqgan'"),
        (
            GOOD + 'config = { file = "last.ckpt", places = ["x"] }\n',
            "name of one of its files begins with that of another",
        ),
        (
            GOOD + 'config = { file = "last.ckpt.json", places = ["x"] }\n',
            "name of one of its files begins with that of another",
        ),
        (GOOD.replace("own", "hub"), "the names hub and open_clip are reserved"),
        (GOOD.replace("https://host/x", "hf:own--er/../x"), "expected hf:owner/name/path"),
        ("# " + "x" * (1 << 20), "at most 1,048,576"),
        (GOOD + 'licence = "a\\nb"\n', "licence is not one line of text"),
    ),
)
def test_invalid_registries_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "weights.toml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_registry(tmp_path / "weights.toml")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_bundled_registry() -> None:
    known = read_registry()
    assert {"mini", "dall3", "dalle-mega", "dalle-mini", "rudalle-malevich", "openai-512-uncond"} <= known.keys()
    (file,) = files_of(known["openai-256-uncond"])
    assert file.target in [one.target for one in files_of(known["dalle-mega"])]  # downloaded once
    assert file.file.places[0].size == 2_211_383_297
    assert all(one.part.licence and one.part.source for name in known for one in files_of(known[name]))
    with pytest.raises(ValueError, match="no set of weights is called 'dalle3'; did you mean dall3"):
        find_set("dalle3")


def test_a_users_own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.toml").write_text(GOOD + GOOD.replace("own", "mini"))
    monkeypatch.setenv("DALL3_WEIGHTS", str(tmp_path / "weights.toml"))
    assert [part.name for part in find_set("mini").parts] == ["vqgan"] and "own" in read_registry()

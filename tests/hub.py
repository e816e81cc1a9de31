"""A local server with the behaviour of the Hugging Face Hub and of plain hosts that downloads of weights need."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 10_000  # bytes from which the hub stores a file in LFS and redirects to it
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files by path: "/owner/name/resolve/main/file" as the hub has them, "/host/path" as a plain host has them.

    break_off: paths whose first response is truncated. log: method, path and Range header of each request.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.break_off = files, set[str]()
        self.hashes = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        self.log: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(None)

    def answer(self, body: bytes | None) -> None:
        """Send a file. body: sent instead of the file, with the headers of the file."""
        hub, path = self.server, self.path
        hub.log.append((self.command, path, self.headers.get("Range")))
        data = hub.hashes.get(path.removeprefix("/lfs/")) if path.startswith("/lfs/") else hub.files.get(path)
        if data is None:
            return self.send(404, b"", {})
        sha256 = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if "/resolve/main/" in path:
            headers["X-Repo-Commit"] = COMMIT
            if len(data) >= LARGE:
                headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "ETag": f'"{sha256[:40]}"'}
                storage = f"http://localhost:{hub.server_port}"  # another host name, as that of the hub's storage
                return self.send(302, b"", headers | {"Location": f"{storage}/lfs/{sha256}"})
        wanted, tag = self.headers.get("Range"), self.headers.get("If-Range")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and tag in (None, headers["ETag"]) else 0
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.send(206 if start else 200, data[start:] if body is None else body, headers, len(data) - start)

    def send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        breaks = self.path in self.server.break_off and self.command == "GET"
        if breaks:
            self.server.break_off.discard(self.path)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body[: len(body) // 3] if breaks else body)
        self.close_connection = self.close_connection or breaks

    def log_message(self, *args: object) -> None:
        pass

"""A real HTTP server on loopback that gives files in ranges, and can be told to misbehave."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = b"<html><body>We are sorry</body></html>"


class FileServer(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        fault: how requests for shards fail: `500`, `403`, `html`, `cut`, `stall`, or none.
        failures: how many requests of each path fail so.
        ranges: whether it knows ranges.
        delay: seconds before each answer.
        asked: number of requests by (path, range).
        at_once: most requests that were open at a time.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.fault, self.failures, self.ranges, self.delay = root, "", 0, True, 0.0
        self.asked: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[str] = Counter()
        self.open_now = self.at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        with server.lock:
            server.asked[self.path, asked] += 1
            server.open_now += 1
            server.at_once = max(server.at_once, server.open_now)
            failing = self.path.endswith((".tar", ".idx")) and server.failed[self.path] < server.failures
            server.failed[self.path] += failing
        try:
            time.sleep(server.delay)
            self._answer(asked, server.fault if failing else "")
        finally:
            with server.lock:
                server.open_now -= 1

    def _answer(self, asked: str, fault: str) -> None:
        path = self.server.root / self.path.lstrip("/")
        if fault in ("500", "403"):
            self._send(int(fault), PAGE)
        elif fault == "html":
            self._send(200, PAGE)
        elif fault == "stall":
            time.sleep(2.0)
            self.close_connection = True
        elif not path.is_file():
            self._send(404, PAGE)
        else:
            body, status = path.read_bytes(), 200
            if self.server.ranges and (found := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)):
                body, status = body[int(found[1]) : int(found[2]) + 1], 206
            self._send(status, body, cut=fault == "cut")

    def _send(self, status: int, body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Quiet."""


@contextmanager
def serving(root: Path) -> Iterator[FileServer]:
    """A server for a folder, stopped at the end."""
    server = FileServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

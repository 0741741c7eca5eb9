"""A small stand-in of W&B's server on loopback, and a reader of what W&B writes offline.

It answers what `wandb` 0.31 asks: a run's creation and resume by GraphQL, its rows by file_stream, its files by PUT.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_BLOCK = 32768


class StandIn(ThreadingHTTPServer):
    """The server; ``runs`` holds what it was told, by run id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.files: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes W&B talk to it."""
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}",
            "WANDB_API_KEY": "local-" + "a" * 40,
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""

    def run(self, name: str) -> dict[str, Any]:
        empty: dict[str, Any] = {
            "config": {},
            "summary": {},
            "history": [],
            "events": [],
            "console": [],
            "exit": None,
        }
        return self.runs.setdefault(name, empty)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """One GraphQL operation."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
        self.operations.append(operation[1] if operation else "")
        if self.operations[-1] == "Viewer":
            viewer = {
                "id": "U",
                "entity": "me",
                "username": "me",
                "email": "a@b",
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {"viewer": viewer}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if "upsertBucket" in query:
            return {"upsertBucket": self._upsert(variables)}
        if self.operations[-1] == "RunResumeStatus":
            return {
                "model": {
                    "id": "P",
                    "name": variables.get("project"),
                    "entity": _ENTITY,
                    "bucket": self._past(variables),
                }
            }
        if "createRunFiles" in query:
            name = variables["run"]
            address = f"http://127.0.0.1:{self.server_port}/upload/{name}"
            files = [{"name": file, "uploadUrl": f"{address}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": _id(name), "uploadHeaders": [], "files": files}}
        return {}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        new, run = name not in self.runs, self.run(name)
        if variables.get("config"):
            run["config"] = json.loads(variables["config"])
        shown = variables.get("displayName") or name
        project = {"id": "P", "name": variables.get("project") or "p", "entity": _ENTITY}
        bucket = {
            "id": _id(name), "name": name, "displayName": shown, "description": "", "sweepName": None,
            "config": json.dumps(run["config"]), "historyLineCount": len(run["history"]), "project": project,
        }  # fmt: skip
        return {"inserted": new, "bucket": bucket}

    def _past(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(variables["name"])
        if run is None:
            return None
        return {
            "id": _id(variables["name"]), "name": variables["name"], "displayName": variables["name"],
            "summaryMetrics": json.dumps(run["summary"]), "config": json.dumps(run["config"]),
            "historyLineCount": len(run["history"]), "eventsLineCount": len(run["events"]),
            "logLineCount": len(run["console"]),
            "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
            "eventsTail": "[]", "tags": [], "notes": None, "wandbConfig": '{"t":1}',
        }  # fmt: skip

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Rows of history, events, console; the summary; the end."""
        run = self.run(name)
        for file, chunk in (body.get("files") or {}).items():
            offset, rows = chunk.get("offset", 0), chunk.get("content", [])
            if "summary" in file:
                run["summary"].update(json.loads(rows[-1]))
                continue
            kind = "history" if "history" in file else "events" if "events" in file else "console"
            run[kind][offset : offset + len(rows)] = (
                rows if kind == "console" else [json.loads(r) for r in rows]
            )
        if body.get("complete"):
            run["exit"] = body.get("exitcode")


_ENTITY = {"id": "E", "name": "me"}


def _id(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self._body()
        self._send({})

    def do_POST(self) -> None:
        body, streamed = self._body(), re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            self._send({"data": self.server.answer(request["query"], request.get("variables") or {})})
        elif streamed:
            self.server.stream(streamed[1], json.loads(body))
            self._send({"limits": {}})
        else:
            self._send({})


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a `.wandb` file: 7 bytes of header, then LevelDB's log of 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is no .wandb file")
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        body = data[place + 7 : place + 7 + length]
        if len(body) < length or kind == 0:
            return  # the writer was killed here
        parts, place = (body if kind in (1, 2) else parts + body), place + 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a run."""
    return [_items(r.history.item) for r in records(path) if r.WhichOneof("record_type") == "history"]


def configuration(path: Path) -> dict[str, Any]:
    """The configuration of a run."""
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "config":
            found.update(_items(record.config.update))
    return found


def run_ids(folder: Path) -> list[str]:
    """Ids of the offline runs in a run directory, oldest first."""
    return [path.stem.removeprefix("run-") for path in offline_files(folder)]


def offline_files(folder: Path) -> list[Path]:
    """The `.wandb` files of a run directory, oldest first."""
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))

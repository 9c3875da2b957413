"""A Hub on the loopback interface: enough of its protocol for downloads, and what was asked of it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """``repos`` maps ids to files by name; ``status`` maps an id to an HTTP status that is sent instead."""

    repos: dict[str, dict[str, bytes]]
    status: dict[str, int] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    sent: int = 0
    url: str = ""


@contextmanager
def fake_hub(repos: dict[str, dict[str, bytes]], status: dict[str, int] | None = None) -> Iterator[FakeHub]:
    hub = FakeHub(repos, status or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo, rest = "/".join(parts[2:4]), parts[4:]
            else:
                repo, rest = "/".join(parts[:2]), parts[2:]
            refused = hub.status.get(repo, 404 if repo not in hub.repos else 0)
            if refused:
                code = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}.get(refused, "")
                self._send(
                    refused,
                    b'{"error": "refused"}',
                    {"X-Error-Code": code, "X-Error-Message": "refused"},
                    body,
                )
                return
            files = hub.repos[repo]
            if parts[0] == "api":
                if rest[:1] == ["revision"] and rest[1] not in ("main", SHA):
                    self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                elif rest[:1] == ["tree"]:
                    tree = [
                        {"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()
                    ]
                    self._send(200, json.dumps(tree).encode(), {}, body)
                else:
                    info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
                    self._send(200, json.dumps(info).encode(), {}, body)
                return
            name = "/".join(rest[2:])
            if rest[:1] != ["resolve"] or name not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            if body:
                hub.fetched.append(f"{repo}/{name}")
            headers = {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            data, status = files[name], 200
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                start, end = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                data, status = data[start : end + 1], 206
            hub.sent += len(data) if body else 0
            self._send(status, data, headers, body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()

"""Requests to programs on this machine are answered although every proxy that is named leads nowhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from ggufrq.base import loopback
from ggufrq.base.errors import ToolError
from ggufrq.measure.validate.client import Client
from ggufrq.tools import server


@pytest.fixture
def url() -> Iterator[str]:
    """A server that says that it is well, that every text is one token, and what else it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, found: object) -> None:
            data = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer({"status": "ok", "authorization": self.headers["Authorization"]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({"tokens": [7]} if self.path == "/tokenize" else [self.path])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


def test_proxies_are_passed_by(url: str) -> None:
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get(url, timeout=5)
    with loopback.session() as session:
        assert session.get(url, timeout=5).json()["status"] == "ok"


def test_every_request_to_a_server_passes_them_by(url: str) -> None:
    assert server.healthy(url)
    with server.Connection(url) as connection:
        assert connection.healthy()
        assert connection.post("tokenize", {"content": "x"}) == {"tokens": [7]}
        with pytest.raises(ToolError, match="something else than was asked for"):
            connection.post("slots/0?action=save", {})
    client = Client(url)
    assert client.tokenize("x") == [7]
    client.close()


def test_what_is_not_there_is_not_healthy() -> None:
    assert not server.healthy("http://127.0.0.1:9")

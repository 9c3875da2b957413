"""What listens on 127.0.0.1 in tests: RPC servers, and one between a client and a server; and
proxies that lead nowhere."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.base.loopback import free_port
from ggufrq.build.project import Build

#: All that names a proxy, and a proxy that is not there.
PROXY_VARIABLES = tuple(
    spelled
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    for spelled in (name, name.lower())
)
DEAD_PROXY = "http://127.0.0.1:9"


def proxies_lead_nowhere(patch: pytest.MonkeyPatch) -> None:
    """Who asks a proxy for something on this machine gets no answer."""
    for name in PROXY_VARIABLES:
        if name.lower() == "no_proxy":
            patch.delenv(name, raising=False)
        else:
            patch.setenv(name, DEAD_PROXY)


def no_proxies(patch: pytest.MonkeyPatch) -> None:
    """For what asks proxies for good reasons, as a client of the Hub does."""
    for name in PROXY_VARIABLES:
        patch.delenv(name, raising=False)


@contextlib.contextmanager
def rpc_server(
    build: Build, log: Path, *options: str, env: proc.Environment | None = None
) -> Iterator[tuple[str, proc.Running]]:
    """A ggml-rpc-server with one thread: its address for ``--rpc`` and its process, which is stopped at the
    end, whatever happens."""
    port = free_port()
    command = [build.tool("ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1", *options]
    with proc.start(command, env={"OMP_NUM_THREADS": "1", **(env or {})}, log=log) as server:
        deadline = time.monotonic() + 20
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.02)
        yield f"127.0.0.1:{port}", server


@contextlib.contextmanager
def rpc_servers(build: Build, folder: Path, count: int = 2) -> Iterator[str]:
    """Some RPC servers: what ``--rpc`` takes."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(rpc_server(build, folder / f"rpc-{i}.log")) for i in range(count)]
        yield ",".join(address for address, _ in started)


@contextlib.contextmanager
def changing(address: str, what: bytes, to: bytes) -> Iterator[str]:
    """An address that leads to ``address`` and changes the bytes ``what`` in what comes from there."""
    host, _, port = address.partition(":")

    def forward(source: socket.socket, target: socket.socket, change: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data.replace(what, to) if change else data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    class Between(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, int(port))) as server:
                back = threading.Thread(target=forward, args=(server, self.request, True))
                back.start()
                forward(self.request, server, False)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Between) as between:
        threading.Thread(target=between.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{between.server_address[1]}"
        between.shutdown()

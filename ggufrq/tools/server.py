"""llama-server: its arguments, requests to it, and how it reports them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from ggufrq.base import loopback
from ggufrq.base.errors import ToolError
from ggufrq.cache.kv import KvPlan

#: Seconds for one request: a long prompt through a slow cache on a slow machine.
_TIMEOUT = 3600.0

_DONE = re.compile(r"print_timing: id +(\d+) \| task (\d+) \| +total time = +([\d.]+) ms / +(\d+) tokens")


@dataclass(frozen=True)
class Request:
    """A request that the server has answered: its slot, task, milliseconds and tokens (prompt and answer)."""

    slot: int
    task: int
    ms: float
    tokens: int


def arguments(
    model: Path,
    plan: KvPlan,
    *,
    host: str,
    port: int,
    n_ctx: int,
    parallel: int = 1,
    threads: int | None = None,
    extra: tuple[str, ...] = (),
) -> list[str]:
    """Arguments of a server with ``parallel`` slots that share a context of ``n_ctx`` tokens."""
    args = ["-m", str(model), "--host", host, "--port", str(port), "-c", str(n_ctx), "-np", str(parallel)]
    args += ["-fa", "on", *plan.arguments()]
    args += ["-lv", "4", "--log-colors", "off"]
    if threads:
        args += ["-t", str(threads)]
    return [*args, *extra]


class Connection:
    """Requests to the server at ``url``, which is on this machine. A context manager that lets it go."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = loopback.session()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the connection go."""
        self._session.close()

    def healthy(self, *, timeout: float = 2.0) -> bool:
        """Whether the server says that it is ready. False while it loads or does not answer."""
        try:
            answer = self._session.get(f"{self.url}/health", timeout=timeout)
        except requests.RequestException:
            return False
        return answer.status_code == 200

    def post(self, path: str, body: dict[str, Any], *, timeout: float = _TIMEOUT) -> dict[str, Any]:
        """The answer to a request. Raises ToolError with the server's reason."""
        try:
            answer = self._session.post(f"{self.url}/{path}", json=body, timeout=timeout)
            found = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise ToolError(f"llama-server did not answer a request: {error}") from None
        if answer.status_code != 200:
            why = found.get("error", {}).get("message") if isinstance(found, dict) else None
            raise ToolError(f"llama-server refused a request: {why or answer.status_code}")
        if not isinstance(found, dict):
            raise ToolError("llama-server answered with something else than was asked for")
        return found


def healthy(url: str) -> bool:
    """Whether the server at ``url`` says that it is ready."""
    with Connection(url) as connection:
        return connection.healthy()


def parse_requests(log: str) -> list[Request]:
    """Requests that the log tells of, in the order in which they ended."""
    return [Request(int(m[1]), int(m[2]), float(m[3]), int(m[4])) for m in _DONE.finditer(log)]

"""llama-server: its arguments, whether it is up, and how it reports a request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import requests

from ggufrq.cache.kv import KvPlan

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


def healthy(url: str, *, timeout: float = 2.0) -> bool:
    """Whether the server at ``url`` says that it is ready. False while it loads or does not answer."""
    try:
        answer = requests.get(f"{url}/health", timeout=timeout)
    except requests.RequestException:
        return False
    return answer.status_code == 200


def parse_requests(log: str) -> list[Request]:
    """Requests that the log tells of, in the order in which they ended."""
    return [Request(int(m[1]), int(m[2]), float(m[3]), int(m[4])) for m in _DONE.finditer(log)]

"""llama-server with quantized K and V: started, waited for, and stopped without leaving anything behind."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import log, loopback, paths, proc
from ggufrq.base.errors import ToolError, UsageError
from ggufrq.cache.kv import KvPair, KvPlan
from ggufrq.drive import cache_check, profiles
from ggufrq.drive.remedies import remedy
from ggufrq.drive.threads import patience
from ggufrq.ggufs.drafts import draft_kind
from ggufrq.tools import passed_on, server
from ggufrq.tools.logs import (
    MTP,
    Context,
    error_lines,
    failed_draft,
    is_of_heads,
    parse_context,
    parse_draft,
    uses,
)
from ggufrq.tools.programs import Programs

DEFAULT_PORT = 8080
#: Any free one, for a server that only we ourselves talk to.
ANY_PORT = 0
_POLL = 0.2


@dataclass(frozen=True)
class Draft:
    """What guesses tokens ahead, which the model then checks together: a smaller model of its vocabulary, a
    draft that was made for it (EAGLE-3, DFlash, DSpark, a head in a file of its own), or with None the
    model's own head (MTP); and what its K and V are kept in."""

    model: Path | None
    kv: KvPair

    def arguments(self) -> tuple[str, ...]:
        """For llama-server. Raises ModelError for a damaged draft."""
        which = ("draft-mtp",) if self.model is None else (draft_kind(self.model), "-md", str(self.model))
        return ("--spec-type", *which, "-ctkd", self.kv.k.name, "-ctvd", self.kv.v.name)


@dataclass
class Server:
    """A server that is ready: its address, its process, its log, and the cache that it keeps, as asked for
    and as told, with its exact bytes where they can be told, what is said of its profile, and name and
    context of a draft."""

    url: str
    process: proc.Running
    log: Path
    plan: KvPlan
    context: Context
    kv_bytes: int | None
    profile: str | None
    draft: tuple[str, Context] | None = None


def choose_port(host: str, port: int | None) -> int:
    """``port`` if it is free; with None 8080, or a free one if that is taken; any free one with ``ANY_PORT``.
    Raises UsageError when the port asked for is taken."""
    if port == ANY_PORT:
        return _any_free(host)
    if port is not None:
        if not _is_free(host, port):
            raise UsageError(
                f"port {port} of {host} cannot be used, something else listens there",
                remedy="--port N with another one, or without --port: then a free one is found",
            )
        return port
    return DEFAULT_PORT if _is_free(host, DEFAULT_PORT) else _any_free(host)


@contextmanager
def serving(
    model: Path,
    plan: KvPlan,
    programs: Programs,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    n_ctx: int = 4096,
    parallel: int = 1,
    threads: int | None = None,
    timeout: float = 600.0,
    draft: Draft | None = None,
    extra: tuple[str, ...] = (),
    env: proc.Environment | None = None,
    log_path: Path | None = None,
    on_log: Callable[[str], None] | None = None,
) -> Iterator[Server]:
    """A running llama-server, ready for requests; it is stopped at the end, whatever happens, even when this
    process is killed.

    The plan's profile is looked for first (``profiles``). ``env`` is added to the server's environment, and
    ``extra`` are options for it; UsageError for one that changes what is relied on (``passed_on``).
    ``log_path`` is written anew, by default a file among the logs. ``on_log`` gets its log by pieces while it
    starts. Raises ToolError with llama.cpp's own reason when it does not come up within ``timeout`` seconds
    or does not keep the cache as ``plan`` says, or that of the ``draft`` as that says.
    """
    passed_on.check(extra)
    extra = (*(draft.arguments() if draft is not None else ()), *extra)
    chosen = choose_port(host, port)
    places = passed_on.places(extra)
    plan, profile = profiles.settle(plan, model, n_ctx, programs.build, threads, places)
    log_path = log_path or paths.logs_dir() / f"llama-server-{chosen}.log"
    args = server.arguments(
        model, plan, host=host, port=chosen, n_ctx=n_ctx, parallel=parallel, threads=threads, extra=extra
    )
    tool = programs.tool("llama-server")
    url = f"http://{_reachable(host)}:{chosen}{passed_on.api_prefix(extra, env)}"
    log.say(f"starting llama-server; its log is {log_path}")
    with started(
        [tool, *args],
        url,
        log_path=log_path,
        env={**patience(), **(env or {}), **plan.environment()},
        timeout=timeout,
        on_log=on_log,
    ) as process:
        text = log_path.read_text(encoding="utf-8", errors="replace")
        context = parse_context(text)
        kept = plan if context is None else cache_check.as_kept(context, plan)
        if context is None or not cache_check.as_asked(context, kept):
            instead = "" if context is None else f", but {cache_check.found(context)}"
            raise ToolError(
                f"llama-server does not keep its cache in {plan.title}{instead}", remedy=f"see {log_path}"
            )
        plan = kept
        size = cache_check.cache_bytes(context, plan, model)
        found = parse_draft(text)
        if draft is not None and (found is None or not uses(found[1], draft.kv)):
            instead = "" if found is None else f", but {cache_check.found(found[1])}"
            raise ToolError(
                f"llama-server does not keep the cache of the draft in {draft.kv.name}{instead}",
                remedy=f"see {log_path}",
            )
        yield Server(url, process, log_path, plan, context, size, profile, found)


@contextmanager
def started(
    command: proc.Arguments,
    url: str,
    *,
    log_path: Path,
    cwd: Path | None = None,
    env: proc.Environment | None = None,
    timeout: float = 600.0,
    on_log: Callable[[str], None] | None = None,
) -> Iterator[proc.Running]:
    """A llama-server by its command line, from when it is ready at ``url`` to the end of the ``with`` block;
    ``serving`` makes the command line, too. Parameters and errors are as there."""
    log_path.unlink(missing_ok=True)
    with proc.start(command, cwd=cwd, env=env, log=log_path) as process:
        _wait(process, url, log_path, timeout, Follower(log_path, on_log))
        yield process


class Follower:
    """Hands what is added to a log to a callback."""

    def __init__(self, path: Path, on_text: Callable[[str], None] | None) -> None:
        self._path = path
        self._on_text = on_text
        self._at = 0

    def poll(self) -> None:
        """Hand over what has been added since the last time."""
        if self._on_text is None or not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            added = file.read()
        complete = added[: added.rfind(b"\n") + 1]
        self._at += len(complete)
        if complete:
            self._on_text(complete.decode(errors="replace"))


def watch(running: Server, on_log: Callable[[str], None] | None = None) -> None:
    """Follow the server until it ends by itself, which raises ToolError, or an exception stops the
    watching."""
    follower = Follower(running.log, on_log)
    while running.process.poll() is None:
        follower.poll()
        time.sleep(_POLL)
    follower.poll()
    raise _died(running.process, running.log, "ended by itself")


def example(url: str) -> str:
    """A request to try, as a command line."""
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        '  -d \'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}\''
    )


def _wait(process: proc.Running, url: str, log_path: Path, timeout: float, follower: Follower) -> None:
    deadline = time.monotonic() + timeout
    while True:
        follower.poll()
        if process.poll() is not None:
            raise _died(process, log_path, "ended before it was ready")
        if server.healthy(url):
            return
        if time.monotonic() > deadline:
            raise ToolError(
                f"llama-server was not ready within {timeout:g} s\n{_last_lines(log_path)}",
                remedy=f"--timeout with more seconds for a large model; see {log_path}",
            )
        time.sleep(_POLL)


def _died(process: proc.Running, log_path: Path, how: str) -> ToolError:
    text = log_path.read_text(encoding="utf-8", errors="replace") if log_path.is_file() else ""
    reasons = error_lines(text)
    detail = reasons[0] if reasons else f"exit status {process.poll()}\n{_last_lines(log_path)}"
    draft = failed_draft(text)
    if draft is None:
        return ToolError(f"llama-server {how}: {detail}", remedy=remedy(detail, log_path))
    instead = f"see {log_path}"
    if is_of_heads(detail):
        instead = "--draft-kv f16, or -ctkd f16 -ctvd f16 where the draft was named behind --"
    elif draft == MTP:
        without = "without --spec-type draft-mtp (or --draft mtp)"
        instead = f"a model that was made with this head, or {without}; {instead}"
    return ToolError(f"llama-server {how}: the draft, {draft}: {detail}", remedy=instead)


def _last_lines(log_path: Path, count: int = 6) -> str:
    text = log_path.read_text(encoding="utf-8", errors="replace") if log_path.is_file() else ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-count:])


def _is_free(host: str, port: int) -> bool:
    with socket.socket(loopback.family(host), socket.SOCK_STREAM) as probe:
        # as llama-server does it: a port that was just let go may be used again
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _any_free(host: str) -> int:
    try:
        return loopback.free_port(host)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}: {error.strerror}", remedy="--host 127.0.0.1") from error


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host

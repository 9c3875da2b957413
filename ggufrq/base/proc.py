"""The one module that runs other programs: output streamed and logged, time limits, and a clean kill.

Each program gets its own process group, so that stopping it stops the compilers or helpers it started as
well.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from ggufrq.base import texts
from ggufrq.base.environment import Environment as Environment
from ggufrq.base.environment import of_program
from ggufrq.base.errors import ToolError

_logger = logging.getLogger(__name__)

#: Seconds between TERM and KILL.
GRACE = 5.0
#: Seconds to wait for the end of the output once the program itself has ended (a grandchild may hold the
#: pipe).
_DRAIN = 2.0
#: Lines of output quoted in an error.
_QUOTED = 6

#: Waits until the program that started it is gone, however it ended, and then ends the group $1, first
#: politely. Its input is a pipe that nobody writes to and that closes with that program.
_WATCHDOG = """
read -r _
kill -s TERM -- "-$1"
for _ in 1 2 3 4 5; do kill -s 0 -- "-$1" || exit 0; sleep 1; done
kill -s KILL -- "-$1"
"""

_POSIX = os.name == "posix"
_CREATION_FLAGS: int = 0 if _POSIX else getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)

#: When it is set, what ``run`` waits for in this thread is ended.
_stop: ContextVar[threading.Event | None] = ContextVar("_stop", default=None)

Arguments = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Completed:
    """A program that has ended: its arguments, exit status, whole output, and wall-clock seconds."""

    args: list[str]
    rc: int
    stdout: str
    stderr: str
    seconds: float


def run(
    args: Arguments,
    *,
    cwd: Path | None = None,
    env: Environment | None = None,
    log: Path | None = None,
    timeout: float | None = None,
    stdin: str | None = None,
    on_stdout: Callable[[str], None] | None = None,
    on_stderr: Callable[[str], None] | None = None,
    check: bool = True,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a program to its end.

    ``env`` is added to the environment (see there; a value of None removes that variable). ``log`` is
    appended to: the command first, then its output as it comes. ``stdin`` is fed as text; None means no
    input. ``on_stdout`` gets text in chunks as it comes, ``on_stderr`` whole lines without their ends; both
    are called in the calling thread. On a time limit, Ctrl-C or any other exception the program's whole group
    is ended, first politely; on POSIX also when this process is killed.

    Raises ToolError when the program is missing or takes longer than ``timeout`` seconds and, with ``check``,
    when it exits with anything but 0; the message quotes its last lines and names the log.
    """
    command = [os.fspath(argument) for argument in args]
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        sink = _open_log(log, command, cwd, stack)
        process = _spawn(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        watchdog = _watch_over(process)
        try:
            if stdin is not None:
                _thread(_feed, process, stdin)
            out, err = _pump(process, command, started, timeout, sink, on_stdout, on_stderr)
        except BaseException:
            _end_group(process)
            raise
        finally:
            _call_off(watchdog)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        seconds = time.monotonic() - started
        if sink is not None:
            sink.write(f"# exit status {process.returncode} after {seconds:.1f} s\n".encode())
    completed = Completed(command, process.returncode, out, err, seconds)
    _logger.debug("exit status %d after %.2f s", completed.rc, seconds)
    if check and completed.rc != 0:
        raise ToolError(failure_message(completed), remedy=f"see {log}" if log else None)
    return completed


@contextlib.contextmanager
def stoppable(stop: threading.Event) -> Iterator[None]:
    """For a thread that no signal reaches: setting ``stop`` ends the program that this thread runs, and its
    ``run`` raises ToolError."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def failure_message(completed: Completed) -> str:
    """One message for a program that failed: its name, how it ended, and its last lines."""
    lines = [
        line for line in (completed.stderr.strip() or completed.stdout.strip()).splitlines() if line.strip()
    ]
    return "\n".join([how_it_ended(completed), *("  " + line for line in lines[-_QUOTED:])])


def how_it_ended(completed: Completed) -> str:
    """The name of a program that failed, and by which status or signal it ended."""
    name, rc = Path(completed.args[0]).name, completed.rc
    return (
        f"{name} was ended by signal {_signal_name(-rc)}"
        if rc < 0
        else f"{name} failed with exit status {rc}"
    )


@dataclass
class Running:
    """A program left running in the background, such as a server. A context manager that stops it.

    On POSIX it does not outlive this process, even when that is killed.
    """

    args: list[str]
    process: subprocess.Popen[bytes]
    log: Path | None
    watchdog: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        return self.process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status. Raises ToolError after ``timeout`` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"{Path(self.args[0]).name} still runs after {timeout:g} s") from error

    def stop(self) -> int:
        """End it and all that it started, politely first; returns its exit status."""
        _end_group(self.process)
        _call_off(self.watchdog)
        return self.process.returncode

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(
    args: Arguments, *, cwd: Path | None = None, env: Environment | None = None, log: Path | None = None
) -> Running:
    """Start a program in the background with its output appended to ``log`` (or dropped). See
    ``Running.stop``.

    Raises ToolError when the program is missing.
    """
    command = [os.fspath(argument) for argument in args]
    with contextlib.ExitStack() as stack:
        sink = _open_log(log, command, cwd, stack)
        process = _spawn(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=sink if sink is not None else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
    return Running(command, process, log, _watch_over(process))


def _watch_over(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes] | None:
    """A watchdog that ends the group of ``process`` when this process is gone; None where there can be
    none."""
    # Not PR_SET_PDEATHSIG: that is Linux alone, acts when the starting thread ends, and takes a preexec_fn.
    if not _POSIX:
        return None
    try:
        return _spawn(
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", str(process.pid)],
            cwd=None,
            env=None,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except ToolError as error:
        _logger.debug("no watchdog: %s", error)
        return None


def _call_off(watchdog: subprocess.Popen[bytes] | None) -> None:
    if watchdog is not None:
        watchdog.kill()
        watchdog.wait()
        assert watchdog.stdin is not None
        watchdog.stdin.close()


def _spawn(
    command: list[str],
    *,
    cwd: Path | None,
    env: Environment | None,
    stdin: int | IO[bytes],
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    _logger.debug("run: %s%s", shlex.join(command), f"  (in {cwd})" if cwd else "")
    if cwd is not None and not cwd.is_dir():
        raise ToolError(f"cannot run {Path(command[0]).name}: the folder {cwd} does not exist")
    try:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=of_program(command[0], env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            bufsize=0,
            start_new_session=_POSIX,
            pass_fds=tuple(pass_fds) if _POSIX else (),
            creationflags=_CREATION_FLAGS,
        )
    except FileNotFoundError as error:
        raise ToolError(
            f"the program '{command[0]}' is not there",
            remedy="run `ggufrq doctor`, which names what is missing and how to get it",
        ) from error
    except OSError as error:
        raise ToolError(f"cannot run '{command[0]}': {error.strerror}") from error
    except ValueError:  # a zero byte, which no program can be given
        raise ToolError(f"cannot run {Path(command[0]).name}: one of its arguments has a zero byte") from None


def _open_log(
    log: Path | None, command: list[str], cwd: Path | None, stack: contextlib.ExitStack
) -> IO[bytes] | None:
    if log is None:
        return None
    log.parent.mkdir(parents=True, exist_ok=True)
    sink = stack.enter_context(log.open("ab", buffering=0))
    where = f"  (in {cwd})" if cwd else ""
    sink.write(texts.to_bytes(f"$ {shlex.join(command)}{where}\n"))
    return sink


def _thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _feed(process: subprocess.Popen[bytes], text: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # the program may not care for its input
        process.stdin.write(texts.to_bytes(text))
    with contextlib.suppress(OSError):
        process.stdin.close()


def _read(name: str, stream: IO[bytes], items: queue.SimpleQueue[tuple[str, bytes]]) -> None:
    with contextlib.suppress(OSError, ValueError):
        while chunk := os.read(stream.fileno(), 65536):
            items.put((name, chunk))
    items.put((name, b""))


def _pump(
    process: subprocess.Popen[bytes],
    command: list[str],
    started: float,
    timeout: float | None,
    sink: IO[bytes] | None,
    on_stdout: Callable[[str], None] | None,
    on_stderr: Callable[[str], None] | None,
) -> tuple[str, str]:
    """Move output from the pipes to the log, the callbacks and the result until both pipes and program have
    ended.
    """
    stop = _stop.get()
    items: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    assert process.stdout is not None and process.stderr is not None
    _thread(_read, "out", process.stdout, items)
    _thread(_read, "err", process.stderr, items)
    decoders = {name: codecs.getincrementaldecoder("utf-8")(errors="replace") for name in ("out", "err")}
    text: dict[str, list[str]] = {"out": [], "err": []}
    partial_line = ""
    opened = {"out", "err"}
    ended_at: float | None = None
    while opened:
        if stop is not None and stop.is_set():
            raise ToolError(f"{Path(command[0]).name} was stopped")
        now = time.monotonic()
        if timeout is not None and now - started > timeout:
            name = Path(command[0]).name
            raise ToolError(f"{name} did not finish within {timeout:g} s and was stopped")
        if ended_at is None and process.poll() is not None:
            ended_at = now
        if ended_at is not None and now - ended_at > _DRAIN:
            _signal_group(process, kill=True)
            break
        try:
            name, chunk = items.get(timeout=0.1)
        except queue.Empty:
            continue
        if not chunk:
            opened.discard(name)
        elif sink is not None:
            sink.write(chunk)
        decoded = decoders[name].decode(chunk, final=not chunk)
        if not decoded:
            continue
        text[name].append(decoded)
        if name == "out" and on_stdout is not None:
            on_stdout(decoded)
        if name == "err" and on_stderr is not None:
            *lines, partial_line = (partial_line + decoded).split("\n")
            for line in lines:
                on_stderr(line.rstrip("\r"))
    if partial_line and on_stderr is not None:
        on_stderr(partial_line.rstrip("\r"))
    while process.poll() is None:  # a program may close its output long before it ends
        if timeout is not None and time.monotonic() - started > timeout:
            raise ToolError(f"{Path(command[0]).name} did not finish within {timeout:g} s and was stopped")
        time.sleep(0.02)
    return "".join(text["out"]), "".join(text["err"])


def _signal_group(process: subprocess.Popen[bytes], *, kill: bool) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if _POSIX:
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
        elif kill:
            process.kill()
        else:
            process.terminate()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is None:
        return True
    if not _POSIX:
        return False
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, kill=False)
    deadline = time.monotonic() + GRACE
    while _group_lives(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    if _group_lives(process):
        _signal_group(process, kill=True)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        if not _POSIX:
            raise
        # an exception out of a signal's handler can leave the lock of ``wait`` taken for ever
        process.returncode = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)

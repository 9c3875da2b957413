from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import alive, gone

from ggufrq.base import proc
from ggufrq.base.errors import ToolError

posix = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_output_status_and_seconds() -> None:
    done = proc.run(python("import sys; print('out'); print('err', file=sys.stderr)"))
    assert (done.rc, done.stdout, done.stderr) == (0, "out\n", "err\n")
    assert 0 < done.seconds < 20


def test_stdout_comes_in_chunks_before_the_end(tmp_path: Path) -> None:
    """The program goes on only when its first word was seen."""
    seen, mark = list[str](), tmp_path / "seen"

    def see(text: str) -> None:
        seen.append(text)
        mark.touch()

    code = (
        "import os, sys, time\n"
        "print('a', end='', flush=True)\n"
        f"while not os.path.exists({str(mark)!r}): time.sleep(0.01)\n"
        "print('b', end='')"
    )
    done = proc.run(python(code), on_stdout=see, timeout=60)
    assert seen == ["a", "b"]
    assert done.stdout == "ab"


def test_stderr_comes_in_lines_the_last_one_too() -> None:
    lines: list[str] = []
    proc.run(
        python("import sys; sys.stderr.write('one\\r\\ntwo\\nthr'); sys.stderr.write('ee')"),
        on_stderr=lines.append,
    )
    assert lines == ["one", "two", "three"]


def test_a_character_split_between_chunks_is_whole() -> None:
    code = "import os,time; os.write(1, b'\\xe2\\x82'); time.sleep(0.2); os.write(1, b'\\xac\\xff')"
    assert proc.run(python(code)).stdout == "€�"


def test_stdin_is_fed_or_empty() -> None:
    code = "import sys; print(len(sys.stdin.read()))"
    assert proc.run(python(code), stdin="x" * 200_000).stdout.strip() == "200000"
    assert proc.run(python(code)).stdout.strip() == "0"


def test_a_program_that_ignores_its_input_is_no_error() -> None:
    assert proc.run(python("pass"), stdin="x" * 1_000_000).rc == 0


def test_environment_is_added_to_and_removed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFRQ_TEST_OLD", "1")
    names = ["GGUFRQ_TEST_OLD", "GGUFRQ_TEST_NEW"]
    code = f"import os; print(*[os.environ.get(name) for name in {names}], 'PATH' in os.environ)"
    done = proc.run(python(code), env={"GGUFRQ_TEST_OLD": None, "GGUFRQ_TEST_NEW": "2"})
    assert done.stdout.split() == ["None", "2", "True"]


def test_log_holds_command_and_output_and_is_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "folder" / "a.log"
    proc.run(python("print('first')"), log=log, cwd=tmp_path)
    proc.run(python("import sys; print('second', file=sys.stderr); sys.exit(3)"), log=log, check=False)
    text = log.read_text()
    assert text.startswith(f"$ {shlex.quote(sys.executable)}")
    assert f"(in {tmp_path})" in text
    assert (
        text.index("first\n")
        < text.index("exit status 0")
        < text.index("second\n")
        < text.index("exit status 3")
    )


def test_failure_quotes_the_last_lines_and_names_the_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with pytest.raises(ToolError) as caught:
        proc.run(python("import sys; [print(i, file=sys.stderr) for i in range(50)]; sys.exit(7)"), log=log)
    assert "exit status 7" in caught.value.message
    assert caught.value.message.splitlines()[-1].strip() == "49"
    assert "\n  10\n" not in caught.value.message
    assert str(log) in (caught.value.remedy or "")


def test_without_check_a_failure_is_returned() -> None:
    assert proc.run(python("raise SystemExit(9)"), check=False).rc == 9


@posix
def test_a_signal_is_named() -> None:
    with pytest.raises(ToolError, match="SIGKILL"):
        proc.run(python("import os; os.kill(os.getpid(), 9)"))


def test_missing_program_and_folder() -> None:
    with pytest.raises(ToolError, match="no-such-program") as caught:
        proc.run(["no-such-program-at-all"])
    assert "doctor" in (caught.value.remedy or "")
    with pytest.raises(ToolError, match="does not exist"):
        proc.run(python("pass"), cwd=Path("/no/such/folder"))


@posix
def test_timeout_ends_grandchildren_too(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = 'sleep 60 & echo "$$ $!" > "$1"; wait'  # a shell is there in no time, however busy the machine
    with pytest.raises(ToolError, match=r"did not finish within 1\.5 s"):
        proc.run(["sh", "-c", script, "sh", pids], timeout=1.5)
    parent, child = map(int, pids.read_text().split())
    assert gone(parent) and gone(child)


@posix
def test_a_program_that_ignores_term_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "GRACE", 0.3)
    started = time.monotonic()
    with pytest.raises(ToolError, match="did not finish"):
        proc.run(["sh", "-c", "trap '' TERM; sleep 60"], timeout=1.0)
    assert time.monotonic() - started < 15


@posix
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_caller_ends_the_program(kind: type[BaseException]) -> None:
    found: list[int] = []

    def stop(text: str) -> None:
        found.append(int(text))
        raise kind

    with pytest.raises(kind):
        proc.run(python("import os,time; print(os.getpid()); time.sleep(60)"), on_stdout=stop)
    assert gone(found[0])


@posix
def test_a_grandchild_that_holds_the_pipe_does_not_hang_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "_DRAIN", 0.3)
    code = (
        "import subprocess, sys; print('x')\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    started = time.monotonic()
    assert proc.run(python(code)).stdout == "x\n"
    assert time.monotonic() - started < 20


@posix
def test_start_and_stop(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with proc.start(python("import time; print('up'); time.sleep(60)"), log=log) as server:
        deadline = time.monotonic() + 20
        while "up\n" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.poll() is None
        with pytest.raises(ToolError, match="still runs"):
            server.wait(0.01)
    assert gone(server.pid)
    assert server.poll() == -signal.SIGTERM
    assert log.read_text().startswith("$ ") and "up\n" in log.read_text()


def test_start_of_a_missing_program() -> None:
    with pytest.raises(ToolError, match="is not there"):
        proc.start(["no-such-program-at-all"])


@contextmanager
def started_by(starter: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A Python program that uses ``proc`` and prints process ids."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import os, sys, time; from ggufrq.base import proc\n{starter}"
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield process, list(map(int, process.stdout.readline().split()))


IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)"


@posix
@pytest.mark.parametrize("code", ["import time; time.sleep(60)", IGNORES])
def test_what_was_started_does_not_outlive_a_killed_starter(code: str) -> None:
    starter = (
        f"with proc.start([sys.executable, '-c', {code!r}]) as running:\n"
        "    time.sleep(0.5); print(running.pid, running.watchdog.pid, flush=True); time.sleep(60)"
    )
    with started_by(starter) as (process, pids):
        assert len(pids) == 2 and all(map(alive, pids))
        process.kill()
    assert all(gone(pid, within=20) for pid in pids)


@posix
def test_what_is_run_does_not_outlive_a_killed_runner() -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    starter = (
        f"proc.run([sys.executable, '-c', {code!r}], on_stdout=lambda text: print(text, end='', flush=True))"
    )
    with started_by(starter) as (process, pids):
        assert len(pids) == 1 and alive(pids[0])
        process.kill()
    assert gone(pids[0], within=20)


@posix
def test_stopping_leaves_no_watchdog() -> None:
    with proc.start(python("import time; time.sleep(60)")) as running:
        assert running.watchdog is not None and alive(running.watchdog.pid)
    assert gone(running.watchdog.pid)

"""Fixtures that all tests may use."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from ggufrq.base import log, proc
from ggufrq.build import builds
from ggufrq.build.project import Build, BuildOptions

REPOSITORY = Path(__file__).resolve().parent.parent
LOGS = Path(__file__).resolve().parent / "logs"

# Tests send signals to programs; a shell that runs us in the background may have them ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if os.name == "posix":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Repositories made by tests are no part of one around them, and need an author.
os.environ["GIT_CEILING_DIRECTORIES"] = os.pathsep.join(["/tmp", str(REPOSITORY.parent)])
for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"):
    os.environ.pop(name, None)
for who in ("AUTHOR", "COMMITTER"):
    os.environ.setdefault(f"GIT_{who}_NAME", "Test")
    os.environ.setdefault(f"GIT_{who}_EMAIL", "test@example.org")

# Two test processes share the cores: a program that waits for its threads must not spin on the other's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed goes to another process, which takes UTF-8 alone; names of files need not be."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    folder = tmp_path / "the cache"
    monkeypatch.setenv("GGUFRQ_CACHE", str(folder))
    return folder


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any program that is run fails the test."""

    def refuse(command: list[str], **_: object) -> None:
        raise AssertionError(f"this test must not run programs, but ran {command}")

    monkeypatch.setattr(proc, "_spawn", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    # which would ask the system's own, where they are there, what to build for
    monkeypatch.setattr("ggufrq.build.backends.vulkan.detected", lambda: False)


@pytest.fixture(autouse=True)
def talkative() -> Iterator[None]:
    """Hints on, as at the start of a program, whatever an earlier test chose."""
    log.set_up(command=[])
    yield
    log.set_up(command=[])


@pytest.fixture(scope="session")
def llama_build() -> Build:
    """The real build with its tests, in the user's cache: made once, minutes on the first run."""
    return builds.ensure_build(BuildOptions("cpu", tests=True))


@pytest.fixture
def git(tmp_path: Path) -> Callable[..., str]:
    """Run git in a folder and return what it prints."""

    def run(folder: Path, *arguments: str) -> str:
        return proc.run(["git", "-C", folder, *arguments]).stdout.strip()

    return run

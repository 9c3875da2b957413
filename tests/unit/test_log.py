from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ggufrq.base import log, paths

pytestmark = pytest.mark.usefixtures("no_programs")


def test_say_goes_to_stderr_and_to_the_runs_log(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up(command=["build", "--tests"])
    assert log.latest() is None
    log.say("hello there")
    logging.getLogger("ggufrq.something").debug("a detail")
    assert capsys.readouterr() == ("", "hello there\n")
    latest = log.latest()
    assert latest is not None
    text = latest.read_text()
    assert "$ ggufrq build --tests" in text and "hello there" in text and "a detail" in text


def test_quiet_and_debug(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up(quiet=True, command=[])
    log.say("unheard")
    assert capsys.readouterr().err == ""
    log.set_up(debug=True, command=[])
    logging.getLogger("ggufrq.proc").debug("run: git")
    assert "run: git" in capsys.readouterr().err


def test_old_logs_are_removed() -> None:
    folder = paths.logs_dir()
    for number in range(50):
        (folder / f"run-20000101-000000-{number:06d}.log").touch()
    (folder / "kept.txt").touch()
    log.set_up(command=[])
    log.say("x")
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 32 and "kept.txt" in names
    assert "run-20000101-000000-000049.log" in names and "run-20000101-000000-000000.log" not in names


def test_a_log_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / "file"))
    log.set_up(command=[])
    log.say("still said")
    assert capsys.readouterr().err == "still said\n"

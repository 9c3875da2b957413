from __future__ import annotations

import pytest

from ggufrq.base import log
from ggufrq.base import progress as module
from ggufrq.base.progress import clock, progress

pytestmark = pytest.mark.usefixtures("no_programs")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.9, "0:09"), (61, "1:01"), (3600, "1:00:00"), (7325, "2:02:05")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_remaining_is_proportional(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("Compiling", 200, unit="files") as bar:
        bar.update(9)
        assert bar.remaining is None and bar.figures().startswith("9/200 files, 0:00 elapsed")
        now[0] = 130.0
        bar.update(50)
        assert bar.elapsed == 30 and bar.remaining == 90
        assert bar.figures() == "50/200 files, 0:30 elapsed, 1:30 left"
        bar.advance(150)
        assert bar.remaining == 0


def test_plain_lines_come_every_few_seconds_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("Compiling", 100, unit="files") as bar:
        for second in range(1, 31):
            now[0] = float(second)
            bar.update(second)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Compiling: 10/100 files, 0:10 elapsed, 1:30 left",
        "Compiling: 20/100 files, 0:20 elapsed, 1:20 left",
        "Compiling: 30/100 files, 0:30 elapsed, 1:10 left",
        "Compiling: 30/100 files, 0:30",
    ]


def test_quiet_prints_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PLAIN_INTERVAL", 0.0)
    log.set_up(quiet=True, command=[])
    with progress("Compiling", 10) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_a_failure_is_not_reported_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress("Compiling", 10):
        raise RuntimeError
    assert capsys.readouterr().err == ""

from __future__ import annotations

import io
import re

import pytest
from heard import Heard
from rich.console import Console

from ggufrq.base import log
from ggufrq.base import progress as module
from ggufrq.base.progress import SILENT, Part, clock, progress

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


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (120, r"A-Model-of-30B-IQ4_XS ━+╸? +300/579 tensors, 1:40 elapsed, 1:33 left blk\.17\.ffn_down"),
        (80, r"A-Model-of-30B-IQ4_XS ━+╸? +300/579 tensors, 1:40 elapsed, 1:33 left"),
        (40, r"A-Model-of-30B-IQ… 300/579, 1:33 left"),
    ],
)
def test_a_line_is_never_full_and_tells_what_is_left(
    width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the terminal's width: of a full line Ctrl-C would leave a part behind."""
    now, shown = [100.0], io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "Console", lambda **_: terminal)
    with progress("A-Model-of-30B-IQ4_XS", 579, unit="tensors") as bar:
        now[0] = 200.0
        bar.update(300, "blk.17.ffn_down")
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", shown.getvalue()))
    assert any(re.fullmatch(expected, line.rstrip()) for line in lines), lines
    assert max(map(len, lines)) <= width - 3


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


def test_a_bar_is_a_listener() -> None:
    with progress("Measuring", unit="rows") as bar:
        bar.expect(10)
        bar.step("f16")
        bar.result({}, True)
        bar.reach(4)
        bar.reach(2)  # something is repeated
        assert (bar.done, bar.total, bar.text) == (4, 10, "f16")


def test_a_part_counts_once_and_in_pieces_of_the_whole() -> None:
    whole = Heard()
    part = Part(whole, 100)
    part.expect(3)
    part.step("texts")
    for done in (1, 2, 1, 2, 3):
        part.reach(done)
    part.result({}, False)
    assert (whole.counts, whole.steps, whole.totals, part.done) == ([100] * 4, ["texts"], [], 4)
    only_steps = Part(whole, 0)
    only_steps.advance()
    assert whole.done == 400 and only_steps.done == 1


def test_nobody_has_to_listen() -> None:
    for tell in (SILENT.expect, SILENT.advance, SILENT.reach):
        tell(1)
    SILENT.step("what")
    SILENT.result({}, False)

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ggufrq.base.locks import locked


def test_who_waits_is_told_and_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "x.lock", "another one works in x"):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "x.lock", "another one works in x"):
        assert capsys.readouterr().err == ""
        thread.start()
        deadline, told = time.monotonic() + 30, ""
        while not told and time.monotonic() < deadline:
            told = capsys.readouterr().err
            time.sleep(0.02)
        assert told == "another one works in x; waiting for it\n"
        assert thread.is_alive()
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert capsys.readouterr().err == ""


def test_an_error_lets_it_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), locked(tmp_path / "x.lock", "it"):
        raise ValueError
    with locked(tmp_path / "x.lock", "it"):
        pass
    assert capsys.readouterr().err == ""

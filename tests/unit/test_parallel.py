"""Work done at once: results come with their items, and a failure or a signal ends what still runs."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from ggufrq.base import parallel, proc
from ggufrq.base.errors import ToolError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_every_item_with_its_result() -> None:
    assert dict(parallel.each(lambda n: n * n, range(7), 3)) == {n: n * n for n in range(7)}


def test_several_at_once() -> None:
    together = threading.Barrier(3, timeout=20)
    assert len(list(parallel.each(lambda _: together.wait(), range(3), 3))) == 3


def test_a_failure_ends_the_programs_of_the_others() -> None:
    begun: list[int] = []

    def work(n: int) -> None:
        begun.append(n)
        if n == 1:
            time.sleep(0.2)
            raise ToolError("no luck")
        proc.run(SLEEP)

    started = time.monotonic()
    with pytest.raises(ToolError, match="no luck"):
        list(parallel.each(work, range(9), 2))
    assert time.monotonic() - started < 20 and len(begun) <= 3


def test_a_caller_that_stops_asking() -> None:
    def work(n: int) -> None:
        if n:
            proc.run(SLEEP)

    started = time.monotonic()
    results = parallel.each(work, range(4), 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 20


def test_outside_nothing_is_stopped() -> None:
    stop = threading.Event()
    stop.set()
    with proc.stoppable(stop), pytest.raises(ToolError, match="was stopped"):
        proc.run(SLEEP)
    assert proc.run([sys.executable, "-c", "print(1)"]).stdout.strip() == "1"

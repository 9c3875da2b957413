"""A listener that remembers what it was told."""

from __future__ import annotations

from typing import Any

from ggufrq.base.progress import Listener


class Heard(Listener):
    """``totals`` and ``reached`` as they came, ``steps``, how much is ``done``, ``rows`` with whether each
    was kept."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.reached: list[int] = []
        self.steps: list[str] = []
        self.counts: list[int] = []
        self.rows: list[tuple[Any, bool]] = []

    @property
    def done(self) -> int:
        return sum(self.counts)

    @property
    def kept(self) -> list[bool]:
        return [kept for _, kept in self.rows]

    def expect(self, total: int) -> None:
        self.totals.append(total)

    def step(self, what: str) -> None:
        self.steps.append(what)

    def advance(self, n: int = 1) -> None:
        self.counts.append(n)

    def reach(self, done: int) -> None:
        self.reached.append(done)

    def result(self, row: Any, kept: bool) -> None:
        self.rows.append((row, kept))
        super().result(row, kept)

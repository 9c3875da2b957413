"""Progress of a long step: who is told of it, and a bar on stderr that shows it.

The bar is one on a terminal, a plain line every few seconds elsewhere, and nothing when quiet.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from ggufrq.base import log

#: Seconds between plain lines when stderr is no terminal.
PLAIN_INTERVAL = 10.0


class Listener:
    """Who is told how a long piece of work goes on. This one does not care; others override what they want to
    know."""

    def expect(self, total: int) -> None:
        """How much there is to do in all; may be told again when more is known."""

    def step(self, what: str) -> None:
        """What is done next."""

    def advance(self, n: int = 1) -> None:
        """So much more is done."""

    def reach(self, done: int) -> None:
        """So much is done in all; less than before when something is repeated."""

    def result(self, row: Any, kept: bool) -> None:
        """One more is done and this is what came out, which was kept from an earlier run or is new."""
        self.advance()


SILENT = Listener()


class Part(Listener):
    """Passes on to the listener of a whole what is told of a part: each piece of it counts as so many pieces
    of the whole, once. ``done`` are pieces of the part."""

    def __init__(self, whole: Listener, each: int = 1) -> None:
        self.whole = whole
        self.each = each
        self.done = 0

    def step(self, what: str) -> None:
        """What is done next."""
        self.whole.step(what)

    def advance(self, n: int = 1) -> None:
        """So much more is done."""
        self.done += n
        self.whole.advance(n * self.each)

    def reach(self, done: int) -> None:
        """So much of the part is done."""
        if done > self.done:
            self.advance(done - self.done)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


_ONE_LINE = Column(no_wrap=True, overflow="ellipsis", max_width=40)


class _Figures(ProgressColumn):
    """Done of total, elapsed and remaining; drawn anew at every refresh, so that the clock does not stand."""

    max_refresh = 0.25

    def __init__(self, owner: progress) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._owner = owner

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(self._owner.figures())


class progress(Listener):
    """``with progress("Compiling", 200, unit="files") as p: p.advance(); p.update(17, "ggml.c")``.

    Shows done of total, elapsed and remaining time. The total may be given or changed later by ``update``.
    """

    def __init__(self, title: str, total: int | None = None, *, unit: str = "") -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self.text = ""
        self._rich: Progress | None = None
        self._started = time.monotonic()
        self._printed = self._started

    def __enter__(self) -> progress:
        self._started = self._printed = time.monotonic()
        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal and not log.is_quiet():
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                _Figures(self),
                TextColumn("{task.fields[text]}", style="dim", markup=False, table_column=_ONE_LINE),
                console=console,
                transient=True,
            )
            self._task = self._rich.add_task(self.title, total=self.total, text="")
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        if kind is None:
            log.say(f"{self.title}: {self._amount()}{self.elapsed_text()}")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float | None:
        """Estimated seconds left, None until a twentieth is done: a guess before that is worth nothing."""
        if not self.total or self.done * 20 < self.total:
            return None
        return self.elapsed * max(0, self.total - self.done) / self.done

    def expect(self, total: int) -> None:
        """Set the total."""
        self.update(self.done, total=total)

    def step(self, what: str) -> None:
        """Show what is being done."""
        self.update(self.done, what)

    def reach(self, done: int) -> None:
        """So much is done; it never goes back."""
        self.update(max(self.done, done))

    def advance(self, n: int = 1, text: str | None = None) -> None:
        """Count ``n`` more as done."""
        self.update(self.done + n, text)

    def update(self, done: int, text: str | None = None, *, total: int | None = None) -> None:
        """Set how much is done, what is being done, and the total if it is known only now."""
        self.done = done
        if text is not None:
            self.text = text
        if total is not None:
            self.total = total
        if self._rich is not None:
            self._rich.update(self._task, completed=done, total=self.total, text=self.text)
        elif not log.is_quiet() and time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._printed = time.monotonic()
            print(f"{self.title}: {self.figures()}", file=sys.stderr, flush=True)

    def figures(self) -> str:
        """Done of total, elapsed and remaining, as text."""
        left = self.remaining
        return f"{self._amount()}{clock(self.elapsed)} elapsed" + (
            f", {clock(left)} left" if left is not None else ""
        )

    def elapsed_text(self) -> str:
        """How long it took, as text."""
        return f"{self.elapsed:.1f} s" if self.elapsed < 10 else clock(self.elapsed)

    def _amount(self) -> str:
        if self.total is None:
            return f"{self.done}{' ' + self.unit if self.unit else ''}, " if self.done else ""
        return f"{self.done}/{self.total}{' ' + self.unit if self.unit else ''}, "

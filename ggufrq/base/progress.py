"""Progress of a long step: who is told of it, and a bar on stderr that shows it.

The bar is one on a terminal, a plain line every few seconds elsewhere, and nothing when quiet.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Table
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


#: Columns of the bar at least (of what is being done, too) and at most, and those that stay free at the end:
#: what a terminal shows of Ctrl-C would go to the next line from a full one, and a bar would be left behind.
_BAR, _FREE = (8, 24), 3


class _Line(ProgressColumn):
    """Title, bar, figures, and what is being done, in one line; where there is little room the figures are
    what stays. Drawn anew at every refresh, so that the clock does not stand."""

    max_refresh = 0.25

    def __init__(self, owner: progress, console: Console) -> None:
        super().__init__()
        self._owner, self._console = owner, console

    def render(self, task: Task) -> RenderableType:
        """The line."""
        owner, room = self._owner, self._console.width - _FREE
        figures = owner.figures()
        if len(owner.title) + 1 + len(figures) > room:
            figures = owner.figures(short=True)
        title = _cut(owner.title, room - len(figures) - 1)
        room -= title.cell_len + len(figures) + 2
        line = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [title, Text(figures, no_wrap=True)]
        if room >= _BAR[0]:
            width = min(_BAR[1], room)
            cells.insert(1, BarColumn(bar_width=width).render(task))
            room -= width + 1
            if owner.text and room >= _BAR[0]:
                cells.append(_cut(owner.text, min(room, 40), style="dim"))
        line.add_row(*cells)
        return line


def _cut(text: str, width: int, style: str = "") -> Text:
    """The text in so many columns at most."""
    found = Text(text, style=style, no_wrap=True)
    found.truncate(max(1, width), overflow="ellipsis")
    return found


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
            self._rich = Progress(_Line(self, console), console=console, transient=True)
            self._task = self._rich.add_task(self.title, total=self.total)
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
            self._rich.update(self._task, completed=done, total=self.total)
        elif not log.is_quiet() and time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._printed = time.monotonic()
            print(f"{self.title}: {self.figures()}", file=sys.stderr, flush=True)

    def figures(self, *, short: bool = False) -> str:
        """Done of total, elapsed and remaining, as text; ``short``: without the unit, and one time."""
        left = self.remaining
        elapsed = f"{clock(self.elapsed)} elapsed"
        if left is None:
            return self._amount(short=short) + elapsed
        return self._amount(short=short) + ("" if short else f"{elapsed}, ") + f"{clock(left)} left"

    def elapsed_text(self) -> str:
        """How long it took, as text."""
        return f"{self.elapsed:.1f} s" if self.elapsed < 10 else clock(self.elapsed)

    def _amount(self, *, short: bool = False) -> str:
        unit = f" {self.unit}" if self.unit and not short else ""
        if self.total is None:
            return f"{self.done}{unit}, " if self.done else ""
        return f"{self.done}/{self.total}{unit}, "

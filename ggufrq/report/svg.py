"""A little drawing: SVG elements, axes, and labels that keep clear of each other.

Elements are ``Markup``: words that go into one are escaped, other elements are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

#: Size of text in units of the drawing, and how wide a letter is at that size, on average.
TEXT = 12.5
_LETTER = 0.57 * TEXT
_LINE = TEXT + 2

Box = tuple[float, float, float, float]


def element(name: str, inner: str | None = None, **attributes: object) -> Markup:
    """One element with words or other elements in it; ``class_`` is ``class``, other underscores are hyphens,
    None leaves an attribute out."""
    start = Markup(name)
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.1f}" if isinstance(value, float) else str(value)
            start += Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shown)
    if inner is None:
        return Markup("<{}/>").format(start)
    return Markup("<{}>{}</{}>").format(start, escape(inner), name)


def text(x: float, y: float, words: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """Words at a point: ``anchor`` is start, middle or end."""
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def width_of(words: str) -> float:
    """About how wide words are."""
    return len(words) * _LETTER


def picture(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """A whole drawing that grows and shrinks with the page; ``label`` says what it shows."""
    box = f"0 0 {width:g} {height:g}"
    return element("svg", Markup("\n").join(parts), viewBox=box, role="img", aria_label=label, class_="plot")


def marker(shape: int, x: float, y: float, class_: str, title: str) -> Markup:
    """A point: circle, square, diamond, triangle, or triangle upside down by number; ``title`` is shown when
    the mouse rests on it."""
    r = 5.0
    outlines = {
        1: [(-r + 0.5, -r + 0.5), (r - 0.5, -r + 0.5), (r - 0.5, r - 0.5), (-r + 0.5, r - 0.5)],
        2: [(0.0, -r - 1), (r + 1, 0.0), (0.0, r + 1), (-r - 1, 0.0)],
        3: [(0.0, -r - 1), (r + 0.5, r - 1), (-r - 0.5, r - 1)],
        4: [(0.0, r + 1), (r + 0.5, -r + 1), (-r - 0.5, -r + 1)],
    }
    inner = element("title", title)
    if shape not in outlines:
        return element("circle", inner, cx=x, cy=y, r=r, class_=class_)
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outlines[shape])
    return element("polygon", inner, points=points, class_=class_)


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on a line from ``start`` to ``end``, logarithmic or not."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the range, few enough to be read."""
        if not self.log:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
            while (self.high - self.low) / step > 6:
                step *= 2 if round(step / 10 ** math.floor(math.log10(step))) != 2 else 2.5
            first = math.ceil(self.low / step - 1e-9)
            return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = math.log10(self.high / self.low)
        digits = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = [digit * 10.0**power for power in powers for digit in digits]
        return [v for v in every if self.low * 0.999 <= v <= self.high * 1.001]


@dataclass
class Labels:
    """Places words beside points so that they overlap neither each other nor a point nor the border."""

    within: Box
    taken: list[Box] = field(default_factory=list)

    def keep_clear(self, x: float, y: float, radius: float = 7.0) -> None:
        """Nothing is to be written over this point."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, x: float, y: float, words: str, class_: str | None = None) -> list[Markup]:
        """The words near the point, with a line to it where they stand apart."""
        wide = width_of(words)
        best: tuple[float, Box] | None = None
        for distance in (9.0, 16.0, 26.0, 38.0, 52.0, 68.0):
            for turn in (0, 180, -25, 25, 205, 155, -50, 50, 230, 130, -90, 90):
                dx, dy = math.cos(math.radians(turn)), math.sin(math.radians(turn))
                side = 0.0 if dx > 0.2 else -wide if dx < -0.2 else -wide / 2
                left, middle = x + distance * dx + side, y + distance * dy * 1.1
                box = (left, middle - _LINE / 2, left + wide, middle + _LINE / 2)
                cost = sum(_overlap(box, other) for other in self.taken) + 4 * _outside(box, self.within)
                if best is None or cost < best[0] - 1e-9:
                    best = cost, box
            if best is not None and best[0] == 0:
                break
        assert best is not None
        box = best[1]
        self.taken.append(box)
        near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        parts = [text(box[0], (box[1] + box[3]) / 2 + 0.35 * TEXT, words, class_=class_)]
        if math.dist((x, y), near) > 11:
            parts.insert(0, line(x, y, *near, "leader"))
        return parts


def spread(positions: Sequence[float], low: float, high: float, gap: float = _LINE) -> list[float]:
    """Positions moved apart to be at least ``gap`` from each other, as near as that allows to where they
    were, between ``low`` and ``high`` as far as there is room."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for _ in range(200):
        for lower, upper in pairwise(order):
            short = gap - (moved[upper] - moved[lower])
            if short > 0:
                moved[lower] -= short / 2
                moved[upper] += short / 2
        for i in order:
            moved[i] = min(max(moved[i], low), high)
    return moved


def _overlap(a: Box, b: Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box, border: Box) -> float:
    over = max(0.0, border[0] - box[0]) + max(0.0, box[2] - border[2])
    return (over + max(0.0, border[1] - box[1]) + max(0.0, box[3] - border[3])) * _LINE

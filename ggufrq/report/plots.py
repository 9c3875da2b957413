"""The plots of a report, each as SVG, or None when there is nothing to show. Colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ggufrq.report import numbers
from ggufrq.report.svg import TEXT, Labels, Scale, element, line, marker, picture, spread, text, width_of

_WIDE, _HIGH = 440.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 14.0, 14.0, 46.0
#: Colours of lines on the page; with more cases they come again, with other marks.
COLOURS = 8
_SHAPES = 5

Case = dict[str, Any]


def look_of(cases: Sequence[Case], case: Case) -> tuple[str, int]:
    """Class (of the colour) and mark of a case, the same in all plots."""
    number = [other["name"] for other in cases].index(case["name"])
    return f"c{number % COLOURS}", number % _SHAPES


def divergence(cases: Sequence[Case], ctx: int) -> Markup | None:
    """Mean KLD against bits per value at one context, with standard errors."""
    points = []
    for case in cases:
        row = next((row for row in case["quality"] or [] if row["ctx"] == ctx), None)
        if row is not None and not case["is_base"] and case["bits_per_value"]:
            points.append((case, case["bits_per_value"], row["kld_mean"], row["kld_mean_err"] or 0.0))
    positive = [kld for _, _, kld, _ in points if kld > 0]
    if not positive:
        return None
    low, high = min(positive) / 1.8, max(kld + error for _, _, kld, error in points) * 1.5
    x = Scale(
        min(0.8 * min(b for _, b, _, _ in points), 2.0),
        max(b for _, b, _, _ in points) * 1.15,
        _LEFT,
        _WIDE - _RIGHT,
        log=True,
    )
    y = Scale(low, high, _HIGH - _BOTTOM, _TOP, log=True)
    ticks = sorted({bits for _, bits, _, _ in points})
    parts = _frame(x, y, _thinned(ticks, x), "bits per value of K and V", "mean KLD, nats", numbers.plain)
    labels = Labels((_LEFT, _TOP, _WIDE - _RIGHT + 4, _HIGH - _BOTTOM))
    drawn = [(case, x(bits), y(max(kld, low)), kld, error) for case, bits, kld, error in points]
    for _, px, py, _, _ in drawn:
        labels.keep_clear(px, py)
    for case, px, py, kld, error in drawn:
        class_, shape = look_of(cases, case)
        if error and kld > 0:
            parts.append(line(px, y(max(kld - error, low)), px, y(kld + error), f"error {class_}"))
        title = f"{case['name']}: {numbers.with_error(kld, error)}"
        parts.append(marker(shape, px, py, f"mark {class_}", title))
    for case, px, py, kld, _ in sorted(drawn, key=lambda point: -point[3]):
        parts += labels.place(px, py, case["name"] + ("" if kld > 0 else " (0)"))
    return picture(_WIDE, _HIGH, f"Mean KLD against bits per value at a context of {ctx} tokens", parts)


def speed(cases: Sequence[Case], kind: str, base: str) -> Markup | None:
    """Speed (``prefill`` or ``decode``) relative to the base at each depth, with standard errors."""
    lines = [case for case in cases if case["speed"] and not case["is_base"]]
    if not lines:
        return None
    depths = sorted({point["depth"] for case in lines for point in case["speed"]["points"]})
    points = [point for case in lines for point in case["speed"]["points"]]
    bars = [(point[f"{kind}_ratio"], point[f"{kind}_ratio_err"] or 0.0) for point in points]
    right = min(max(width_of(case["name"]) for case in lines) + 26, 0.42 * _WIDE)
    inner = 22.0  # between the frame and the first and last points
    at = {
        depth: _LEFT + inner + i * (_WIDE - right - _LEFT - 2 * inner) / max(len(depths) - 1, 1)
        for i, depth in enumerate(depths)
    }
    low = min(0.8, *(0.93 * max(value - error, value / 2) for value, error in bars))
    high = max(1.25, *(1.07 * (value + error) for value, error in bars))
    y = Scale(low, high, _HIGH - _BOTTOM, _TOP, log=True)
    x = Scale(0, 1, _LEFT, _WIDE - right)
    parts = _frame(x, y, {}, "depth, tokens (not to scale)", f"{kind}, times {base}", numbers.plain)
    parts += [text(px, _HIGH - _BOTTOM + 17, f"{d:,}", anchor="middle") for d, px in at.items()]
    parts.append(line(_LEFT, y(1), _WIDE - right, y(1), "one"))
    ends = []
    for case in lines:
        class_, shape = look_of(cases, case)
        track = []
        for point in case["speed"]["points"]:
            value, error = point[f"{kind}_ratio"], point[f"{kind}_ratio_err"] or 0.0
            px, py = at[point["depth"]], y(value)
            track.append((px, py))
            up, down = y(min(value + error, high)), y(max(value - error, low))
            parts.append(line(px, down, px, up, f"error {class_}"))
            where = f"{case['name']} at {point['depth']:,}: {numbers.ratio(value, error)}"
            parts.append(marker(shape, px, py, f"mark {class_}", where))
        path = "M" + " L".join(f"{px:.1f},{py:.1f}" for px, py in track)
        parts.append(element("path", d=path, class_=f"track {class_}"))
        ends.append((case, *track[-1]))
    placed = spread([py for _, _, py in ends], _TOP + TEXT / 2, _HIGH - _BOTTOM - TEXT / 2)
    for (case, px, py), level in zip(ends, placed, strict=True):
        edge = _WIDE - right + 9
        class_, shape = look_of(cases, case)
        parts.append(line(px + 7, py, edge - 6, level, "leader"))
        parts.append(marker(shape, edge, level, f"mark {class_}", case["name"]))
        parts.append(text(edge + 9, level + 0.35 * TEXT, case["name"]))
    return picture(_WIDE, _HIGH, f"{kind} speed against depth, relative to {base}", parts)


def needles(case: Case, limit: float) -> Markup | None:
    """Context against depth of the needle: what the answer's log-probability lost against the base (nats, sum
    over its tokens), and a tick where greedy decoding finds it. Colours are full at ``limit`` nats."""
    section = case["needle"]
    if not section or not section["cells"]:
        return None
    contexts = sorted({cell["ctx"] for cell in section["cells"]})
    depths = sorted({cell["depth"] for cell in section["cells"]})
    left, top, wide, high = 50.0, 8.0, max(64.0, 250.0 / len(contexts)), 40.0
    parts = []
    for j, depth in enumerate(depths):
        parts.append(text(left - 8, top + (j + 0.6) * high, f"{100 * depth:g} %", anchor="end"))
        for i, ctx in enumerate(contexts):
            cells = [c for c in section["cells"] if (c["ctx"], c["depth"]) == (ctx, depth)]
            if cells:
                parts += _cell(cells, left + i * wide, top + j * high, wide, high, limit, case["is_base"])
    bottom = top + len(depths) * high
    for i, ctx in enumerate(contexts):
        parts.append(text(left + (i + 0.5) * wide, bottom + 17, f"{ctx:,}", anchor="middle"))
    width = left + len(contexts) * wide + 8
    parts.append(text((left + width) / 2, bottom + 35, "context, tokens", anchor="middle", class_="axis"))
    return picture(width, bottom + 42, f"Needles found with {case['name']}, by context and depth", parts)


def _cell(
    cells: list[Case], x: float, y: float, wide: float, high: float, limit: float, is_base: bool
) -> list[Markup]:
    differences = [cell["difference"] for cell in cells if cell["difference"] is not None]
    mean = sum(differences) / len(differences) if differences else 0.0
    hits = sum(cell["hit"] for cell in cells)
    found = ("✓" if hits else "✗") if len(cells) == 1 else f"{hits}/{len(cells)}"
    strength = min(abs(mean) / limit, 1.0) if limit > 0 else 0.0
    box = {"x": x + 1, "y": y + 1, "width": wide - 2, "height": high - 2, "rx": 3}
    title = element("title", f"{found}, {numbers.fixed(mean, 3)} nats against the base")
    words = found if is_base else f"{found} {_signed(mean)}"
    return [
        element("rect", "", **box, class_="cell"),
        element(
            "rect",
            title,
            **box,
            class_="loss" if mean < 0 else "gain",
            fill_opacity=f"{0.75 * math.sqrt(strength):.2f}",
        ),
        text(x + wide / 2, y + 0.62 * high, words, anchor="middle"),
    ]


def _signed(value: float) -> str:
    places = 2 if abs(value) < 10 else 1
    return ("+" if round(value, places) > 0 else "") + numbers.fixed(value, places)


def _thinned(values: Sequence[float], scale: Scale) -> dict[float, str]:
    """Ticks at these values, without words where these would overlap."""
    shown: dict[float, str] = {}
    last = -math.inf
    for value in values:
        words = f"{value:.4g}"
        start = scale(value) - width_of(words) / 2
        shown[value] = words if start > last + 4 else ""
        if shown[value]:
            last = scale(value) + width_of(words) / 2
    return shown


def _frame(
    x: Scale, y: Scale, x_ticks: dict[float, str], x_title: str, y_title: str, y_words: Any
) -> list[Markup]:
    """Grid, numbers and titles of the axes."""
    parts = []
    for value in y.ticks():
        parts.append(line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(text(x.start - 6, y(value) + 0.35 * TEXT, y_words(value), anchor="end"))
    for value, words in x_ticks.items():
        parts.append(line(x(value), y.start, x(value), y.start + 5, "tick"))
        parts.append(text(x(value), y.start + 17, words, anchor="middle"))
    parts.append(line(x.start, y.start, x.end, y.start, "base"))
    parts.append(text((x.start + x.end) / 2, y.start + 37, x_title, anchor="middle", class_="axis"))
    middle = (y.start + y.end) / 2
    turned = f"rotate(-90 {TEXT:.1f} {middle:.1f})"
    parts.append(
        element("text", y_title, x=TEXT, y=middle, text_anchor="middle", class_="axis", transform=turned)
    )
    return parts

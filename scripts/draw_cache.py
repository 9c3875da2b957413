"""Draws ``docs/how-it-works.svg``: what happens to a key on its way into the cache, by the numpy reference.

The values are made up (Gaussian, three outlier channels, seed 3), rotation and code are those of iso3.
Run ``python scripts/draw_cache.py`` to write the picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggufrq import codec
from ggufrq.base import paths

TARGET = Path(__file__).resolve().parent.parent / "docs" / "how-it-works.svg"
COMMAND = "python scripts/draw_cache.py"
WIDTH, HEIGHT = 960, 640
INK, FAINT, KEY, CACHE, VALUE = "#1f2933", "#9aa5b1", "#2563a8", "#b4530a", "#2f7d4f"

Values = npt.NDArray[np.float32]


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 14,
    color: str = INK,
    anchor: str = "start",
    bold: bool = False,
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{color}"{weight}>{words}</text>'


def rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = "", rx: float = 0) -> str:
    line = f' stroke="{stroke}" stroke-width="1.4"' if stroke else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{rx:g}" fill="{fill}"{line}/>'
    )


def dashed(x1: float, x2: float, y: float) -> str:
    return (
        f'<line x1="{x1:g}" y1="{y:g}" x2="{x2:g}" y2="{y:g}" stroke="{FAINT}" stroke-width="0.6" '
        'stroke-dasharray="3 3"/>'
    )


def bars(x: float, y: float, values: Values, color: str, unit: float) -> list[str]:
    """Values as bars around a line at ``y``; ``unit`` pixels per 1."""
    step = 264 / len(values)
    lines = [rect(x, y - 0.4, 264, 0.8, FAINT)]
    for i, value in enumerate(values.tolist()):
        top, height = round(y - max(value, 0) * unit, 1), round(max(abs(value) * unit, 0.4), 1)
        lines.append(rect(round(x + i * step, 1), top, round(step * 0.72, 1), height, color))
    return lines


def box(x: float, y: float, width: float, words: list[str], color: str, height: float = 44) -> list[str]:
    first = y + height / 2 + 5 - 8.5 * (len(words) - 1)
    lines = [
        text(x + width / 2, first + 17 * i, line, anchor="middle", size=13) for i, line in enumerate(words)
    ]
    return [rect(x, y, width, height, "#ffffff", color, 6), *lines]


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    path = f"M{x1:g} {y1:g} L{x2:g} {y2:g}"
    return f'<path d="{path}" stroke="{INK}" stroke-width="1.4" fill="none" marker-end="url(#tip)"/>'


def draw() -> str:
    x = np.random.default_rng(3).standard_normal(128).astype(np.float32)
    x[[17, 58, 101]] = (9.0, -7.5, 8.0)
    rotated = (codec.rotation_matrix("iso", "full", 128) @ x).astype(np.float32)
    blocks = codec.quantize(rotated[None], 3)
    stored = codec.dequantize(blocks, 3)[0]
    plain = codec.dequantize(codec.quantize(x[None], 3), 3)[0]
    with_r, without = (float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in ((stored, rotated), (plain, x)))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<!-- written by {COMMAND} -->",
        "<title>A key on its way into an iso3 cache, and where the rotations are in the graph</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        rect(0, 0, WIDTH, HEIGHT, "#ffffff", rx=10),
        text(28, 36, "One head of a key, 128 values", size=17, bold=True),
    ]
    for left, title, below, values, color in (
        (28, "1  as the model makes it", "a few channels are large", x, KEY),
        (346, "2  rotated: R · k", "the same length, no outliers", rotated, KEY),
        (
            664,
            "3  stored: one scale, 8 levels",
            f"squared error {100 * with_r:.1f} %; without R {100 * without:.1f} %",
            stored,
            CACHE,
        ),
    ):
        out += [text(left, 66, title, size=14), *bars(left, 142, values, color, 6.2)]
        out.append(text(left, 222, below, size=13, color="#52606d"))
    scale = float(blocks[0, :2].copy().view("<f2")[0])
    for level in (14, 45, 79, 127):
        for sign in (1, -1):
            out.append(dashed(664, 928, round(142 - sign * level * scale / 128 * 6.2, 1)))
    out += [arrow(300, 142, 338, 142), arrow(618, 142, 656, 142)]
    # The block.
    out.append(text(28, 274, "The block in the cache: 50 bytes, 3.125 bits per value", size=17, bold=True))
    at = 28.0
    for width, words, under, fill in (
        (72.0, "scale", "fp16, 2 bytes", "#fde8d3"),
        (552.0, "low two bits of 128 indices", "32 bytes", "#fbd3ab"),
        (276.0, "high bits of 128 indices", "16 bytes", "#f7b877"),
    ):
        out.append(rect(at, 290, width, 40, fill, CACHE))
        out += [
            text(at + width / 2, 315, words, anchor="middle", size=13),
            text(at + width / 2, 348, under, anchor="middle", size=12, color="#52606d"),
        ]
        at += width
    # The graph.
    out.append(text(28, 396, "In llama.cpp's graph", size=17, bold=True))
    rows = {"q": 416.0, "k": 482.0, "v": 548.0}
    for name, words in (("q", "query q"), ("k", "key k"), ("v", "value v")):
        y = rows[name]
        out += [
            *box(28, y, 92, [words], INK),
            arrow(120, y + 22, 146, y + 22),
            *box(148, y, 76, [f"R · {name}"], KEY),
        ]
    for name in ("k", "v"):
        y = rows[name]
        out += [
            arrow(224, y + 22, 250, y + 22),
            *box(252, y, 96, ["code"], CACHE),
            arrow(348, y + 22, 374, y + 22),
        ]
    out += box(376, 482, 132, ["KV cache", "K iso3, V iso3", "blocks of 128"], CACHE, 110)
    out += [arrow(224, 438, 544, 438), arrow(508, 504, 544, 504), arrow(508, 570, 544, 570)]
    out += box(546, 416, 184, ["attention", "scores: (R·q)·(R·k) = q·k", "sums R·v, knows no R"], VALUE, 176)
    out += [
        arrow(730, 504, 754, 504),
        *box(756, 482, 70, ["R · o"], KEY),
        arrow(826, 504, 852, 504),
        *box(854, 482, 78, ["output"], INK),
    ]
    out.append(
        text(
            28,
            620,
            "R is symmetric and its own inverse, so that one matrix does all four: but for the code's error, "
            "the output is what it was.",
            size=13,
            color="#52606d",
        )
    )
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    paths.atomic_write(TARGET, draw())

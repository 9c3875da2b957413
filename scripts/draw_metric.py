"""Draws ``docs/two-metrics.svg``: keys and queries of a head in two dimensions, as they are and in the metric
of the queries, with the error that a code makes.

The two covariances are made up; the matrix and the figures come from ``ggufrq.profile``. Run
``python scripts/draw_metric.py`` to write the picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from draw_cache import FAINT, INK, KEY, VALUE, text

from ggufrq.profile.solve import solve

TARGET = Path(__file__).resolve().parent.parent / "docs" / "two-metrics.svg"
WIDTH, HEIGHT, UNIT = 960, 400, 46.0
ERROR = "#b4530a"

Matrix = npt.NDArray[np.float64]


def covariance(long: float, short: float, degrees: float) -> Matrix:
    """An ellipse with these half-axes, the long one turned by so many degrees."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s], [s, c]])
    return np.asarray(turn @ np.diag([long**2, short**2]) @ turn.T, np.float64)


def ellipse(x: float, y: float, of: Matrix, color: str, *, filled: bool = False) -> str:
    """The points at one standard deviation around (x, y)."""
    sizes, axes = np.linalg.eigh(of)
    long, short = np.sqrt(sizes[1]) * UNIT, np.sqrt(sizes[0]) * UNIT
    angle = -np.degrees(np.arctan2(axes[1, 1], axes[0, 1]))
    look = f'fill="{color}" fill-opacity="0.35"' if filled else 'fill="none"'
    return (
        f'<ellipse cx="{x:g}" cy="{y:g}" rx="{long:.1f}" ry="{short:.1f}" {look} stroke="{color}" '
        f'stroke-width="2" transform="rotate({angle:.1f} {x:g} {y:g})"/>'
    )


def panel(x: float, title: str, keys: Matrix, queries: Matrix, words: str) -> list[str]:
    """Keys, queries, and the error of keys: alike in all directions, as large as the keys are."""
    error = np.eye(2) * 0.035 * np.trace(keys)
    noise = np.trace(error @ queries)
    return [
        text(x, 40, title, size=17, anchor="middle", bold=True),
        ellipse(x, 200, keys, KEY),
        ellipse(x, 200, queries, VALUE),
        ellipse(x, 200, error, ERROR, filled=True),
        text(x, 350, f"noise of a score: {np.sqrt(noise):.2f}", anchor="middle", color=ERROR, bold=True),
        text(x, 374, words, size=13, anchor="middle", color=FAINT),
    ]


def main() -> None:
    """Writes the picture."""
    keys, queries = covariance(2.9, 0.5, 10), covariance(2.2, 0.35, 105)
    found = solve(keys[None], queries[None])
    k_map, q_map = found.forward[0], found.inverse[0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        "<!-- python scripts/draw_metric.py -->",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *panel(290, "as they are", keys, queries, "errors are large where queries are"),
        text(520, 190, "keys by A", anchor="middle", color=KEY),
        text(520, 214, "queries by A⁻¹", anchor="middle", color=VALUE),
        text(520, 240, "→", size=26, anchor="middle", color=INK),
        *panel(
            750,
            "in the metric of the queries",
            k_map @ keys @ k_map,
            q_map @ queries @ q_map,
            "the same scores, less noise at the same bits",
        ),
        text(40, 90, "keys", color=KEY, bold=True),
        text(40, 112, "queries", color=VALUE, bold=True),
        text(40, 134, "error of a stored key", color=ERROR, bold=True),
        "</svg>",
    ]
    TARGET.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Pieces of Markdown, as GitHub and the Hub render it."""

from __future__ import annotations

import re
from collections.abc import Sequence

NOT_MEASURED = "not measured"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A table; ``align`` has ``l`` or ``r`` for each column."""
    marks = ["---:" if side == "r" else "---" for side in align]
    lines = [[cell(word) for word in head], marks, *([cell(word) for word in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """A text as a cell of a table: on one line, with bars that end no cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def code(text: str) -> str:
    """A text in the font of code."""
    return f"`{text}`" if text else ""


def block(text: str, language: str = "") -> str:
    """A block of code, with a fence that is in none of its lines."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def section(title: str, *parts: str) -> str:
    """A heading and what is under it; empty parts are left out."""
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def folded(title: str, text: str) -> str:
    """What is shown when its title is clicked."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"

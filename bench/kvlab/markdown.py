"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(x: float) -> str:
    """Three digits, without the zero in front; large ones rounded."""
    if not abs(x) < 10:
        return f"{x:.0f}"
    text = (
        f"{x:.2f}"
        if abs(x) >= 1
        else f"{x:.3f}"
        if abs(x) >= 0.1
        else f"{x:.4f}"
        if abs(x) >= 0.01
        else f"{x:.5f}"
    )
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


def with_error(x: float, error: float) -> str:
    """A mean and its standard error."""
    return f"{x:.5f} ± {error:.5f}"

"""Rows that are kept: used when they are there, or taken now, and told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ggufrq.base.progress import SILENT, Listener

Row = dict[str, Any]
Item = TypeVar("Item")


def kept_or_taken(
    item: Item,
    kept: Callable[[Item], Row | None],
    take: Callable[[Item], Row],
    *,
    fresh: bool = False,
    listener: Listener = SILENT,
) -> Row:
    """The row of an item: that of an earlier run, which ``kept`` gives, or with ``fresh`` and where there is
    none, one that ``take`` measures and keeps. ``listener`` is told of it."""
    row = None if fresh else kept(item)
    known = row is not None
    if row is None:
        row = take(item)
    listener.result(row, known)
    return row

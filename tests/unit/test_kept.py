from __future__ import annotations

import pytest
from heard import Heard

from ggufrq.measure.kept import Row, kept_or_taken


class Store:
    """Keeps what was taken, and knows how often."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.taken: list[str] = []

    def kept(self, item: str) -> Row | None:
        return self.rows.get(item)

    def take(self, item: str) -> Row:
        self.taken.append(item)
        self.rows[item] = {} if item == "empty" else {"of": item, "number": len(self.taken)}
        return self.rows[item]


def test_taken_once_then_kept_and_told() -> None:
    store, heard = Store(), Heard()
    for item in ("a", "b", "a"):
        kept_or_taken(item, store.kept, store.take, listener=heard)
    assert store.taken == ["a", "b"]
    assert heard.rows == [(store.rows["a"], False), (store.rows["b"], False), (store.rows["a"], True)]
    assert heard.done == 3


def test_a_row_without_anything_in_it_is_a_row() -> None:
    store = Store()
    for _ in range(2):
        assert kept_or_taken("empty", store.kept, store.take) == {}
    assert store.taken == ["empty"]


def test_fresh_takes_it_again() -> None:
    store = Store()
    first = kept_or_taken("a", store.kept, store.take)
    again = kept_or_taken("a", store.kept, store.take, fresh=True)
    assert (first["number"], again["number"]) == (1, 2)


def test_of_what_fails_nothing_is_told() -> None:
    def fail(_: str) -> Row:
        raise ValueError

    heard = Heard()
    with pytest.raises(ValueError):
        kept_or_taken("a", Store().kept, fail, listener=heard)
    assert heard.rows == []

from __future__ import annotations

import pytest

from ggufrq.measure.validate import compare
from ggufrq.measure.validate.compare import first_difference


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [([], [], 0), ([1], [1], 1), ([1, 2], [1, 3], 1), ([1, 2, 3], [1, 2], 2), ([2], [1], 0)],
)
def test_first_difference(a: list[int], b: list[int], same: int) -> None:
    assert first_difference(a, b) == same


def answers(*texts: str) -> dict[str, object]:
    return {"answers": [{"tokens": list(map(ord, text)), "text": text} for text in texts]}


def test_greedy() -> None:
    base = answers("the same text", "here they part", "x" * 13 + "y")
    base["answers"] = [{**a, "tokens": a["tokens"][:13]} for a in base["answers"]]  # type: ignore[index, attr-defined]
    mine = answers("the same text", "here we go onn", "z" * 14)
    mine["answers"] = [{**a, "tokens": a["tokens"][:13]} for a in mine["answers"]]  # type: ignore[index, attr-defined]
    found = compare.greedy(mine, base, is_base=False)
    assert (found["prompts"], found["tokens"], found["agree"]) == (3, 13, 1)
    assert found["first_difference"] == [13, 5, 0]
    assert (found["mean_same"], found["median_same"]) == (6, 5)
    assert found["share_same"] == pytest.approx(18 / 39)
    assert found["examples"][0] == {"prompt": 1, "at": 5, "base": "they part", "case": "we go onn"}
    assert len(found["examples"]) == 2


def cells(*values: tuple[float, bool]) -> dict[str, object]:
    return {
        "cells": [
            {"ctx": 512, "depth": i / 10, "repeat": 0, "hit": hit, "logprob": logprob, "tokens": 5}
            for i, (logprob, hit) in enumerate(values)
        ]
    }


def test_needles_that_the_base_misses() -> None:
    base = cells((-5.0, False), (-6.0, False), (-7.0, True), (-8.0, False))
    mine = cells((-6.0, False), (-7.1, False), (-7.9, True), (-9.0, False))
    found = compare.needle(mine, base, is_base=False)
    assert (found["hits"], found["base_hits"], found["of"], found["base_fails"]) == (1, 1, 4, True)
    assert found["mean_difference"] == pytest.approx(-1.0)
    assert found["verdict"] == "worse"
    assert found["cells"][0]["difference"] == pytest.approx(-1.0)
    assert found["cells"][0]["base_logprob"] == -5.0


def test_needles_that_differ_by_chance() -> None:
    base = cells((-5.0, True), (-6.0, True))
    found = compare.needle(cells((-4.0, True), (-7.5, False)), base, is_base=False)
    assert (found["verdict"], found["base_fails"]) == ("no difference seen", False)
    assert compare.needle(base, base, is_base=True)["verdict"] is None


def test_one_needle_gives_no_verdict() -> None:
    found = compare.needle(cells((-4.0, True)), cells((-5.0, True)), is_base=False)
    assert found["verdict"] is None
    assert found["mean_difference"] is None


def texts(*values: tuple[float, float]) -> dict[str, object]:
    return {
        "texts": [
            {"repeated": repeated, "garbage": garbage, "ended": garbage == 0, "length": 100}
            for repeated, garbage in values
        ]
    }


def test_sanity() -> None:
    base = texts((0.1, 0), (0.2, 0), (0.1, 0), (0.2, 0))
    found = compare.sanity(texts((0.7, 0.1), (0.8, 0.2), (0.8, 0.1), (0.7, 0.1)), base, is_base=False)
    assert found["repeated"] == pytest.approx(0.75)
    assert found["base_repeated"] == pytest.approx(0.15)
    assert found["garbage"] == pytest.approx(0.125)
    assert (found["ended"], found["base_ended"], found["mean_length"]) == (0, 4, 100)
    assert found["verdict"] == "worse"
    assert compare.sanity(base, base, is_base=False)["verdict"] == "no difference seen"

"""Whether a cache was kept as asked for, on logs of real runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ggufrq.cache.cases import parse_case
from ggufrq.drive.cache_check import CacheError, check_context, mode_of
from ggufrq.tools.logs import Context, Rotation, parse_context

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"
MODEL = Path("model.gguf")


@pytest.fixture
def ours() -> Context:
    """K in iso3, V in planar4, block rotations, four streams of 256 tokens."""
    context = parse_context((LOGS / "ppl-iso3-planar4.err.txt").read_text(encoding="utf-8"))
    assert context is not None
    return context


@pytest.fixture
def upstream() -> Context:
    """K in q8_0 and V in q4_0, both rotated by upstream."""
    context = parse_context((LOGS / "cli-ok.err.txt").read_text(encoding="utf-8"))
    assert context is not None
    return context


def test_as_asked(ours: Context, upstream: Context) -> None:
    size = check_context(parse_case("iso3/planar4:block"), ours, MODEL, None, 1024)
    assert size == 8 * 2 * 1024 * (50 + 66)
    assert check_context(parse_case("iso3/planar4"), ours, MODEL, None, None) == size
    assert mode_of(ours) == "block"
    assert check_context(parse_case("q8_0/q4_0"), upstream, MODEL, None, None)
    assert mode_of(upstream) == "hadamard"


@pytest.mark.parametrize(
    ("case", "tokens", "message"),
    [
        ("iso3", 1024, "did not keep the cache in iso3, but K in iso3 and V in planar4"),
        ("f16/planar4", 1024, "K in iso3"),
        ("iso3/planar4", 256, "a cache of 1024 tokens instead of 256"),
        ("iso3/planar4:full", 1024, "did not rotate K"),
        ("iso3/planar4:block/full", 1024, "did not rotate V"),
        ("iso3/planar4:block:norm", 1024, "scaled blocks as usual, although"),
        ("iso3/planar4; 0:q8_0", 1024, "did not keep the cache"),
    ],
)
def test_otherwise(ours: Context, case: str, tokens: int, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        check_context(parse_case(case), ours, MODEL, None, tokens)


def test_rotation_of_another_type_or_none(ours: Context) -> None:
    case = parse_case("iso3/planar4")
    other = {**ours.rotations, "K": Rotation("rotor3", "rotor", "block")}
    for rotations in (other, {"V": ours.rotations["V"]}):
        with pytest.raises(CacheError, match="did not rotate K"):
            check_context(case, dataclasses.replace(ours, rotations=rotations), MODEL, None, None)


def test_upstream_rotates_although_it_was_told_not_to(upstream: Context) -> None:
    with pytest.raises(CacheError, match="rotated K although q8_0/q4_0 none asks for no rotation"):
        check_context(parse_case("q8_0/q4_0:none"), upstream, MODEL, None, None)


def test_scale_by_the_norm_that_was_not_asked_for(ours: Context) -> None:
    with pytest.raises(CacheError, match="scaled blocks with norm, although iso3/planar4 was asked for"):
        check_context(parse_case("iso3/planar4"), dataclasses.replace(ours, scale="norm"), MODEL, None, None)

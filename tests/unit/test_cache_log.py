"""Whether a cache was kept as asked, from what llama.cpp's log says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ggufrq.base.errors import ModelError
from ggufrq.cache.kv import parse_plan
from ggufrq.drive import cache_log
from ggufrq.ggufs.kv_shape import KvShape
from ggufrq.tools.logs import Context, KvCache

SHAPE = KvShape(k_layers=(256,) * 4, v_layers=(256,) * 4)
MIB = 1 << 20


def context(plan: str, tokens: int = 1024, base: str = "iso3") -> Context:
    """What the log says of a cache that is kept as ``plan`` says."""
    asked = parse_plan(plan)
    mib = round(asked.bytes_for(SHAPE, tokens) / MIB, 2)
    pairs = asked.resolve(4)
    cache = KvCache(tokens, 4, 1, 1, mib, base, base, mib / 2, mib / 2)
    layers = {"K": tuple(p.k.name for p in pairs), "V": tuple(p.v.name for p in pairs)}
    return Context((cache,), 0.0, {}, layers=layers if asked.layered else {})


@pytest.mark.parametrize(
    ("plan", "other"),
    [
        ("iso3; 0,-1:q8_0", "iso3; 0:q8_0"),
        ("iso3; 0,-1:q8_0", "iso3"),
        ("iso3", "iso3; 0:q8_0"),
        ("iso3; 1:iso3/iso4", "iso3; 1:iso4/iso3"),
    ],
)
def test_as_asked(plan: str, other: str) -> None:
    found = context(plan)
    assert cache_log.as_asked(found, parse_plan(plan))
    assert not cache_log.as_asked(found, parse_plan(other))


def test_another_spelling_of_the_same() -> None:
    assert cache_log.as_asked(context("iso3; 0,-1:q8_0"), parse_plan("iso3; 0-3:q8_0; 1-2:iso3"))


def test_calibration_is_asked_for_or_not() -> None:
    without, calibrated = context("iso3"), replace(context("iso3"), calibration="means.gguf")
    plan = parse_plan("iso3")
    asked = plan.calibrated(Path("means.gguf"))
    assert cache_log.as_asked(calibrated, asked) and not cache_log.as_asked(without, asked)
    assert cache_log.as_asked(without, plan) and not cache_log.as_asked(calibrated, plan)
    assert "calibrated by means.gguf" in cache_log.found(calibrated)


def test_words() -> None:
    assert cache_log.found(context("iso3")) == "K in iso3 and V in iso3"
    assert cache_log.found(context("iso3; 0:q8_0/iso4")).startswith(
        "K in q8_0, iso3, iso3, iso3 by layers and V in"
    )


def test_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_log, "kv_shape", lambda _: SHAPE)
    model, plan = Path("m.gguf"), parse_plan("iso3; 0,-1:q8_0")
    found = context(plan.name)
    size = plan.bytes_for(SHAPE, 1024)
    assert cache_log.cache_bytes(found, plan, model) == cache_log.layered_bytes(found, plan, SHAPE) == size
    assert cache_log.f16_bytes(found, plan, model) == 2 * 8 * 256 * 1024
    # a log that says otherwise
    assert cache_log.cache_bytes(context("iso3; 0:q8_0"), plan, model) is None
    assert cache_log.cache_bytes(context("iso3"), parse_plan("iso3"), model) == 8 * 256 * 1024 * 50 // 128


def test_models_whose_shape_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> KvShape:
        raise ModelError("special")

    monkeypatch.setattr(cache_log, "kv_shape", refuse)
    plan = parse_plan("iso3; 0:q8_0")
    assert cache_log.cache_bytes(context(plan.name), plan, Path("m.gguf")) is None
    assert cache_log.f16_bytes(context(plan.name), plan, Path("m.gguf")) is None


def test_the_newest_tokens_are_asked_for_or_not() -> None:
    without, with_them = context("iso3"), replace(context("iso3"), recent=32, recent_bytes=1000)
    plan = parse_plan("iso3")
    assert cache_log.as_asked(with_them, plan.with_recent(32)) and not cache_log.as_asked(with_them, plan)
    assert cache_log.as_asked(without, plan) and not cache_log.as_asked(without, plan.with_recent(32))
    assert not cache_log.as_asked(with_them, plan.with_recent(16))
    assert "the newest 32 tokens in f16" in cache_log.found(with_them)
    size = cache_log.cache_bytes(without, plan, Path("m"))
    assert size is not None
    assert cache_log.cache_bytes(with_them, plan.with_recent(32), Path("m")) == size + 1000

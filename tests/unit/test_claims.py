"""Claims beside measurements: when one holds, and what arithmetic says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ggufrq.measure import claims
from ggufrq.measure.claims import FAILS, HOLDS, OPEN, UNMEASURED
from ggufrq.measure.verdict import Difference
from ggufrq.report.claims import render

PUBLISHED = claims.published()


def measured(ratio: float = 1.01, error: float = 0.001, speed: float = 1.0) -> dict[str, dict[str, Any]]:
    """Rows as ``measure`` makes them: all caches cost the same, and are equally fast."""
    rows = {}
    for case in claims.all_cases(PUBLISHED):
        rounds = [speed * wobble for wobble in (0.98, 1.0, 1.02, 1.01, 0.99)]
        point = {"decode_ratios": rounds, "prefill_ratios": rounds}
        point |= {
            f"{kind}_{what}": speed for kind in ("decode", "prefill") for what in ("ratio", "ratio_err")
        }
        rows[case.spec] = {
            "name": case.name,
            "spec": case.spec,
            "error": None,
            "bits_per_value": case.pair.bits,
            "cache_bytes": int(case.pair.bits * 1024),
            "ln_ratio": math.log(ratio),
            "ln_ratio_err": error / ratio,
            "kld_mean": 0.01,
            "kld_mean_err": 0.001,
            "speed": {"points": [point]},
        }
    return rows


def judged(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {claim["claim"]: claim for claim in claims.judge(PUBLISHED, rows)}


@pytest.mark.parametrize(
    ("value", "error", "relation", "verdict"),
    [
        (1.00, 0.01, claims.AT_MOST, HOLDS),
        (1.03, 0.01, claims.AT_MOST, OPEN),
        (1.05, 0.01, claims.AT_MOST, OPEN),
        (1.07, 0.01, claims.AT_MOST, FAILS),
        (1.07, 0.01, claims.AT_LEAST, HOLDS),
        (1.05, 0.01, claims.AT_LEAST, OPEN),
        (1.00, 0.01, claims.AT_LEAST, FAILS),
        (1.04, 0.0, claims.AT_LEAST, HOLDS),
    ],
)
def test_verdict(value: float, error: float, relation: str, verdict: str) -> None:
    assert claims.verdict(1.04, Difference(value, error), relation) == verdict


def test_nothing_measured_is_no_verdict() -> None:
    assert claims.verdict(1.0, None, claims.AT_MOST) == UNMEASURED


def test_published_figures_agree_with_themselves() -> None:
    rows = PUBLISHED["table"]["rows"]
    assert rows["iso3"]["decode"] / rows["f16"]["decode"] == pytest.approx(0.84, abs=0.005)
    assert rows["iso3"]["prefill"] / rows["f16"]["prefill"] == pytest.approx(0.55, abs=0.005)
    assert PUBLISHED["table"]["source"].startswith("https://") and PUBLISHED["table"]["date"]
    specs = [case.spec for case in claims.all_cases(PUBLISHED)]
    assert specs[0] == "f16" and len(specs) == len(set(specs))
    assert {"iso3:block:norm", "planar3:block:norm", "iso3:hadamard:norm", "iso3"} <= set(specs)


def test_arithmetic() -> None:
    found = judged(measured())
    three, two = found["compression at 3 bits, times"], found["compression at 2 bits, times"]
    assert (three["published"], three["measured"], three["verdict"]) == (10.3, 5.12, FAILS)
    assert (two["published"], two["verdict"]) == (16, FAILS)
    assert two["measured"] == pytest.approx(7.529, abs=0.001)
    cache = found["Qwen3.5-27B: f16 cache at 262K, GB"]
    assert cache["measured"] == pytest.approx(17.18, abs=0.01) and cache["verdict"] == FAILS
    q8_0 = found["Qwen3.5-27B: Q8_0 file, GB"]
    assert q8_0["measured"] == pytest.approx(28.6, abs=0.05) and q8_0["verdict"] == FAILS
    for name in ("Q4_K_M", "IQ4_XS"):
        file = found[f"Qwen3.5-27B: {name} file, GB"]
        assert file["lowest"] < 17 < file["measured"] < file["published"] and file["verdict"] == FAILS
    assert found["rotation parameters, times fewer"]["measured"] == 128


def test_measured_claims() -> None:
    found = judged(measured(ratio=1.01, error=0.001, speed=1.0))
    assert (
        found["iso3: perplexity, times f16"]["verdict"] == HOLDS
    )  # 1.01 is less than the 1.042 of the claim
    assert found["iso3 / turbo3: perplexity"]["verdict"] == OPEN  # both cost the same here
    assert found["iso3 / turbo3: mean KLD"]["verdict"] == OPEN
    assert found["iso3: decode, times f16"]["verdict"] == HOLDS
    assert found["planar3: prefill, times turbo3"]["verdict"] == FAILS
    found = judged(measured(ratio=1.20, error=0.01, speed=0.3))
    assert found["iso3: perplexity, times f16"]["verdict"] == FAILS
    assert found["iso3: perplexity, times f16"]["measured"] == pytest.approx(1.2)
    assert found["iso3: prefill, times f16"]["verdict"] == FAILS
    found = judged(measured(ratio=1.20, error=0.2))
    assert found["iso3: perplexity, times f16"]["verdict"] == OPEN


def test_divergence_tells_caches_apart_where_perplexity_does_not() -> None:
    rows = measured(error=0.02)
    rows["iso3:block:norm"] |= {"kld_mean": 0.027, "kld_mean_err": 0.003}
    rows["iso3:hadamard:norm"] |= {"kld_mean": 0.005, "kld_mean_err": 0.0004}
    found = judged(rows)
    assert found["iso3 / turbo3: perplexity"]["verdict"] == OPEN
    divergence = found["iso3 / turbo3: mean KLD"]
    assert divergence["verdict"] == FAILS
    assert divergence["measured"] == pytest.approx(5.4)
    assert divergence["error"] == pytest.approx(5.4 * math.hypot(3 / 27, 0.4 / 5), rel=1e-6)


def test_a_case_that_the_build_cannot_do_is_not_measured_as_something_else() -> None:
    rows = measured()
    rows["iso3:block:norm"] = {"name": "iso3 block norm", "spec": "iso3:block:norm", "error": "no norm here"}
    found = judged(rows)
    for name in (
        "iso3: perplexity, times f16",
        "iso3: decode, times f16",
        "iso3 / turbo3: perplexity",
        "iso3 / planar3: perplexity",
    ):
        assert found[name]["verdict"] == UNMEASURED and found[name]["measured"] is None
    assert found["planar3: perplexity, times f16"]["verdict"] == HOLDS
    assert found["iso3: decode, times f16"]["why_not"] == "no norm here"


def test_table_fits_80_columns_and_says_what_was_not_measured() -> None:
    rows = measured(ratio=1.1, error=0.0018, speed=1.234)
    rows["iso3:block:norm"] = {"name": "iso3 block norm", "spec": "iso3:block:norm", "error": "no norm here"}
    text = render(
        {
            "model": {"name": "a-model", "weights": "Q8_0"},
            "machine": {
                "cpu": "Some Processor",
                "llama_cpp": "0123456789abcdef",
                "patch_set": "fedcba9876543210",
            },
            "text": {"file": "text.txt"},
            "settings": {"ctx": 2048, "chunks": 8, "prompt": 512, "generate": 64, "rounds": 5},
            "published": PUBLISHED,
            "cases": list(rows.values()),
            "claims": claims.judge(PUBLISHED, rows),
        }
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "not measured: iso3 block norm: no norm here" in text
    assert all(name in text for name in judged(rows))
    assert PUBLISHED["table"]["source"] in text
    assert "does not hold" in text and "cannot be told" in text and "holds" in text

"""What the self-check makes of divergences; that it finds faults of real builds is tested with these."""

from __future__ import annotations

from ggufrq.cache.cases import Case, parse_case, parse_cases
from ggufrq.measure.validate import check

#: As measured on docs-qwen3-8m with two texts of 512 tokens (q4_0 with its rotation: see docs/validation.md).
SOUND = {
    "q4_0/f16:none": 0.0051,
    "f16/q4_0:none": 0.0031,
    "q4_0/f16": 0.0027,
    "f16/q4_0": 0.0029,
    "iso3/f16": 0.00999,
    "f16/iso3": 0.01099,
    "iso3": 0.02093,
    "iso3/f16:block": 0.03,
    "f16/iso3:block": 0.01,
    "iso3:block": 0.05,
}


def judged(case: str, **changes: float) -> dict[str, bool]:
    values = {parse_case(spec): value for spec, value in {**SOUND, **changes}.items()}
    return {found["check"]: found["ok"] for found in check.judge(parse_case(case), values)}


def test_sound_build() -> None:
    assert judged("iso3") == {"k_alone": True, "v_alone": True, "loss": True}


def test_rotation_of_v_that_is_not_undone() -> None:
    found = judged("iso3", **{"f16/iso3": 4.2, "iso3": 4.3})
    assert found == {"k_alone": True, "v_alone": False, "loss": False}


def test_k_that_stays_in_f16() -> None:
    # as measured in such a build: no zero, since K is kept rotated, and f16 rounds the rotated values
    assert judged("iso3", **{"iso3/f16": 0.00011, "iso3": 0.011}) == {
        "k_alone": False,
        "v_alone": True,
        "loss": True,
    }


def test_nothing_quantized_at_all() -> None:
    assert not judged("iso3", **{"iso3": 1e-7})["loss"]


def test_published_rotation_may_lose_any_amount_but_not_nothing() -> None:
    assert all(judged("iso3:block", **{"iso3:block": 3.0, "iso3/f16:block": 2.0}).values())
    assert not judged("iso3:block", **{"iso3/f16:block": 1e-6})["k_alone"]


def references(**changes: float) -> list[bool]:
    values = {parse_case(spec): value for spec, value in {**SOUND, **changes}.items()}
    return [found["ok"] for found in check.reference(values)]


def test_references_must_lose_something_themselves() -> None:
    assert references() == [True, True]
    # K in f16 whatever the type: q4_0 is then the base itself
    assert references(**{"q4_0/f16:none": -1e-6, "q4_0/f16": 0.00011}) == [False, True]
    # upstream's own rotation of V is not undone
    assert references(**{"f16/q4_0": 5.1}) == [True, False]


def test_one_side_of_ours() -> None:
    assert judged("iso3/q8_0", **{"iso3/q8_0": 0.0102}) == {"k_alone": True, "loss": True}


def test_runs_that_are_taken() -> None:
    names = [case.name for case in check.loss_runs(parse_cases("iso3,q4_0,iso3; 0:q8_0"))]
    assert names == [
        "q4_0/f16 none",
        "f16/q4_0 none",
        "q4_0/f16",
        "f16/q4_0",
        "iso3/f16",
        "f16/iso3",
        "iso3",
    ]
    # references without upstream's own rotation: a fault of it would hide in them
    assert check.loss_runs(parse_cases("iso3"))[0].environment()["LLAMA_ATTN_ROT_DISABLE"] == "1"


def test_types_in_layers_are_checked_too() -> None:
    assert check.types_of(parse_cases("iso3/q8_0; 0:planar4,f16,iso3")) == ["iso3", "planar4"]


def test_squared_errors_of_the_codes() -> None:
    errors = {name: check.relative_error(name) for name in ("iso2", "iso3", "iso4", "q4_0", "q8_0", "f16")}
    # the optimum of a fixed scalar code on Gaussian values (Max 1960). A scale fitted to each block of 128
    # does better, by up to a fifth; one that does not shrink the values adds about the square of the error
    for name, optimum in (("iso2", 0.1175), ("iso3", 0.03454), ("iso4", 0.009497)):
        assert 0.8 * optimum < errors[name] < 1.02 * (optimum + optimum**2)
    assert 0.004 < errors["q4_0"] < 0.012
    assert errors["q8_0"] < 1e-4
    assert errors["f16"] == 0


def test_entry_of_a_cache_kept_otherwise() -> None:
    found = check.cache_check(Case(parse_case("iso3").plan), "K in f16 and V in iso3", ok=False)
    assert (found["check"], found["case"], found["ok"]) == ("cache", "iso3", False)

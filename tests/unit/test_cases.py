from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.base.errors import UsageError
from ggufrq.cache.cases import Case, assignments, parse_case, parse_cases
from ggufrq.cache.kv import Sought, parse_plan


@pytest.mark.parametrize(
    ("text", "name", "set_variables"),
    [
        ("iso3", "iso3", {}),
        ("iso3/planar4", "iso3/planar4", {}),
        ("iso3:block", "iso3 block", {"LLAMA_RQ_MODE": "block"}),
        ("iso3:block:norm", "iso3 block norm", {"LLAMA_RQ_MODE": "block", "LLAMA_RQ_SCALE": "norm"}),
        ("iso3:norm", "iso3 norm", {"LLAMA_RQ_SCALE": "norm"}),
        ("iso3:lsq", "iso3 lsq", {"LLAMA_RQ_SCALE": "lsq"}),
        ("iso3/iso4:full/block", "iso3/iso4 full/block", {"LLAMA_RQ_MODE": "full/block"}),
        ("q4_0:none", "q4_0 none", {"LLAMA_RQ_MODE": "none", "LLAMA_ATTN_ROT_DISABLE": "1"}),
        ("iso3; 0-1,-1:q8_0", "iso3; 0-1,-1:q8_0", {"LLAMA_RQ_LAYERS": "0-1,-1:q8_0"}),
        ("iso3:block;0:q8_0", "iso3 block; 0:q8_0", {"LLAMA_RQ_MODE": "block", "LLAMA_RQ_LAYERS": "0:q8_0"}),
    ],
)
def test_case(text: str, name: str, set_variables: dict[str, str]) -> None:
    case = parse_case(text)
    assert case.name == name
    assert {key: value for key, value in case.environment().items() if value} == set_variables
    assert parse_case(case.spec) == case


def test_environment_unsets_what_the_user_has_set() -> None:
    assert set(parse_case("iso3").environment()) >= {
        "LLAMA_RQ_MODE",
        "LLAMA_RQ_SCALE",
        "LLAMA_RQ_LAYERS",
        "LLAMA_RQ_CALIB",
        "LLAMA_RQ_PROFILE",
        "LLAMA_RQ_FIRST",
        "LLAMA_ATTN_ROT_DISABLE",
    }
    assert assignments(parse_case("iso3").environment()) == ""
    assert assignments({"A": "x y", "B": None, "C": "1"}) == "A='x y' C=1 "


@pytest.mark.parametrize(
    "text",
    ["", "iso6", "iso3:block:full", ":block", "iso3/iso4/q8_0", "iso3+", "iso3+calib2", "iso3+plain+recent1"],
)
def test_no_case(text: str) -> None:
    with pytest.raises(UsageError):
        parse_case(text)


def test_list() -> None:
    found = parse_cases("f16, iso3; 0, -1:q8_0,planar3/q4_0 ,iso4;1-2,5:f16")
    names = [case.plan.name for case in found]
    assert names == ["f16", "iso3; 0,-1:q8_0", "planar3/q4_0", "iso4; 1-2,5:f16"]
    assert [case.name for case in parse_cases("iso3, iso4; 0,-1:q8_0 ,f16,iso3")] == [
        "iso3",
        "iso4; 0,-1:q8_0",
        "f16",
    ]


@pytest.mark.parametrize("word", ["profile", "calib"])
def test_a_profile_is_for_our_types_or_for_those_that_ask(tmp_path: Path, word: str) -> None:
    file = tmp_path / "m-kv.gguf"
    file.write_bytes(b"maps")
    assert [case.name for case in parse_cases("iso3,f16", file)] == ["iso3 +profile", "f16"]
    names = [case.name for case in parse_cases(f"iso3,iso4+{word},f16", file)]
    assert names == ["iso3", "iso4 +profile", "f16"]
    (case,) = parse_cases(f"iso3:block+{word}", file)
    assert case.spec == "iso3:block+profile" and parse_case(case.spec, file) == case
    assert case.environment()["LLAMA_RQ_PROFILE"] == str(file)
    # one that is yet to be looked for
    assert parse_case(f"iso3+{word}").plan.profile is Sought.AUTO
    assert [case.plan.profile for case in parse_cases("iso3,f16", Sought.WEIGHTS)] == [Sought.WEIGHTS, None]


def test_a_case_without_anything_beside_its_types() -> None:
    cases = parse_cases("iso3,iso3+plain,q8_0/iso4", Sought.AUTO, 32, 1)
    assert [case.name for case in cases] == [
        "iso3 +profile +first1 +recent32",
        "iso3",
        "q8_0/iso4 +first1 +recent32",
    ]


def test_a_profile_is_for_k_in_a_type_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "m-kv.gguf"
    file.write_bytes(b"maps")
    text = "q8_0/iso4,iso3,f16; 0:q8_0,f16; 0:f16/iso3,f16; 0:iso3/f16"
    assert [case.spec for case in parse_cases(text, file)] == [
        "q8_0/iso4", "iso3+profile", "f16; 0:q8_0", "f16; 0:f16/iso3", "f16+profile; 0:iso3/f16",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="for K in a type of ours"):
        parse_cases("q8_0/iso4+profile", file)


def test_results_depend_on_what_the_profile_says(tmp_path: Path) -> None:
    file = tmp_path / "m-kv.gguf"
    file.write_bytes(b"maps")
    (case,) = parse_cases("iso3", file)
    before = case.facts()
    file.write_bytes(b"other maps")
    assert case.facts() != before
    assert Case(parse_plan("iso3")).facts() == {"k": "iso3", "v": "iso3", "mode": None}


def test_exact_tokens_are_for_our_types_or_for_those_that_ask() -> None:
    (case,) = parse_cases("iso3:block:norm+recent32; 0:q8_0")
    assert (case.plan.recent, case.scale, case.plan.layered) == (32, "norm", True)
    assert case.name == "iso3 block norm +recent32; 0:q8_0"
    assert case.spec == "iso3:block:norm+recent32; 0:q8_0" and parse_cases(case.spec) == [case]
    assert case.facts() != parse_cases("iso3:block:norm; 0:q8_0")[0].facts()
    assert case.environment()["LLAMA_RQ_RECENT"] == "32"
    names = [case.name for case in parse_cases("iso3,f16,q8_0/iso4", recent=16)]
    assert names == ["iso3 +recent16", "f16", "q8_0/iso4 +recent16"]
    assert [case.plan.recent for case in parse_cases("iso3,iso3+recent8", recent=16)] == [0, 8]
    assert [case.plan.recent for case in parse_cases("iso3+recent0,iso3")] == [0]
    names = [case.name for case in parse_cases("q4_0+recent1024,q8_0,iso3", recent=16)]
    assert names == ["q4_0 +recent1024", "q8_0", "iso3"]
    (first,) = parse_cases("iso3+recent8+first1")
    assert first.spec == "iso3+first1+recent8" and parse_case(first.spec) == first
    assert first.facts() != parse_case("iso3+recent8").facts()
    assert [case.name for case in parse_cases("iso3,iso3+recent8", first=2)] == [
        "iso3 +first2", "iso3 +first2 +recent8",
    ]  # fmt: skip


def test_exact_tokens_are_usual_where_none_are_written() -> None:
    def names(text: str, recent: int | None = None, first: int | None = None) -> list[str]:
        return [case.name for case in parse_cases(text, None, recent, first)]

    assert names("iso3,f16/iso4,q8_0") == ["iso3 +first1 +recent32", "f16/iso4 +first1 +recent32", "q8_0"]
    assert names("iso3,iso3+plain") == ["iso3 +first1 +recent32", "iso3"]
    assert names("iso3,iso3+recent8") == ["iso3", "iso3 +recent8"]
    assert names("iso3,iso3+first2") == ["iso3", "iso3 +first2"]
    assert names("iso3,q8_0", 0, 0) == ["iso3", "q8_0"]
    assert names("iso3", 8) == ["iso3 +first1 +recent8"]
    usual, asked = parse_cases("iso3", None, None, None), parse_cases("iso3", None, 32, 1)
    assert usual == asked and usual[0].facts() == asked[0].facts()
    assert (usual[0].plan.optional, asked[0].plan.optional) == (True, False)


@pytest.mark.parametrize(
    "text",
    ["iso3+recent", "iso3+recent4097", "f16+recent32", "iso3+recent32:block", "f16+first1", "iso3+first"],
)
def test_exact_tokens_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError):
        parse_cases(text)

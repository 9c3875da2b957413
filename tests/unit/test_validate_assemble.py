"""The result that is put together from rows, and what it says of failures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, parse_case
from ggufrq.cache.kv import parse_plan
from ggufrq.measure.divergence import Subject
from ggufrq.measure.kept import Row
from ggufrq.measure.validate.assemble import Facts, Taken, assemble, failed
from ggufrq.measure.validate.check import cache_check, unmeasured
from ggufrq.measure.validate.pieces import Unit
from ggufrq.measure.validate.plan import ValidationPlan, make_plan

F16, ISO3, Q4 = (parse_case(name) for name in ("f16", "iso3:block", "q4_0"))


def quality(case: Case, ctx: int, **figures: Any) -> tuple[Unit, Row]:
    row = {
        "case": case.name, "mode": case.mode or "none",
        "type_k": case.pair.k.name, "type_v": case.pair.v.name,
        "bits_per_value": case.pair.bits, "cache_bytes": int(case.pair.bits * ctx), "cache_tokens": ctx,
        "recurrent_mib": 0.5, "ctx": ctx, "chunks": 2, "scored": ctx - 2, "ppl": 10.0, "ppl_err": 0.1,
        "ppl_base": 10.0, "ln_ratio": 0.0, "ln_ratio_err": 0.001, "kld_mean": 0.0, "kld_mean_err": 0.0,
        "kld_median": 0.0, "kld_p99": 0.0, "kld_p999": 0.0, "kld_max": 0.0,
        "same_top": 1.0, "same_top_err": 0.0,
        "base_command": "llama-perplexity base", "command": f"llama-perplexity {case.name} {ctx}",
        "seconds": 1.5,
    }  # fmt: skip
    name = f"quality-{case.name.replace(' ', '-')}-{ctx}"
    return Unit("quality", case, {"case": case.name, "ctx": ctx}, ctx, name, ctx), {**row, **figures}


def greedy(case: Case, *tokens: int) -> tuple[Unit, Row]:
    row = {
        "answers": [{"tokens": list(tokens), "text": "".join(map(chr, tokens))}],
        "memory": {"cache_bytes": 1, "cache_tokens": 1, "recurrent_mib": 0, "bits_per_value": case.pair.bits},
        "mode": "full", "command": "llama-server", "seconds": 1,
    }  # fmt: skip
    return Unit("greedy", case, {"case": case.name}, 1, "server"), row


@pytest.fixture
def made(tmp_path: Path) -> tuple[ValidationPlan, Facts, Build]:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    text = tmp_path / "text.txt"
    text.write_text("words")
    plan = make_plan("m", kv="iso3:block,q4_0", text=text, quick=True, again="ggufrq validate m")
    facts = Facts(Subject("m", model, "sha", "Q8_0", None), "llama", 8, 4096, "textsha")
    return plan, facts, Build("key", tmp_path, tmp_path, tmp_path, {"patch_set": "ps"})


def result_of(
    made: tuple[ValidationPlan, Facts, Build], *rows: tuple[Unit, Row], **taken: Any
) -> dict[str, Any]:
    plan, facts, build = made
    given = {"failures": {}, "checks": [], "logs": facts.model.path.parent / "logs", **taken}
    found = assemble(plan, facts, build, Taken(dict(rows), **given))
    json.dumps(found, allow_nan=False)
    return found


def test_quality_and_verdicts(made: tuple[ValidationPlan, Facts, Build]) -> None:
    found = result_of(
        made,
        quality(F16, 1024, kld_mean=1e-6, kld_mean_err=1e-6),
        quality(ISO3, 1024, ln_ratio=0.0021, kld_mean=0.05, kld_mean_err=0.002),
        quality(Q4, 1024, ln_ratio=-0.0019, kld_mean=0.045, kld_mean_err=0.002),
        quality(ISO3, 512, ln_ratio=-0.0021, kld_mean=2e-6, kld_mean_err=1e-6),
        quality(F16, 512),
        quality(Q4, 512, kld_mean=1e-6, kld_mean_err=1e-6),
    )
    base, iso3, q4 = found["cases"]
    assert [row["ctx"] for row in iso3["quality"]] == [512, 1024]
    assert [row["verdict_ppl"] for row in iso3["quality"]] == ["better", "worse"]
    assert [row["verdict_kld"] for row in iso3["quality"]] == ["no difference seen", "worse"]
    assert [row["verdict_ppl"] for row in q4["quality"]] == ["no difference seen"] * 2
    assert base["quality"][0]["verdict_kld"] is None and base["is_base"]
    assert iso3["quality"][0]["log"] == "logs/quality-iso3-block-512.log"
    # 0.005 apart with an error of 0.0028: not beyond twice that
    assert [(c["a"], c["b"], c["ctx"], c["verdict"]) for c in found["comparisons"]] == [
        ("iso3 block", "q4_0", 512, "no difference seen"),
        ("iso3 block", "q4_0", 1024, "no difference seen"),
    ]
    assert (iso3["mode"], iso3["spec"], iso3["environment"]) == (
        "block", "iso3:block", {"LLAMA_RQ_MODE": "block"},
    )  # fmt: skip
    assert iso3["memory"]["of_f16"] == 3.125 / 16 and iso3["memory"]["recurrent_mib"] == 0.5
    assert found["seconds"] == 9.0
    assert found["commands"][0] == "llama-perplexity base" and len(found["commands"]) == 7
    assert not failed(found)
    assert any("up to 1024 tokens only" in note for note in found["notes"])
    assert any("sizes were not checked" in note for note in found["notes"])
    assert found["notes"][-1].startswith("the build was not checked")


def test_what_was_on_beside_the_types(made: tuple[ValidationPlan, Facts, Build], tmp_path: Path) -> None:
    case = Case(parse_plan("iso3").with_profile(tmp_path / "a-kv.gguf").with_exact(32, 1))
    plan, facts, build = made
    made = (replace(plan, cases=(F16, case)), facts, build)
    found = result_of(made, quality(F16, 512), quality(case, 512, profile_source="text"))
    base, told = found["cases"]
    assert [base[name] for name in ("profile", "profile_source", "recent", "first")] == [None, None, 0, 0]
    assert [told[name] for name in ("name", "profile", "profile_source", "recent", "first")] == [
        "iso3 +profile +first1 +recent32", "a-kv.gguf", "text", 32, 1,
    ]  # fmt: skip
    assert told["environment"]["LLAMA_RQ_PROFILE"] == "a-kv.gguf"
    assert "+profile: K is stored by a profile from a text" in found["notes"]


def test_only_what_was_measured(made: tuple[ValidationPlan, Facts, Build]) -> None:
    found = result_of(made, greedy(F16, 97, 98, 99), greedy(ISO3, 97, 98, 100))
    base, iso3, q4 = found["cases"]
    assert iso3["quality"] is None and iso3["needle"] is None and iso3["speed"] is None
    assert iso3["greedy"]["first_difference"] == [2] and base["greedy"]["agree"] == 1
    assert (iso3["bits_per_value"], iso3["mode"]) == (3.125, "full")
    assert q4["greedy"] is None and q4["mode"] is None and q4["memory"] is None
    assert found["comparisons"] == []


def test_failures_are_told_once(made: tuple[ValidationPlan, Facts, Build]) -> None:
    found = result_of(
        made,
        quality(F16, 1024),
        failures={ISO3: "K in f16", Q4: "llama-perplexity gave no result"},
        checks=[cache_check(ISO3, "K in f16", ok=False), unmeasured("speed", "llama-bench failed")],
    )
    told = failed(found)
    assert len(told) == 3
    assert told[0].startswith("iso3 block: cache: ") and "K in f16" in told[0]
    assert told[1].startswith("build: speed: ") and "llama-bench failed" in told[1]
    assert told[2] == "q4_0: llama-perplexity gave no result"
    assert found["cases"][1]["error"] == "K in f16"
    assert found["notes"][-1].startswith("a self-check failed")

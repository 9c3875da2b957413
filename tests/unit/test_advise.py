"""Which cache is recommended, kept and taken, and which is warned of, without a llama.cpp."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from attention_models import QK_NORM, SPLIT, numbers, write
from click.testing import CliRunner, Result
from shards import split_model

from ggufrq import cli
from ggufrq.advise import choice, ladder
from ggufrq.advise.ladder import Rung, Wishes, best_of
from ggufrq.base.errors import ToolError, UsageError
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.cache.kv import KvPlan, parse_plan
from ggufrq.cli import advise as command
from ggufrq.drive import run, serve
from ggufrq.measure.kept import Row
from ggufrq.measure.verdict import loss_in_words
from ggufrq.tools.perplexity import NoNumbers
from ggufrq.tools.programs import Programs

KLD = {
    "q8_0": 0.0006,
    "q4_0": 0.115,
    "iso5": 0.0009,
    "iso4": 0.005,
    "iso3": 0.021,
    "iso2": 0.6,
    "planar3": 0.022,
    "q4_1": math.nan,
    "q5_0": math.nan,
}
REFUSED = {
    "planar4": "CUDA0 (A card), which layer 0 is on, has no attention kernel for K in planar4 and V "
    "in planar4 at head_dim 128: take other cache types (the same for K and V)",
    "rotor4": "out of memory",
}
BIG = numbers(attention__key_length=128, attention__head_count=2, attention__head_count_kv=1)


def model(folder: Path, name: str = "Some-1B-Q8_0.gguf", architecture: str = "qwen3", **more: Any) -> Path:
    """A model with heads of 128."""
    folder.mkdir(exist_ok=True)
    tensors = {
        "attn_norm.weight": (32,),
        "attn_q.weight": (256, 32),
        "attn_k.weight": (128, 32),
        **({"attn_q.bias": (256,), "attn_k.bias": (128,)} if more.pop("biased", False) else {}),
        **({"attn_sinks.weight": (2,)} if more.pop("sinks", False) else {}),
    }
    values = {**BIG, "rope.dimension_count": 128, "attention.value_length": 128, **more}
    write(folder / name, architecture, values, [tensors] * 2)
    return folder / name


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build("key", tmp_path, tmp_path, tmp_path, {"backend": "cpu"})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, build: Build) -> list[str]:
    """What is measured, by title: stands for llama-perplexity."""
    taken: list[str] = []

    def take(self: ladder.Divergences, case: Case, **_: Any) -> Row:
        taken.append(case.name)
        if case.pair.name in REFUSED:
            self._runs.ppl = 1.0
            raise ToolError(f"llama-perplexity gave no result: {REFUSED[case.pair.name]}")
        kld = KLD[case.pair.name]
        if kld != kld:
            self._runs.ppl = None if case.pair.name == "q5_0" else 1.0
            raise NoNumbers("the divergence is not a number")
        row = {"kld_mean": kld, "kld_mean_err": 0.02 * kld, "command": f"run {case.name}"}
        self.results.put(self.facts(case), row)
        return row

    monkeypatch.setattr(ladder.Divergences, "take", take)
    monkeypatch.setattr(command, "require_build", lambda: build)
    monkeypatch.setattr(ladder.DryRun, "__init__", lambda *_: None)
    monkeypatch.setattr(ladder.DryRun, "__enter__", lambda self: self)
    monkeypatch.setattr(ladder.DryRun, "__exit__", lambda *_: None)

    def no_buffers(*_: Any) -> Any:
        raise ToolError("there is no llama.cpp")

    monkeypatch.setattr(ladder.DryRun, "buffers", no_buffers)
    return taken


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, ["advise", *map(str, arguments)])


def data(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_smallest_cache_under_a_loss(tmp_path: Path, measured: list[str]) -> None:
    path = model(tmp_path / "m")
    found = data(path, "--ctx", "32K")
    usual = " +profile +first1 +recent32"
    ours = [f"{name}{usual}" for name in ("iso5", "iso4", "iso3", "iso2")]
    titles = ["f16", "q8_0", ours[0], "q4_0", *ours[1:]]
    assert [rung["title"] for rung in found["rungs"]] == titles and measured == titles[1:]
    assert found["recommended"] == "iso3"
    rungs = {rung["kv"]: rung for rung in found["rungs"]}
    assert (rungs["f16"]["bits"], rungs["f16"]["kld"], rungs["q8_0"]["bits"]) == (16, None, 8.5)
    assert rungs["iso3"]["bits"] == 3.125 + 16 * 34 / 32768
    assert rungs["iso3"]["cache"] == 2 * 32768 * 2 * 50 + 34 * 2 * 2 * 128 * 2 + 2 * 128 * (2 * 2 * 128 + 4)
    words = {name: rung["words"] for name, rung in rungs.items()}
    assert words == {
        "f16": "", "q8_0": "next to none", "iso5": "next to none", "q4_0": "large", "iso4": "small",
        "iso3": "moderate", "iso2": "ruinous",
    }  # fmt: skip
    # a smaller loss, and what is known is not measured again
    assert data(path, "--ctx", "32K", "--loss", "0.01")["recommended"] == "iso4"
    assert data(path, "--ctx", "32K", "--loss", "0.002")["recommended"] == "iso5"
    assert data(path, "--ctx", "32K", "--loss", "0.0001")["recommended"] == "f16"
    assert len(measured) == 6
    assert data(path, "--kv", "planar3,iso3", "--fresh")["recommended"] == "iso3"
    assert measured[6:] == [f"planar3{usual}", f"iso3{usual}"]


def test_what_loses_least_in_a_memory(tmp_path: Path, measured: list[str]) -> None:
    path = model(tmp_path / "m")
    whole = {rung["kv"]: rung["total"] for rung in data(path, "--ctx", "32K")["rungs"]}

    def fits(size: int) -> dict[str, Any]:
        return data(path, "--ctx", "32K", "--fits", f"{size / 1000}KB")

    assert fits(whole["f16"] + 1000)["recommended"] == "f16"
    assert fits(whole["f16"] - 1000)["recommended"] == "q8_0"
    assert fits(whole["q8_0"] - 1000)["recommended"] == "iso5"
    assert fits(whole["iso5"] - 1000)["recommended"] == "iso4", "q4_0 is larger and loses more"
    assert fits(whole["iso4"] - 1000)["recommended"] == "iso3"
    small = fits(whole["iso2"] - 1000)
    assert small["recommended"] is None
    assert all(rung["largest"] < 32768 for rung in small["rungs"])
    said = invoke(path, "--ctx", "32K", "--fits", f"{whole['iso2'] / 1000 - 1}KB").stdout
    assert "None of these leaves room for 32,768 tokens" in said and "largest ctx" in said
    said = invoke(path, "--ctx", "32K", "--fits", f"{whole['iso3'] / 1000 - 1}KB").stdout
    said = " ".join(said.split())
    assert "Take --kv iso2" in said and "more than 0.03, which is usually accepted" in said


def test_the_text(tmp_path: Path, measured: list[str]) -> None:
    said = invoke(model(tmp_path / "m"), "--ctx", "8K").stdout
    assert "Some-1B, Some-1B-Q8_0.gguf, at 8,192 tokens" in said
    row = next(line for line in said.splitlines() if line.startswith("iso3 +profile +first1 +recent32"))
    assert row.split()[4:] == ["3.191", *row.split()[5:7], "0.0210", "±", "0.0004", "moderate"]
    assert "Take --kv iso3: the smallest with a mean KLD of 0.03 or less" in said and "--kv auto" in said
    assert max(map(len, said.splitlines())) <= 100
    # heads that our types do not take
    narrow = tmp_path / "narrow.gguf"
    write(narrow, "qwen3", numbers(attention__value_length=8), [{**SPLIT, **QK_NORM}] * 2)
    assert "iso3 takes 26.00 bits a value in heads of K with 8" in " ".join(
        invoke(narrow, "--kv", "iso3").stdout.split()
    )
    windows = {"attention.sliding_window": 128, "attention.sliding_window_pattern": [True, False]}
    swa = data(model(tmp_path / "m", "swa.gguf", "gemma3", **windows), "--ctx", "32K", "--kv", "iso3")
    assert swa["rungs"][0]["cache"] == 2 * 2 * 128 * (32768 + 768) and swa["recommended"] == "iso3"
    for kv in ("iso3+plain", "iso3:block"):
        error = invoke(narrow, "--kv", kv).exception
        assert isinstance(error, UsageError) and "without marks and modes" in error.message


def test_a_cache_that_computes_no_numbers_is_told_of(tmp_path: Path, measured: list[str]) -> None:
    path = model(tmp_path / "m")
    found = data(path, "--kv", "q4_1,iso3")
    assert found["recommended"] == "iso3" and measured[0] == "q4_1"
    assert found["rungs"][1]["why_not"] == "q4_1: the divergence is not a number"
    error = invoke(path, "--kv", "q5_0,iso3").exception  # the base itself
    assert isinstance(error, NoNumbers)


def test_every_shard_tells_models_apart(tmp_path: Path, measured: list[str]) -> None:
    first, second = split_model(tmp_path / "m-Q8_0", 2)
    for _ in range(2):
        data(first, "--kv", "q8_0")
    assert measured == ["q8_0"]
    content = second.read_bytes()
    second.write_bytes(content[:-4] + b"\0\0\0\0")
    data(first, "--kv", "q8_0")
    assert measured == ["q8_0"] * 2


def test_heads_that_a_gpu_does_not_take(tmp_path: Path, measured: list[str], build: Build) -> None:
    """Known before, or told by llama.cpp: the other caches are measured, and no such type is named better."""
    values = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
    narrow = model(tmp_path / "m", "narrow.gguf", "qwen2", biased=True, **values)
    plan = parse_plan("q4_0")
    assert "better --kv iso3 with its profile" in str(choice.warning(narrow, plan, build, "m"))
    build.manifest["backend"] = "cuda"
    assert "better --kv iso3 with its profile" in str(choice.warning(narrow, plan, build, "m"))
    rungs = data(narrow, "--kv", "q8_0,iso5,q4_0")["rungs"]
    assert measured == ["q8_0", "q4_0"] and "iso5 is for the CPU alone" in rungs[2]["why_not"]
    assert invoke(model(tmp_path / "m"), "--kv", "rotor4").exception is not None, "another failure"
    found = data(model(tmp_path / "m"), "--kv", "q8_0,planar4,q4_0")
    assert found["recommended"] == "q8_0" and "has no attention kernel" in found["rungs"][2]["why_not"]


def test_an_error_decides_against_a_cache() -> None:
    def rung(kv: str, cache: int, kld: float | None, error: float) -> Rung:
        return Rung(kv, kv, 4.0, cache, cache, kld=kld, kld_err=error)

    rungs = [rung("f16", 100, None, 0), rung("a", 30, 0.029, 0.001), rung("b", 40, 0.02, 0.001)]
    for loss, best in ((0.03, "b"), (0.0311, "a"), (0.01, "f16")):
        found = best_of(rungs, Wishes(4096, loss))
        assert found is not None and found.kv == best
    assert [loss_in_words(kld) for kld in (0, 0.002, 0.0021, 0.3, 0.31)] == [
        "next to none", "next to none", "small", "large", "ruinous",
    ]  # fmt: skip


# What run and serve make of it


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch, build: Build) -> list[KvPlan]:
    """The caches of prompts that were run."""
    plans: list[KvPlan] = []

    def generate(path: Path, text: str, plan: KvPlan, *_: Any, **__: Any) -> run.Answer:
        plans.append(plan)
        return run.Answer("x", plan.name, "", "", 1, 1, 1, 1.0, 0.0, 1, 1.0, 1, 1.0, Path("log"))

    monkeypatch.setattr(run, "generate", generate)
    monkeypatch.setattr(run, "programs_for", lambda _: Programs.of_build(build))
    monkeypatch.setattr(run, "settle", lambda plan, *_, **__: plan)
    return plans


def ask(path: Path, *options: str) -> list[str]:
    """The lines on stderr of a run, but for those on the cache and speed."""
    result = CliRunner().invoke(cli.cli, ["run", str(path), "-p", "x", *options])
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if line.startswith("cache "))]


def test_auto_takes_what_was_recommended(
    tmp_path: Path, measured: list[str], generated: list[KvPlan]
) -> None:
    path = model(tmp_path / "m")
    (said,) = ask(path, "--kv", "auto")
    assert said == f"the best cache for this model is not known yet; taking iso3: ggufrq advise {path}"
    assert generated.pop() == parse_plan("iso3").as_usual()
    data(path, "--loss", "0.01")
    other = model(tmp_path / "m", "Some-1B-Q4_K_M.gguf")
    assert ask(other, "--kv", "auto") == [
        "--kv iso4, as ggufrq advise recommends for this model, a mean KLD of 0.0050"
    ]
    assert generated.pop() == parse_plan("iso4").as_usual()
    assert ask(path, "--kv", "auto", "--kv-recent", "0", "--kv-profile", "none")
    assert generated.pop() == parse_plan("iso4").with_wished(0, None)
    data(path, "--loss", "0.00001", "--kv", "q8_0")
    assert ask(path, "--kv", "auto") == ["--kv f16, as ggufrq advise recommends for this model"]
    data(path, "--fits", "1KB")
    assert "does not fit as it was asked for; taking iso3" in ask(path, "--kv", "auto")[0]


def test_a_server_takes_it_too(
    tmp_path: Path, measured: list[str], generated: list[KvPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serving(path: Path, plan: KvPlan, *_: Any, **__: Any) -> None:
        generated.append(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "serving", serving)
    path = model(tmp_path / "m")
    data(path, "--loss", "0.01")
    for kv, said in (("auto", "--kv iso4, as ggufrq advise recommends"), ("iso2", "measured as ruinous")):
        result = CliRunner().invoke(cli.cli, ["serve", str(path), "--kv", kv])
        assert result.exit_code == 0 and said in result.stderr, result.output
    assert generated == [parse_plan("iso4").as_usual(), parse_plan("iso2").as_usual()]


def test_a_type_that_was_measured_as_ruinous(
    tmp_path: Path, measured: list[str], generated: list[KvPlan]
) -> None:
    path = model(tmp_path / "m")
    assert ask(path, "--kv", "iso2") == []
    data(path)
    assert ask(path, "--kv", "iso2") == [
        "iso2 was measured as ruinous on this model, a mean KLD of 0.60: better --kv iso3"
    ]
    # not so measured
    assert ask(path, "--kv", "iso2", "--kv-recent", "0") == ask(path, "--kv", "iso3") == []


def test_ruin_that_was_measured_without_a_profile(
    tmp_path: Path, measured: list[str], generated: list[KvPlan]
) -> None:
    """Where none can be made."""
    path = model(tmp_path / "m", architecture="who-knows")
    rungs = data(path)["rungs"]
    assert rungs[-1]["title"] == "iso2 +first1 +recent32"
    assert "iso2 was measured as ruinous" in ask(path, "--kv", "iso2")[0]
    assert ask(path, "--kv", "iso2", "--kv-first", "0") == []


def test_where_nothing_better_fits_none_is_named(
    tmp_path: Path, measured: list[str], generated: list[KvPlan]
) -> None:
    path = model(tmp_path / "m")
    size = {rung["kv"]: rung["total"] for rung in data(path)["rungs"]}["iso2"]
    assert data(path, "--fits", f"{(size + 1000) / 1000}KB")["recommended"] == "iso2"
    said = "iso2 was measured as ruinous on this model, a mean KLD of 0.60; nothing better fits what ggufrq "
    assert ask(path, "--kv", "iso2") == [f"{said}advise was asked for"]
    assert ask(path, "--kv", "auto")[1:] == [f"{said}advise was asked for"]


def test_a_cache_that_cannot_be_used_is_warned_of(
    tmp_path: Path, measured: list[str], generated: list[KvPlan]
) -> None:
    path = model(tmp_path / "m")
    data(path, "--kv", "q4_1,iso3")
    why = "the divergence is not a number"
    assert ask(path, "--kv", "q4_1") == [f"q4_1 cannot be used on this model ({why}): better --kv iso3"]


BIASED = "keys of this model have a bias, which {} without a profile may turn to noise, as it does in Qwen2.5"
STAYS = (
    "keys of this model have a bias, which iso3 without a profile may turn to noise, as it does in Qwen2.5, "
    "and no profile can take out beside {}: better --kv q8_0"
)


@pytest.mark.parametrize(
    ("architecture", "more", "kv", "profile", "says"),
    [
        ("qwen2", {"biased": True}, "iso3", True, None),
        ("qwen2", {"biased": True}, "q8_0", False, None),
        ("qwen2", {"biased": True}, "f16/q4_0", False, None),
        ("qwen2", {"biased": True}, "iso3", False, BIASED.format("iso3")),
        ("qwen2", {"biased": True}, "iso5", False, BIASED.format("iso5")),
        ("qwen2", {"biased": True}, "q4_0", False, f"{BIASED.format('q4_0')}: better --kv iso3 with its"),
        ("qwen2", {"biased": True, "sinks": True}, "iso3", True, STAYS.format("attention sinks")),
        ("gpt-oss", {"biased": True, "sinks": True}, "iso3", True, STAYS.format("attention sinks")),
        ("qwen2", {"biased": True, "sinks": True}, "iso3", False, f"{BIASED.format('iso3')}: better --kv q8"),
        ("qwen2", {"biased": True, "attn_logit_softcapping": 30.0}, "iso3", True, "beside capped scores"),
        ("who-knows", {"biased": True}, "iso3", True, f"{BIASED.format('iso3')}: better --kv q8_0"),
        ("qwen3", {"sinks": True}, "q8_0", False, "models with attention sinks lose more than most"),
        ("gemma4", {}, "q8_0/f16", False, "models with gemma4 lose more than most, even with q8_0"),
        ("gemma4", {}, "f16", False, None),
        ("qwen3", {}, "q4_0", False, None),
    ],
)  # fmt: skip
def test_what_the_header_foretells(
    tmp_path: Path, architecture: str, more: dict[str, Any], kv: str, profile: bool, says: str | None
) -> None:
    path = model(tmp_path / "m", architecture=architecture, **more)
    plan = parse_plan(kv).as_usual() if profile else parse_plan(kv)
    said = choice.warning(path, plan, None, "m")
    assert (said is None) == (says is None)
    assert says is None or (said is not None and says in said and "\n" not in said)


def test_of_a_file_that_is_no_model_nothing_is_said(tmp_path: Path, build: Build) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    assert choice.warning(tmp_path / "x.gguf", parse_plan("iso3"), build, "x") is None

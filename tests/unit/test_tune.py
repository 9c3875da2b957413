"""Tuning without a model: the choice is exact, the flow measures what it must, the report says what is so."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from heard import Heard

from ggufrq import cli
from ggufrq.base.errors import GgufrqError, UsageError
from ggufrq.base.progress import Listener
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.cache.kv import KvPair, KvPlan, Sought, kv_type, parse_plan
from ggufrq.drive import profiles
from ggufrq.ggufs.kv_shape import KvShape
from ggufrq.measure.base_run import Scored
from ggufrq.measure.divergence import Subject
from ggufrq.measure.kept import Row
from ggufrq.search.tune import layers, report

# A model whose divergence is known: by layer, side and type, and a little more for each pair of coarse ones.

SHAPE = KvShape(k_layers=(256, 256, 256), v_layers=(256, 256, 512))
COST = {"iso2": 100.0, "iso3": 20.0, "iso4": 4.0, "q8_0": 0.01, "f16": 0.0}
WEIGHT = {
    (layer, side): random.Random(f"{layer}{side}").uniform(0.2, 3) for layer in range(3) for side in "KV"
}


def truth(plan: KvPlan) -> float:
    pairs = plan.resolve(3)
    singles = [
        WEIGHT[layer, side] * COST[kind.name]
        for layer, pair in enumerate(pairs)
        for side, kind in (("K", pair.k), ("V", pair.v))
    ]
    return 1e-5 * (sum(singles) + 1e-4 * sum(singles) ** 2)


class World:
    """Stands for llama-perplexity: knows every cache's divergence, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.truth = truth
        self.profiled: set[str] = set()
        self.exact: dict[str, tuple[int, int]] = {}

    def divergences(
        self,
        model: Subject,
        cases: Iterable[Case],
        build: Build,
        text: Path,
        scored: Scored,
        *,
        listener: Listener,
        **_: Any,
    ) -> list[Row]:
        rows = []
        for case in cases:
            self.asked.append((text.name, case.plan.name))
            self.exact[case.plan.name] = (case.plan.recent, case.plan.first)
            if case.plan.file is not None:
                self.profiled.add(case.plan.name)
            kld = self.truth(case.plan) * (1.0 if text.name == "a.txt" else 1.1)
            rows.append({"kld_mean": kld, "kld_mean_err": 0.01 * kld, "command": f"run {case.plan.name}"})
            listener.result(rows[-1], False)
        return rows


MODEL = Subject("toy", Path("toy.gguf"), "0" * 64, "Q8_0", SHAPE)
BUILD = Build("key", Path(), Path(), Path(), {})


def goal(budget: str = "3.5", types: str = "iso2,iso3,iso4,q8_0") -> layers.Goal:
    return layers.Goal(
        Fraction(budget), layers.parse_types(types), Path("a.txt"), Path("b.txt"), Scored(512, 4)
    )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(layers, "divergences", made.divergences)
    return made


def tuned(budget: str = "3.5", types: str = "iso2,iso3,iso4,q8_0") -> layers.Result:
    return layers.tune(MODEL, BUILD, goal(budget, types))


@pytest.mark.parametrize("budget", ["2.125", "3", "3.5", "4.2", "9"])
def test_finds_the_best_of_all(world: World, budget: str) -> None:
    result = tuned(budget)
    kinds = [kv_type(name) for name in ("iso2", "iso3", "iso4", "q8_0")]
    sides = list(itertools.product(kinds, repeat=2))
    every = (
        KvPlan.of_layers([KvPair(*pair) for pair in pairs]) for pairs in itertools.product(sides, repeat=3)
    )
    best = min((plan for plan in every if plan.bits(SHAPE) <= float(budget)), key=truth)
    assert result.plan.resolve(3) == best.resolve(3)
    assert result.bits == best.bits(SHAPE) <= float(budget)
    assert result.bytes_per_token == best.bytes_for(SHAPE, 1)


def test_measures_single_changes_against_an_exact_rest(world: World) -> None:
    result = tuned()
    assert len(result.singles) == 6 and all(len(types) == 4 for types in result.singles.values())
    assert ("a.txt", "f16; 2:f16/iso3") in world.asked and ("a.txt", "f16; 0:q8_0/f16") in world.asked
    kld, error = result.singles[layers.Unit(2, "V", 512)]["iso3"]
    assert kld == truth(parse_plan("f16; 2:f16/iso3")) and 0 < error < kld
    on_other = [name for text, name in world.asked if text == "b.txt"]
    assert on_other[0] == result.plan.name and "iso3" in on_other and "iso2/iso4" in on_other
    assert not any(name.startswith("f16") for name in on_other), "the other text has no part in the choice"
    assert "iso4/iso3" not in on_other, "pairs over the budget are not asked for"


def test_a_uniform_pair_that_is_best_is_the_answer(world: World) -> None:
    """The sum of single changes may be wrong; what was measured decides."""
    world.truth = lambda plan: 1e-3 if plan.name == "iso3" else 1e-2
    assert tuned().plan.name == "iso3"


@pytest.mark.parametrize(
    ("budget", "types", "says"),
    [
        ("2", "iso2,iso3", "2 bits per value are fewer than iso2 takes, 2.125"),
        ("3.5", "iso3", "two types or more"),
        ("3.5", "iso3,iso3", "two types or more"),
        ("3.5", "iso3,iso9", "no cache type 'iso9'"),
    ],
)
def test_refuses(world: World, budget: str, types: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tuned(budget, types)
    assert not world.asked


def test_a_profile_goes_where_k_is_ours(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def find(*given: Any) -> profiles.Found:
        asked.append(given)
        return profiles.Found(Path("m-kv.gguf"), "profile from the weights")

    monkeypatch.setattr(profiles, "find", find)
    wish = replace(goal(), profile=Sought.AUTO)
    result = layers.tune(MODEL, BUILD, wish)
    assert asked == [(MODEL.path, Sought.AUTO, 512, BUILD)]
    assert {"f16; 0:iso3/f16", "iso3", "iso2/iso4"} <= world.profiled
    assert not {"f16; 0:f16/iso3", "f16; 0:q8_0/f16", "q8_0"} & world.profiled
    told = " ".join(report.render(result, MODEL, wish).split())
    assert "--kv-profile" not in told and "K in types of ours: profile from the weights." in told
    assert report.as_json(result, MODEL, wish)["profile"] == "profile from the weights"
    for profile, word in ((Sought.WEIGHTS, "weights"), (Path("a-kv.gguf"), "a-kv.gguf"), (None, "none")):
        told = " ".join(report.render(result, MODEL, replace(wish, profile=profile)).split())
        assert f'--kv "{result.plan.name}" --kv-profile {word}' in told


@pytest.mark.parametrize(
    ("backend", "wish", "exact", "words"),
    [
        ("cpu", (None, None), (32, 1), "the first token and the newest 32"),
        ("cuda", (None, None), (32, 1), "the first token and the newest 32"),
        ("metal", (None, None), (32, 1), "the first token and the newest 32"),
        ("vulkan", (None, None), (32, 1), "the first token and the newest 32"),
        ("vulkan", (8, None), (8, 1), "the first token and the newest 8"),
        ("cpu", (0, 2), (0, 2), "the first 2 tokens"),
        ("cpu", (0, 0), (0, 0), ""),
    ],
)
def test_tokens_in_f16_beside_types_of_ours(
    world: World, backend: str, wish: tuple[int | None, int | None], exact: tuple[int, int], words: str
) -> None:
    asked, build = (
        replace(goal(), recent=wish[0], first=wish[1]),
        replace(BUILD, manifest={"backend": backend}),
    )
    result = layers.tune(MODEL, build, asked)
    assert {world.exact[name] for name in ("iso3", "f16; 0:iso3/f16", "iso2/iso4")} == {exact}
    assert world.exact["q8_0"] == world.exact["f16; 0:q8_0/f16"] == (0, 0)
    assert result.exact == report.as_json(result, MODEL, asked)["exact"] == words
    told = " ".join(report.render(result, MODEL, asked).split())
    assert (f"Beside types of ours {words} in f16, which the bits do not count." in told) == bool(words)
    options = "".join(
        f" --kv-{n} {w}" for n, w in zip(("recent", "first"), wish, strict=True) if w is not None
    )
    assert f'--kv "{result.plan.name}" --kv-profile none{options} ' in told


def test_progress_counts_every_measurement(world: World) -> None:
    heard = Heard()
    layers.tune(MODEL, BUILD, goal(), listener=heard)
    assert heard.totals[-1] == heard.done == len(world.asked)


def test_layers_that_hold_no_values(world: World) -> None:
    """Some models keep K alone; what is not there is not tuned."""
    shape = KvShape(k_layers=(256, 256), v_layers=(0, 256))
    assert [(unit.layer, unit.side) for unit in layers.units(shape)] == [(0, "K"), (1, "K"), (1, "V")]


# The report


def measured(name: str, kld: float, error: float = 0.001) -> layers.Measured:
    plan = parse_plan(name)
    return layers.Measured(plan, plan.bits(SHAPE), kld, error)


def test_comparison_with_the_line_and_with_what_is_no_larger() -> None:
    best = measured("iso3; 0-1:iso4", 0.030)
    others = [
        measured("iso2", 0.09),
        measured("iso3", 0.060),
        measured("iso4", 0.010),
        measured("iso2/iso4", 0.0305),
    ]
    found = {c.name: c for c in report.compare([best, *others], best)}
    assert set(found) == {"line iso3 to iso4", "iso2", "iso2/iso4", "iso3"}
    share = best.bits - 3.125
    line = found["line iso3 to iso4"]
    assert math.isclose(line.kld, 0.060 * (1 - share) + 0.010 * share)
    assert math.isclose(line.kld_err, 0.001 * math.hypot(share, 1 - share))
    assert found["iso3"].verdict == "better" and found["iso2/iso4"].verdict == "no difference seen"
    worse = measured("iso3; 0-1:iso4", 0.2)
    assert {c.verdict for c in report.compare([worse, *others], worse)} == {"worse"}


def test_report_can_be_pasted_and_fits(world: World) -> None:
    result = tuned()
    text = report.render(result, MODEL, goal())
    assert f'--kv "{result.plan.name}"' in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert f"{result.checked[0].kld:.6f}" in lines["tuned"]
    assert lines["iso3"].endswith("better") and "line iso3 to iso4" in lines
    assert not lines["iso4"].endswith(("better", "worse"))
    data = json.loads(json.dumps(report.as_json(result, MODEL, goal())))
    assert data["kv"] == result.plan.name and len(data["singles"]) == 24
    assert {"profile", "comparisons", "commands", "checked"} <= set(data)


# The command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["docs-qwen3-8m"], "has not been built yet"),
        (["docs-qwen3-8m", "--types", "iso3"], "two types or more"),
        (["docs-qwen3-8m", "--types", "iso3,q9"], "no cache type 'q9'"),
    ],
)
def test_errors(no_programs: None, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.cli, ["tune", *arguments])
    assert isinstance(result.exception, GgufrqError)
    assert says in str(result.exception) and result.stdout == ""


def test_help_fits_in_80_columns() -> None:
    result = CliRunner().invoke(cli.cli, ["tune", "--help"], terminal_width=80)
    assert result.exit_code == 0 and "Examples:" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80

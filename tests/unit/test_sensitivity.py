"""Sensitivity without llama.cpp: units and types, the choice, the flow, what is kept, and the report."""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st

from ggufrq.base.errors import GgufrqError, ToolError, UsageError
from ggufrq.build.project import Build
from ggufrq.cli import sensitivity as cli
from ggufrq.cli.quantize import quantize as quantize_command
from ggufrq.ggufs.header import pad
from ggufrq.ggufs.tensors import Inventory, Tensor
from ggufrq.make.plan import Request, Want
from ggufrq.make.quantizer import Forecast
from ggufrq.make.recipe import Recipe, dump, parse
from ggufrq.make.record import Record
from ggufrq.measure.weight_quality import WeightSettings
from ggufrq.search.sensitivity import best_recipe, parts, report, solve, trials
from ggufrq.search.sensitivity.solve import Budget, Problem
from ggufrq.search.sensitivity.trials import Measured

try:
    import tomllib
except ImportError:
    import tomli as tomllib  # type: ignore[no-redef]


def tensor(name: str, *shape: int, quantizable: bool = True) -> Tensor:
    return Tensor(name, shape, "bf16" if quantizable else "f32", quantizable)


MODEL = Inventory(
    "qwen3",
    (
        tensor("token_embd.weight", 256, 64),
        *(
            tensor(f"blk.{layer}.{name}.weight", 256 if name != "ffn_down" else 512, rows)
            for layer in range(3)
            for name, rows in (("attn_v", 32), ("ffn_up", 512), ("ffn_down", 256))
        ),
        tensor("blk.0.odd.weight", 96, 8),
        tensor("output_norm.weight", 256, quantizable=False),
        tensor("blk.0.sinks.weight", 5, quantizable=False),  # takes more in the file than its data
    ),
)
TYPES = ("q3_k", "q4_k", "q6_k", "bf16")
WEIGHTS = sum(t.values for t in MODEL)


# What there is to choose from


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("class", ["token_embd", "attn_v", "ffn_up", "ffn_down", "blk.0.odd.weight"]),
        (
            "layer",
            [
                "token_embd",
                *(f"{name} {part}" for name in ("attn_v", "ffn_up", "ffn_down") for part in ("0-1", "2")),
                "blk.0.odd.weight 0-1",
            ],
        ),
    ],
)
def test_units(by: str, names: list[str]) -> None:
    every = parts.units(MODEL, TYPES, by, 2)
    assert [unit.name for unit in every] == names
    assert sorted(t.name for unit in every for t in unit.tensors) == sorted(t.name for t in MODEL.quantizable)


@given(layers=st.integers(1, 9), ranges=st.integers(1, 12))
def test_ranges_hold_every_layer_once(layers: int, ranges: int) -> None:
    model = Inventory("qwen3", tuple(tensor(f"blk.{i}.ffn_up.weight", 256, 4) for i in range(layers)))
    every = parts.units(model, TYPES, "layer", ranges)
    assert len(every) == min(layers, ranges)
    for unit in every:
        first, _, last = unit.name.removeprefix("ffn_up ").partition("-")
        named = [f"blk.{i}.ffn_up.weight" for i in range(int(first), int(last or first) + 1)]
        assert [t.name for t in unit.tensors] == named


def test_single_tensors() -> None:
    every = parts.units(MODEL, TYPES, "tensor", 1)
    assert len(every) == len(MODEL.quantizable) and all(len(unit.tensors) == 1 for unit in every)


def test_options_are_what_llama_quantize_would_make() -> None:
    odd = parts.units(MODEL, ("q3_k", "q4_0", "q8_0", "bf16"), "class", 1)[-1]
    # rows of 96 hold no block of 256: q3_k becomes q4_0, which is there already
    assert [(o.kind, *o.types.values(), o.exact) for o in odd.options] == [
        ("q3_k", "q4_0", False),
        ("q8_0", "q8_0", False),
        ("bf16", "bf16", True),
    ]
    assert [sum(o.sizes) for o in odd.options] == [3 * 18 * 8, 3 * 34 * 8, 2 * 96 * 8]
    larger = parts.units(MODEL, ("f32", "f16"), "class", 1)[0]
    assert [o.kind for o in larger.options] == ["bf16"], "nothing that is not smaller"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("q4_k", "two types or more"),
        ("q4_k,Q4_K", "two types"),
        ("q4_k,q9_k", "no tensor type 'q9_k'"),
        ("q4_k,q8_k", "no weights are kept in q8_k"),
        ("", "two types"),
    ],
)
def test_types_that_are_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parts.parse_types(text)


def test_default_types_end_with_the_model_s_own() -> None:
    assert parts.default_types(MODEL) == (*parts.DEFAULT_TYPES, "bf16")
    whole = Inventory("qwen3", tuple(replace(t, type="f32") for t in MODEL))
    assert parts.default_types(whole) == (*parts.DEFAULT_TYPES, "bf16", "f32")
    assert parts.parse_types("Q4_K, q8_0") == ("q4_k", "q8_0")


@given(st.lists(st.sampled_from(TYPES), min_size=11, max_size=11), st.booleans())
def test_a_recipe_says_just_these_types(kinds: list[str], imatrix: bool) -> None:
    wanted = {t.name: k for t, k in zip(MODEL.quantizable, kinds, strict=True)}
    wanted["blk.0.odd.weight"] = "q8_0"
    made = parts.as_recipe("a", "b", MODEL, wanted, imatrix=imatrix)
    again = parse(tomllib.loads(dump(made)), "x")
    assert again == made and again.imatrix == imatrix
    assert again.plan(MODEL) == {**{t.name: t.type for t in MODEL}, **wanted}


# The choice


def measured(kld: float, error: float = 0.0) -> Measured:
    return Measured(kld, error, 10 * kld, 8.0, 0.9)


COSTS = st.lists(st.tuples(st.floats(-0.01, 1), st.floats(0, 0.2)), min_size=1, max_size=8)


@given(COSTS)
def test_no_gain_is_taken_for_real_below_its_error(pairs: list[tuple[float, float]]) -> None:
    costs = solve.real_costs([measured(*pair) for pair in pairs])
    assert all(cost >= 0 and cost >= kld for cost, (kld, _) in zip(costs, pairs, strict=True))
    for j in range(1, len(pairs)):
        best = costs.index(min(costs[:j]))
        if costs[j] < costs[best]:
            assert pairs[best][0] - pairs[j][0] > math.hypot(pairs[best][1], pairs[j][1])


def test_costs_of_a_plain_case() -> None:
    noise = [measured(0.3, 0.01), measured(0.1, 0.01), measured(0.095, 0.01), measured(0.01, 0.001)]
    assert solve.real_costs(noise) == [0.3, 0.1, 0.1, 0.01]
    assert solve.real_costs([measured(0.1), measured(0.5), measured(0.05)]) == [0.1, 0.5, 0.05]
    assert solve.real_costs([measured(-1e-6, 1e-5), trials.NOTHING]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("budget", "name", "text"),
    [
        (Budget(bpw=Fraction("5.25")), "5.25bpw", "5.25 bits per weight"),
        (Budget(size=15 * 10**9), "15gb", "15,000,000,000 bytes"),
        (Budget(size=15 * 10**8), "1.5gb", "1,500,000,000 bytes"),
        (Budget(size=700 * 10**6), "700mb", "700,000,000 bytes"),
        (Budget(size=6048640), "6048640b", "6,048,640 bytes"),
    ],
)
def test_budgets(budget: Budget, name: str, text: str) -> None:
    assert (budget.name, budget.text) == (name, text)


def tangled(sizes: list[list[int]], costs: list[list[float]], chosen: Sequence[int]) -> float:
    """Costs that are more than their sum: what neighbours in the list lose adds up faster."""
    each = [costs[i][o] for i, o in enumerate(chosen)]
    return sum(each) + 0.5 * sum(math.sqrt(a * b) for a, b in itertools.pairwise(each))


def test_the_search_mends_what_the_sum_gets_wrong() -> None:
    better, whole = 0, 0
    for seed in range(30):
        rng = random.Random(seed)
        values = [rng.randint(1, 4) for _ in range(5)]
        sizes = [[v * b for b in (3, 4, 6, 8)] for v in values]
        costs = [[w * c for c in (60.0, 20.0, 3.0, 0.1)] for w in (rng.uniform(0.2, 3) for _ in values)]
        problem = Problem(sizes, costs, int(5.2 * sum(values)))

        def measure(
            every: Sequence[solve.Assignment], s: list[list[int]] = sizes, c: list[list[float]] = costs
        ) -> list[Measured]:
            return [measured(tangled(s, c, chosen)) for chosen in every]

        first = solve.start(problem, 1, 0)
        found = solve.search(problem, first, measure, width=8, rounds=8)
        assert all(problem.size(chosen) <= problem.capacity for chosen in found)
        truth = min(
            tangled(sizes, costs, chosen)
            for chosen in itertools.product(range(4), repeat=5)
            if problem.size(chosen) <= problem.capacity
        )
        best = min(one.kld for one in found.values())
        better += best < found[first[0]].kld
        whole += best == pytest.approx(truth)
    assert better >= 3 and whole >= 24


def test_neighbours_are_within_the_capacity_and_the_cheapest_first() -> None:
    problem = Problem([[3, 4, 6]] * 3, [[9.0, 4.0, 1.0], [18.0, 8.0, 2.0], [3.0, 2.0, 2.5]], 12)
    near = problem.neighbours((1, 1, 1))
    assert all(problem.size(a) <= 12 and a != (1, 1, 1) for a in near)
    assert [problem.cost(a) for a in near] == sorted(problem.cost(a) for a in near)
    assert all(a[2] != 2 for a in near), "an option that is larger and dearer is no step"
    assert all(sum(a != b for a, b in zip(near_one, (1, 1, 1), strict=True)) <= 2 for near_one in near)


# The flow, in a world where divergence is known


WEIGHT = {t.name: random.Random(t.name).uniform(0.2, 3) * t.values / 1e5 for t in MODEL.quantizable}
LOSS = {
    **{"q2_k": 60.0, "q3_k": 20.0, "q4_0": 8.0, "q4_k": 5.0, "q5_0": 2.0, "q5_1": 1.8, "q5_k": 1.5},
    **{"q6_k": 0.4, "q8_0": 0.02, "bf16": 0.0},
}


def truth(types: Mapping[str, str]) -> float:
    return 1e-4 * sum(WEIGHT[name] * LOSS[kind] for name, kind in types.items())


class Shop:
    """Stands for the factory."""

    base = "toy"
    folder = Path("toy-GGUF")
    gguf = Path("toy-BF16.gguf")
    model = MODEL
    HEADER = 1000

    def output(self, want: Want) -> Any:
        types = {t.name: want.label.lower() if t.quantizable else t.type for t in MODEL}
        types["blk.0.odd.weight"] = "q8_0"
        if want.recipe is not None:
            types = want.recipe.plan(MODEL)
        elif any(kind not in LOSS and kind != "f32" for kind in types.values()):
            types = {t.name: "q5_k" if t.quantizable else t.type for t in MODEL} | {
                "blk.0.odd.weight": "q8_0"
            }
        size = self.HEADER + sum(pad(t.bytes_as(types[t.name])) for t in MODEL)
        return SimpleNamespace(forecast=Forecast(types, MODEL.bits_as(types), size, 0))

    def matrix_for(self, recipe: Any) -> Path | None:
        return Path("toy-imatrix.gguf") if recipe.imatrix else None


class World:
    """Stands for ``Trials``; remembers what was asked on which text."""

    asked: list[tuple[str, Mapping[str, str]]]
    full = False

    def __init__(
        self, shop: Any, build: Build, matrix: Any, text: Path, settings: WeightSettings, **more: Any
    ) -> None:
        self.text, self.listener, self.jobs, self.threads = text, more["listener"], 1, 1
        self.quality = SimpleNamespace(text=text)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def missing(self, every: Sequence[Mapping[str, str]]) -> int:
        return len(every)

    def require_room(self) -> None:
        if World.full:
            raise GgufrqError("measuring takes 1.00 GB, and toy-GGUF has 0.50 GB free")

    def measure(self, every: Sequence[Mapping[str, str]]) -> list[Measured]:
        found = []
        for types in every:
            World.asked.append((self.text.name, types))
            kld = truth(types)
            found.append(measured(kld, 0.01 * kld))
            self.listener.advance()
        return found

    def command(self) -> str:
        return "llama-perplexity …"


def estimated(model: Inventory, *args: Any, **more: Any) -> dict[parts.Unit, list[float]]:
    """Stands for ``quick.costs``: all that matters is how large a unit is."""
    every = args[2]
    for _ in model.quantizable:
        more["listener"].advance()
    return {unit: [unit.values * LOSS[option.kind] for option in unit.options] for unit in every}


BUILD = Build("key", Path(), Path(), Path(), {})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> type[World]:
    @contextmanager
    def workshop(request: Request, build: Build) -> Iterator[Shop]:
        yield Shop()

    World.asked, World.full = [], False
    monkeypatch.setattr(best_recipe.family, "workshop", workshop)
    monkeypatch.setattr(best_recipe, "Trials", World)
    monkeypatch.setattr(best_recipe.quick, "costs", estimated)
    return World


def goal(budget: Budget | None, types: str = "q3_k,q4_k,q6_k,bf16", by: str = "class") -> best_recipe.Goal:
    return best_recipe.Goal(
        budget, parts.parse_types(types), by, text=Path("a.txt"), check_text=Path("b.txt")
    )


def analysed(budget: Budget | None, **more: Any) -> best_recipe.Result:
    return best_recipe.analyse(Request("toy", ()), BUILD, goal(budget, **more))


@pytest.mark.parametrize(
    "budget",
    [Budget(bpw=Fraction("3.6")), Budget(bpw=Fraction(5)), Budget(size=380_000), Budget(size=500_000)],
)
def test_finds_the_best_of_all(world: type[World], budget: Budget) -> None:
    result = analysed(budget)
    assert result.found is not None
    every = parts.units(MODEL, TYPES, "class", 1)
    best, best_bytes = math.inf, 0
    for chosen in itertools.product(*(range(len(unit.options)) for unit in every)):
        types = {t.name: t.type for t in MODEL}
        for unit, option in zip(every, chosen, strict=True):
            types |= unit.options[option].types
        size = Shop.HEADER + sum(pad(t.bytes_as(types[t.name])) for t in MODEL)
        fits = size <= budget.size if budget.size is not None else MODEL.bits_as(types) <= (budget.bpw or 0)
        changed = {t.name: types[t.name] for t in MODEL.quantizable}
        if fits and truth(changed) < best:
            best, best_bytes = truth(changed), size
    assert result.found.tuned[0].measured.kld == pytest.approx(best)
    assert result.found.bytes == best_bytes
    assert result.found.recipe.plan(MODEL).items() >= result.found.checked[0].types.items()


def test_single_changes_and_what_is_checked(world: type[World]) -> None:
    result = analysed(Budget(bpw=Fraction("6.6")))
    assert result.found is not None
    # q3_k and such need a matrix: it is used throughout, and the recipe says so
    assert result.matrix == Path("toy-imatrix.gguf") and result.found.recipe.imatrix
    assert [len(singles) for singles in result.singles.values()] == [4, 4, 4, 4, 4]
    assert all(singles[-1] == trials.NOTHING for singles in result.singles.values())
    first = [types for text, types in world.asked if text == "a.txt"][:15]
    assert all(len(set(types.values())) == 1 for types in first)
    on_other = [types for text, types in world.asked if text == "b.txt"]
    assert on_other[0] == result.found.checked[0].types
    assert [one.name for one in result.found.checked] == [
        "sensitivity-6.6bpw",
        "IQ4_XS",
        "Q4_K_M",
        "Q5_K_M",
        "Q6_K",
    ]


def test_without_a_budget_only_measures(world: type[World]) -> None:
    result = analysed(None)
    assert result.found is None and len(result.singles) == 5 and len(world.asked) == 15
    assert "q3_k" in report.render(result, goal(None))


def test_as_many_rounds_as_wished(world: type[World]) -> None:
    """Without any, the cheapest recipes and that of --quick; and never more files than are allowed."""
    asked_for = goal(Budget(bpw=Fraction(5)))
    tuned = []
    for rounds in (0, 1, 8):
        result = best_recipe.analyse(Request("toy", ()), BUILD, replace(asked_for, rounds=rounds))
        assert result.found is not None
        tuned.append(len(result.found.tuned))
    assert 2 <= tuned[0] <= 8 < tuned[1] <= tuned[0] + 8 and tuned[1] <= tuned[2]


def test_quick_measures_nothing(world: type[World]) -> None:
    asked_for = replace(goal(Budget(bpw=Fraction(5))), quick=True)
    result = best_recipe.analyse(Request("toy", ()), BUILD, asked_for)
    assert result.found is not None and not world.asked
    assert MODEL.bits_as(dict(result.found.recipe.plan(MODEL))) <= 5
    assert result.found.recipe.name == "quick-5bpw" and result.found.recipe.imatrix
    assert "not measured" in result.found.recipe.description
    text = report.render(result, asked_for)
    assert "nothing was measured" in text and "q3_k" in text and max(map(len, text.splitlines())) <= 80
    assert "M are millions of weights. * is what was chosen." in " ".join(text.split())
    text = report.render(replace(result, found=None), asked_for)
    assert " ".join(text.split()).endswith("--bpw BITS or --size SIZE chooses a recipe.")
    data = json.loads(json.dumps(report.as_json(result, asked_for, BUILD)))
    assert data["text"] is None and all("kld" not in one and one["estimate"] for one in data["singles"])


def test_quick_costs_choose_the_best_of_all(world: type[World]) -> None:
    result = best_recipe.analyse(
        Request("toy", ()), BUILD, replace(goal(Budget(bpw=Fraction(5)), by="tensor"), quick=True)
    )
    assert result.found is not None and result.estimates is not None
    kinds = {
        unit.name: dict(zip((o.kind for o in unit.options), result.estimates[unit], strict=True))
        for unit in result.estimates
    }
    cost = sum(kinds[name][kind] for name, kind in result.found.chosen.items())
    for unit in result.estimates:  # no single step up is free
        for option in unit.options:
            types = result.found.types | option.types
            rest = {t.name: t.type for t in MODEL if not t.quantizable}
            if MODEL.bits_as({**types, **rest}) <= 5:
                chosen = {**result.found.chosen, unit.name: option.kind}
                assert sum(kinds[name][kind] for name, kind in chosen.items()) >= cost


def test_the_search_begins_with_the_quick_recipe_too(
    world: type[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    def misled(model: Inventory, *args: Any, **more: Any) -> dict[parts.Unit, list[float]]:
        """As if one class alone counted, which no measurement would make anybody try."""
        return {
            unit: [LOSS[option.kind] * (unit.name == "attn_v") for option in unit.options] for unit in args[2]
        }

    monkeypatch.setattr(best_recipe.quick, "costs", misled)
    quick = best_recipe.analyse(
        Request("toy", ()), BUILD, replace(goal(Budget(bpw=Fraction(5))), quick=True)
    ).found
    assert quick is not None and quick.chosen["attn_v"] == "bf16"
    result = analysed(Budget(bpw=Fraction(5)))
    assert ("a.txt", quick.types) in world.asked
    assert result.found is not None and result.found.checked[1].name == "--quick"
    assert result.found.checked[1].types == quick.types


def test_without_room_to_measure_it_falls_back(
    world: type[World], capsys: pytest.CaptureFixture[str]
) -> None:
    world.full = True
    result = analysed(Budget(bpw=Fraction(5)))
    assert result.found is not None and not world.asked and "not measured" in result.found.recipe.description
    assert "0.50 GB free: nothing is measured" in capsys.readouterr().err


def test_no_matrix_where_no_type_needs_one(world: type[World]) -> None:
    result = analysed(Budget(bpw=Fraction(6)), types="q4_k,q6_k,q8_0")
    assert result.found is not None
    assert result.matrix is None and not result.found.recipe.imatrix


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (
            Budget(bpw=Fraction(3)),
            r"3 bits per weight are too few: in the smallest types the model takes 3\.4\d",
        ),
        (
            Budget(size=100_000),
            r"100,000 bytes are too few: in the smallest types the model takes \d+,\d+ bytes",
        ),
        (Budget(bpw=Fraction(17)), "hold the model in its largest types"),
        (Budget(size=10**8), "hold the model in its largest types"),
    ],
)
def test_budgets_that_are_refused(world: type[World], budget: Budget, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        analysed(budget)
    assert not world.asked


def test_what_a_refusal_names_is_enough(world: type[World]) -> None:
    with pytest.raises(UsageError) as refused:
        analysed(Budget(size=100_000))
    least = int(refused.value.message.split()[-2].replace(",", ""))
    assert analysed(Budget(size=least)).found is not None
    with pytest.raises(UsageError):
        analysed(Budget(size=least - 1))


def test_progress_ends_at_its_total(world: type[World]) -> None:
    heard = Heard()
    best_recipe.analyse(Request("toy", ()), BUILD, goal(Budget(bpw=Fraction(5))), heard)
    assert heard.totals[-1] == heard.done == len(world.asked)


# What is kept


class Quality:
    """Stands for llama-perplexity."""

    measured: list[dict[str, str]]
    fails_after = 10**9
    lock = threading.Lock()

    def __init__(
        self, reference: Path, build: Build, *, text: Path, settings: WeightSettings, **_: Any
    ) -> None:
        self.facts, self.text, self.base = {"text": text.name, "settings": settings.n_ctx}, text, Path("base")

    def make_base(self) -> None:
        pass

    def close(self) -> None:
        pass

    def measure(self, file: Path, *, log: Path) -> dict[str, Any]:
        types = json.loads(file.read_text())
        log.write_text("measured\n")
        with Quality.lock:
            if len(Quality.measured) >= Quality.fails_after:
                raise ToolError("stopped here")
            Quality.measured.append(types)
        kld = truth({name: kind for name, kind in types.items() if name in WEIGHT and kind != "f32"})
        figures = {"kld_mean": kld, "kld_mean_err": 0.1 * kld, "kld_p999": 9 * kld}
        return {**figures, "ppl": 8.0, "same_top": 0.9, "bits": 16.0}


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def make(job: Any, file: Path, build: Build, planned: Mapping[str, str], **_: Any) -> None:
        assert planned == job.types and "F16" not in job.type_name
        file.write_text(json.dumps(planned))

    Quality.measured, Quality.fails_after = [], 10**9
    monkeypatch.setattr(trials, "WeightQuality", Quality)
    monkeypatch.setattr(trials.quantizer, "make", make)
    work = SimpleNamespace(record=Record(tmp_path, "toy"))
    return SimpleNamespace(base="toy", folder=tmp_path, gguf=tmp_path / "toy.gguf", model=MODEL, work=work)


def asked() -> list[Mapping[str, str]]:
    return [o.types for unit in parts.units(MODEL, TYPES, "class", 1) for o in unit.options if not o.exact]


def a_trial(shop: Any, text: str = "a.txt", matrix: Path | None = None, **more: Any) -> trials.Trials:
    return trials.Trials(shop, BUILD, matrix, Path(text), WeightSettings(), **more)


def test_what_was_measured_is_kept_and_goes_on(shop: Any) -> None:
    heard = Heard()
    Quality.fails_after = 5
    with pytest.raises(ToolError, match="stopped here"), a_trial(shop, jobs=2) as runs:
        runs.measure(asked())
    assert len(Quality.measured) == 5
    Quality.fails_after = 10**9
    with a_trial(shop, listener=heard) as runs:
        assert runs.missing(asked()) == len(asked()) - 5
        found = runs.measure(asked())
        assert runs.missing(asked()) == 0 and runs.measure(asked()) == found
    assert len(Quality.measured) == len(asked()) and heard.done == len(asked()) - 5
    assert [one.kld for one in found] == [truth(types) for types in asked()]
    assert not list(shop.folder.glob("*toy*")), "no file that was measured stays"


def test_the_same_types_under_another_name_are_measured_once(shop: Any) -> None:
    with a_trial(shop) as runs:
        one = {"blk.0.ffn_up.weight": "q4_k"}
        same = {**one, "blk.0.attn_v.weight": "bf16"}
        a, b = runs.measure([one, same])
    assert a == b and len(Quality.measured) == 1


def test_a_float_type_is_measured_as_well(shop: Any) -> None:
    shop.model = Inventory("qwen3", tuple(replace(t, type="f32") for t in MODEL))
    with a_trial(shop) as runs:
        (found,) = runs.measure([{"blk.0.ffn_up.weight": "bf16"}])
    assert found.kld == 0.0 and Quality.measured[0]["blk.0.ffn_up.weight"] == "bf16"


def test_another_text_or_matrix_is_measured_anew(shop: Any, tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.gguf"
    matrix.write_text("m")
    for text, chosen in (("a.txt", None), ("b.txt", None), ("a.txt", matrix)):
        with a_trial(shop, text, chosen) as runs:
            runs.measure(asked()[:1])
    assert len(Quality.measured) == 3


def test_large_models_are_measured_one_at_a_time(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.machine, "cores", lambda: 8)
    assert (a_trial(shop).jobs, a_trial(shop).threads) == (8, 1)
    assert (a_trial(shop, jobs=3).jobs, a_trial(shop, jobs=3).threads) == (3, 1)
    monkeypatch.setattr(trials, "_SMALL", 10)
    assert (a_trial(shop).jobs, a_trial(shop).threads) == (1, 8)
    assert (a_trial(shop, jobs=2).jobs, a_trial(shop, jobs=2).threads) == (2, 4)


# The report and the commands


def test_report(world: type[World]) -> None:
    asked_for = goal(Budget(bpw=Fraction("5.7")))
    result = best_recipe.analyse(Request("toy", ()), BUILD, asked_for)
    assert result.found is not None
    text = report.render(result, asked_for)
    assert max(map(len, text.splitlines())) <= 80
    assert f"sensitivity-5.7bpw: {result.found.bytes:,} bytes, " in text
    assert text.count("*") == 5 + 1, "one choice for each unit, and what * means"
    assert "b.txt, which had no part" in text and "IQ4_XS" in text
    data = json.loads(json.dumps(report.as_json(result, asked_for, BUILD)))
    assert data["recipe"]["bits"] <= 5.7 and len(data["singles"]) == 15
    assert data["checked"][0]["name"] == "sensitivity-5.7bpw"
    assert data["tuned"][0]["kld"] == min(one["kld"] for one in data["tuned"])


@pytest.mark.parametrize(
    ("size", "bpw", "says"),
    [
        ("5G", "5", "a size or bits per weight, not both"),
        ("5T", None, "is no size of a file"),
        (None, "many", "no number of bits"),
        (None, "1/0", "no number of bits"),
        (None, "0", "out of range"),
        (None, "-4", "out of range"),
    ],
)
def test_wrong_budgets(size: str | None, bpw: str | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        cli.parse_budget(size, bpw)


def test_command(world: type[World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "require_build", lambda: BUILD)
    monkeypatch.chdir(tmp_path)
    arguments = ["toy", "--bpw", "5", "--types", "q3_k,q4_k,q6_k,bf16"]
    done = CliRunner().invoke(cli.sensitivity, arguments)
    assert done.exit_code == 0, done.output
    assert "ggufrq quantize toy --recipe toy-sensitivity-5bpw.toml" in done.stdout
    written = parse(tomllib.loads((tmp_path / "toy-sensitivity-5bpw.toml").read_text()), "x")
    assert MODEL.bits_as(written.plan(MODEL)) <= 5
    done = CliRunner().invoke(
        cli.sensitivity, [*arguments, "--json", "-o", "other.toml", "--imatrix", __file__]
    )
    assert json.loads(done.stdout)["recipe"]["name"] == written.name
    assert f"--recipe other.toml --imatrix {__file__}" in done.stderr
    assert (tmp_path / "other.toml").read_text() == dump(written)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--quick", "--chunks", "16"], "--chunks has no effect here: --quick measures nothing"),
        (["--quick", "-j", "2"], "--jobs has no effect here"),
        (["--kv", "iso4"], "--kv has no effect here: there is no --vram"),
        (["--ranges", "4"], "--ranges has no effect here: --by is not layer"),
    ],
)
def test_options_that_would_do_nothing(options: list[str], says: str) -> None:
    done = CliRunner().invoke(cli.sensitivity, ["toy", "--bpw", "5", *options])
    assert isinstance(done.exception, UsageError) and says in done.exception.message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--recipe", "sensitivity"], "is made for a budget"),
        (["--bpw", "5"], "are the budget of --recipe sensitivity"),
        (["--recipe", "sensitivity", "--bpw", "5", "--dry-run"], "there is no dry run"),
        (["--recipe", "quick"], "the recipe quick is made for a budget"),
        (["--recipe", "quick", "--bpw", "5", "--dry-run"], "quick reads all weights; there is no dry run"),
        (["--to", "mlx", "--recipe", "quick", "--bpw", "5"], "the recipe quick is for GGUF files"),
    ],
)
def test_quantize_refuses(options: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggufrq.cli.quantize.require_build", lambda: BUILD)
    done = CliRunner().invoke(quantize_command, ["docs-qwen3-8m", *options])
    assert isinstance(done.exception, UsageError) and says in done.exception.message


def test_quantize_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe takes the place of its name, found as it is asked for."""
    asked = []

    def analyse(request: Request, build: Build, goal: best_recipe.Goal) -> Any:
        asked.append((goal.quick, goal.budget))
        recipe = Recipe(f"found{len(asked)}", tensors={"*": "q4_k"})
        return SimpleNamespace(found=SimpleNamespace(recipe=recipe, checked=()))

    def wants(named: Sequence[str | Recipe], build: Build) -> tuple[Any, ...]:
        taken.extend(one.name if isinstance(one, Recipe) else one for one in named)
        raise KeyboardInterrupt

    taken: list[str] = []
    monkeypatch.setattr(cli, "analyse", analyse)
    monkeypatch.setattr("ggufrq.cli.quantize.require_build", lambda: BUILD)
    monkeypatch.setattr("ggufrq.cli.quantize.core.parse_wants", wants)
    named = ("quick", "proposal-c", "sensitivity", "quick")
    names = [part for name in named for part in ("--recipe", name)]
    CliRunner().invoke(quantize_command, ["docs-qwen3-8m", *names, "--bpw", "5"])
    assert asked == [(True, Budget(bpw=Fraction(5))), (False, Budget(bpw=Fraction(5)))]
    assert taken == ["found1", "proposal-c", "found2"]


# Two memories


MOE = Inventory(
    "qwen3moe",
    (
        tensor("token_embd.weight", 256, 64),
        tensor("output.weight", 256, 64),
        *(
            tensor(f"blk.{layer}.{name}.weight", 256, rows, *more)
            for layer in range(4)
            for name, rows, more in (
                ("attn_v", 32, ()),
                ("ffn_up_exps", 128, (8,)),
                ("ffn_down_exps", 64, (8,)),
            )
        ),
        tensor("output_norm.weight", 256, quantizable=False),
    ),
)


#: Two layers, and as in Gemma 3n embeddings of a token for each layer, which are in the other memory, too.
LAYERED = replace(
    MOE,
    tensors=(
        *(one for one in MOE.tensors if not one.name.startswith(("blk.2.", "blk.3."))),
        tensor("per_layer_token_embd.weight", 256, 64),
    ),
)


def placed_problem(
    vram: int, ram: int, types: Sequence[str], model: Inventory = MOE
) -> tuple[list[parts.Unit], solve.Placed]:
    every = parts.units(model, types, "class", 1)
    costs = [[unit.values * LOSS[option.kind] for option in unit.options] for unit in every]
    sizes = [[sum(option.sizes) for option in unit.options] for unit in every]
    tensors: list[list[Mapping[str, int]]] = [
        [dict(zip(option.types, option.sizes, strict=True)) for option in unit.options] for unit in every
    ]
    fixed = {"output_norm.weight": 1024}
    return every, solve.Placed(sizes, costs, vram + ram, Budget(rooms=(vram, ram)), tensors, fixed)


@pytest.mark.parametrize(
    ("model", "vram", "ram"),
    [
        *itertools.product(
            [MOE],
            [40_000, 80_000, 250_000, 500_000, 2_000_000],
            [8_000, 12_000, 20_000, 150_000, 300_000, 600_000],
        ),
        *itertools.product([LAYERED], [500_000], [20_000, 24_000, 28_000, 32_000]),
    ],
)
def test_two_memories_hold_the_best_of_all(model: Inventory, vram: int, ram: int) -> None:
    every, problem = placed_problem(vram, ram, ("q3_k", "q4_k", "q6_k", "q8_0"), model)
    best = min(
        (
            chosen
            for chosen in itertools.product(*(range(len(unit.options)) for unit in every))
            if problem.fits(chosen)
        ),
        key=problem.cost,
        default=None,
    )
    found = problem.best(3)
    assert bool(found) == (best is not None)
    assert all(problem.fits(one) for one in found)
    if best is not None:
        assert problem.cost(found[0]) <= 1.05 * problem.cost(best), "the steps lose little"
        assert all(map(problem.fits, problem.neighbours(found[0])))


def test_a_recipe_for_two_memories(world: type[World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shop, "model", MOE)

    def output(self: Shop, want: Want) -> Any:
        assert want.recipe is not None
        types = want.recipe.plan(MOE)
        size = Shop.HEADER + sum(pad(t.bytes_as(types[t.name])) for t in MOE)
        return SimpleNamespace(forecast=Forecast(types, MOE.bits_as(types), size, 0))

    monkeypatch.setattr(Shop, "output", output)
    budget = Budget(rooms=(120_000, 700_000), beside=10_000)
    asked_for = replace(goal(budget, types="q3_k,q4_k,q6_k,q8_0"), quick=True)
    found = best_recipe.analyse(Request("toy", ()), BUILD, asked_for).found
    assert found is not None and found.placement is not None
    place = found.placement
    assert place.vram <= 110_000 and place.ram <= 700_000 and place.option.startswith("--n-cpu-moe ")
    assert found.recipe.name == "quick-120000b-vram-700000b-ram"
    result = best_recipe.analyse(Request("toy", ()), BUILD, asked_for)
    text = report.render(result, asked_for)
    assert f"--override-tensor '{place.override}'" in text
    data = report.as_json(result, asked_for, BUILD)
    assert data["recipe"]["placement"]["override_tensor"] == place.override
    with pytest.raises(UsageError, match="are too few for the model in the smallest types"):
        small = replace(asked_for, budget=Budget(rooms=(20_000, 300_000)))
        best_recipe.analyse(Request("toy", ()), BUILD, small)

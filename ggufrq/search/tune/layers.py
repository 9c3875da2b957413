"""The best assignment of types to K and V of every layer under a budget of bits per value, by measurement.

1. **Single changes.** One layer's K or V is kept in one of the types while all else stays in f16, and the
   mean divergence (KLD) from the run with an f16 cache is measured. Against an otherwise exact cache the
   change is all that there is to see: its KLD is small, but its standard error is a few per cent of itself.
   With all else in three bits the same change would be the difference of two numbers each of which has an
   error as large as the change. (Any change at all, however small, rounds f16 elsewhere and shows as 1e-4 or
   less; it is the same for every type and decides nothing.)
2. **Model.** The KLD of an assignment is taken as the sum of those of its single changes: errors of different
   layers are nearly independent, and KLD grows with their squares.
3. **Choice.** The cheapest assignments by this model within the budget, exactly (``knapsack``): the best few,
   and the best from each run of neighbouring types, since the sum misjudges coarse types most.
4. **Proof.** These, and every uniform pair of K type and V type within the budget, are measured as they are;
   the best by measured KLD is the answer. It is measured once more on another text, which had no part in the
   choice, beside the uniform pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.cache.kv import KvPair, KvPlan, KvType, LayerRange, Sought, exact_words, kv_type
from ggufrq.drive import profiles
from ggufrq.ggufs.kv_shape import KvShape
from ggufrq.measure.base_run import Scored
from ggufrq.measure.divergence import Subject, divergences
from ggufrq.measure.kept import Row
from ggufrq.search.knapsack import Choice, cheapest

#: How many of the cheapest assignments by the model are measured as they are.
_BEST = 4
_REST = kv_type("f16")


@dataclass(frozen=True)
class Goal:
    """What is asked for: bits per value at most, the types to choose from, the texts to tune and to check on,
    how much of each is read, the profile of K in types of ours, and the newest and first tokens in f16 beside
    them, which the bits do not count (None: as many as usual, where the build holds them)."""

    budget: Fraction
    types: tuple[KvType, ...]
    text: Path
    check_text: Path
    scored: Scored
    profile: Path | Sought | None = None
    recent: int | None = 0
    first: int | None = 0


@dataclass(frozen=True)
class Unit:
    """K or V of one layer with a cache, of ``values`` values per token in heads of ``head`` (0: of whole
    blocks of 128)."""

    layer: int
    side: str
    values: int
    head: int = 0


#: KLD and its standard error, by unit and name of the type.
Singles = dict[Unit, dict[str, tuple[float, float]]]


@dataclass(frozen=True)
class Measured:
    """A cache and its mean KLD with standard error on the tuning text; ``predicted`` is the model's, where it
    was asked."""

    plan: KvPlan
    bits: float
    kld: float
    kld_err: float
    predicted: float | None = None


@dataclass(frozen=True)
class Result:
    """The answer ``plan`` and what led to it: KLD and its error of single changes by unit and type name, and
    of whole caches on the tuning text (``tuned``) and on the checking text (``checked``, the answer first);
    the commands that were run; what is said of the profile, and of the tokens in f16 (empty without)."""

    plan: KvPlan
    bits: float
    bytes_per_token: int
    singles: Singles
    tuned: list[Measured]
    checked: list[Measured]
    commands: list[str]
    profile: str | None = None
    exact: str = ""


def units(shape: KvShape) -> list[Unit]:
    """K and V of each layer with a cache, without those that hold nothing."""
    none = (0,) * shape.layers
    heads = {"K": shape.k_heads or none, "V": shape.v_heads or none}
    every = [
        Unit(layer, side, values, heads[side][layer])
        for layer, sides in enumerate(zip(shape.k_layers, shape.v_layers, strict=True))
        for side, values in zip("KV", sides, strict=True)
    ]
    return [unit for unit in every if unit.values]


def parse_types(text: str) -> tuple[KvType, ...]:
    """Types with commas between, the smallest first, each once. Raises UsageError."""
    types = {kind.name: kind for kind in (kv_type(name) for name in text.split(",") if name.strip())}
    if len(types) < 2:
        raise UsageError("tuning takes two types or more to choose from", remedy="--types iso2,iso3,iso4")
    return tuple(sorted(types.values(), key=lambda kind: kind.bits))


def single_plan(unit: Unit, kind: KvType) -> KvPlan:
    """One unit in ``kind``, all else in f16."""
    pair = KvPair(kind, _REST) if unit.side == "K" else KvPair(_REST, kind)
    return KvPlan(KvPair(_REST, _REST), (((LayerRange(unit.layer, unit.layer),), pair),))


def uniform_plans(goal: Goal, shape: KvShape) -> list[KvPlan]:
    """One plan per type for K and V, and every pair of types that the budget allows; the smallest first."""
    alike = [KvPlan(KvPair(kind, kind)) for kind in goal.types]
    mixed = [KvPlan(KvPair(k, v)) for k in goal.types for v in goal.types if k != v]
    fitting = [plan for plan in mixed if plan.bytes_for(shape, 1) <= capacity(goal.budget, shape)]
    return sorted([*alike, *fitting], key=lambda plan: plan.bytes_for(shape, 1))


def capacity(budget: Fraction, shape: KvShape) -> int:
    """Bytes per token that so many bits per value come to."""
    return math.floor(budget * (sum(shape.k_layers) + sum(shape.v_layers)) / 8)


def candidates(goal: Goal, shape: KvShape, singles: Singles) -> list[tuple[KvPlan, float]]:
    """Assignments that the model thinks best, with the KLD that it predicts, the best first."""
    every = units(shape)
    limit = capacity(goal.budget, shape)
    found: dict[KvPlan, float] = {}
    for first in range(len(goal.types)):
        for last in range(first + 1, len(goal.types) + 1):
            types = goal.types[first:last]
            filled = any(kind.ours for kind in types)
            sizes = [
                [kind.row_bytes(unit.values, unit.head, filled=filled) for kind in types] for unit in every
            ]
            costs = [[singles[unit][kind.name][0] for kind in types] for unit in every]
            whole = len(types) == len(goal.types)
            for choice in cheapest(sizes, costs, limit, _BEST if whole else 1):
                found.setdefault(_plan(shape, every, types, choice), choice.cost)
    return sorted(found.items(), key=lambda item: item[1])


def _exact_words(goal: Goal) -> str:
    kind = next((kind for kind in goal.types if kind.ours), None)
    if kind is None:
        return ""
    plan = KvPlan(KvPair(kind, kind)).with_wished(goal.recent, goal.first)
    return exact_words(plan.recent, plan.first)


def _plan(shape: KvShape, every: Sequence[Unit], types: Sequence[KvType], choice: Choice) -> KvPlan:
    # what holds nothing takes the smallest type, as any would do
    chosen = {(u.layer, u.side): types[o] for u, o in zip(every, choice.options, strict=True)}
    pairs = [
        KvPair(*(chosen.get((layer, side), types[0]) for side in "KV"))
        for layer in range(len(shape.k_layers))
    ]
    return KvPlan.of_layers(pairs)


def tune(
    model: Subject,
    build: Build,
    goal: Goal,
    *,
    fresh: bool = False,
    log: Path | None = None,
    listener: Listener = SILENT,
) -> Result:
    """Find the best assignment for ``model``. What an earlier run has measured is taken from it, unless
    ``fresh``.

    ``listener`` is told how many measurements there will be, twice: roughly, then exactly; and of each.
    Raises UsageError when the budget is below the smallest type, ModelError when the shape of the model's
    cache is not known, and as ``divergence.divergences``.
    """
    shape = model.shape
    if shape is None:
        raise ModelError(f"the layers of {model.name} that have a cache cannot be told from its file")
    every = units(shape)
    least = KvPlan(KvPair(goal.types[0], goal.types[0]))
    if least.bytes_for(shape, 1) > capacity(goal.budget, shape):
        raise UsageError(
            f"{float(goal.budget):g} bits per value are fewer than {goal.types[0].name} takes, "
            f"{least.bits(shape):g}",
            remedy=f"--budget {least.bits(shape):g} or more, or smaller --types",
        )
    wish, n_ctx = goal.profile, goal.scored.n_ctx
    profile = None if wish is None else profiles.find(model.path, wish, n_ctx, build)
    rows: list[Row] = []

    def case(plan: KvPlan) -> Case:
        plan = plan.with_profile(profile.file if profile and plan.k_ours else None)
        return Case(plan.with_wished(goal.recent, goal.first) if plan.rotated else plan)

    def measured(plans: Sequence[KvPlan], text: Path) -> list[Row]:
        found = divergences(
            model,
            [case(plan) for plan in plans],
            build,
            text,
            goal.scored,
            fresh=fresh,
            log=log,
            listener=listener,
        )
        rows.extend(found)
        return found

    uniform = uniform_plans(goal, shape)
    fixed = len(every) * len(goal.types) + 2 * len(uniform) + 1
    listener.expect(fixed + _BEST)
    asked = [(unit, kind) for unit in every for kind in goal.types]
    singles: Singles = {unit: {} for unit in every}
    for (unit, kind), row in zip(
        asked, measured([single_plan(unit, kind) for unit, kind in asked], goal.text), strict=True
    ):
        singles[unit][kind.name] = (row["kld_mean"], row["kld_mean_err"])
    predicted = dict(candidates(goal, shape, singles))
    plans = list(dict.fromkeys([*predicted, *uniform]))
    listener.expect(fixed + len(plans) - len(uniform))
    tuned = [
        Measured(plan, plan.bits(shape), row["kld_mean"], row["kld_mean_err"], predicted.get(plan))
        for plan, row in zip(plans, measured(plans, goal.text), strict=True)
    ]
    limit = capacity(goal.budget, shape)
    best = min((m for m in tuned if m.plan.bytes_for(shape, 1) <= limit), key=lambda m: m.kld).plan
    plans = list(dict.fromkeys([best, *uniform]))
    checked = [
        Measured(plan, plan.bits(shape), row["kld_mean"], row["kld_mean_err"])
        for plan, row in zip(plans, measured(plans, goal.check_text), strict=True)
    ]
    return Result(
        plan=best,
        bits=best.bits(shape),
        bytes_per_token=best.bytes_for(shape, 1),
        singles=singles,
        tuned=tuned,
        checked=checked,
        commands=list(dict.fromkeys(row["command"] for row in rows)),
        profile=None if profile is None else profile.said,
        exact=_exact_words(goal),
    )

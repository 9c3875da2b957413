"""What a tuned cache is worth, as a table, in words and as plain data."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ggufrq.base import table
from ggufrq.cache.kv import Sought, profile_word
from ggufrq.measure.divergence import Subject
from ggufrq.measure.verdict import BETTER, NONE, between
from ggufrq.search.tune.layers import Goal, Measured, Result

_WIDTH = 79
_HEAD = ("cache", "bits", "tuning", "±", "check", "±", "tuned is")


@dataclass(frozen=True)
class Comparison:
    """Another cache, its KLD with standard error, and what the tuned one is beside it: ``better``, ``worse``
    or ``no difference seen``, see ``validate.verdict``."""

    name: str
    bits: float
    kld: float
    kld_err: float
    verdict: str


def compare(measured: Sequence[Measured], tuned: Measured) -> list[Comparison]:
    """``tuned`` held against the line between the two uniform types next to it in size, and against each of
    the others that is no larger."""
    others = sorted((m for m in measured if m.plan != tuned.plan), key=lambda m: m.bits)
    uniform = [m for m in others if not m.plan.layered]
    found = []
    alike = [m for m in uniform if m.plan.base.k == m.plan.base.v]
    below = [m for m in alike if m.bits <= tuned.bits]
    above = [m for m in alike if m.bits > tuned.bits]
    if below and above:
        low, high = below[-1], above[0]
        share = (tuned.bits - low.bits) / (high.bits - low.bits)
        kld = (1 - share) * low.kld + share * high.kld
        error = math.hypot((1 - share) * low.kld_err, share * high.kld_err)
        name = f"line {low.plan.name} to {high.plan.name}"
        found.append(Comparison(name, tuned.bits, kld, error, _verdict(tuned, kld, error)))
    for other in uniform:
        if other.bits <= tuned.bits:
            verdict = _verdict(tuned, other.kld, other.kld_err)
            found.append(Comparison(other.plan.name, other.bits, other.kld, other.kld_err, verdict))
    return found


def render(result: Result, model: Subject, goal: Goal) -> str:
    """The assignment, ready to be pasted, and a table of at most 80 columns."""
    assert model.shape is not None  # tune
    f16 = 2 * (sum(model.shape.k_layers) + sum(model.shape.v_layers))
    profile = "" if goal.profile is Sought.AUTO else f" --kv-profile {profile_word(goal.profile)}"
    exact = [("recent", goal.recent), ("first", goal.first)]
    profile += "".join(f" --kv-{name} {tokens}" for name, tokens in exact if tokens is not None)
    lines = [
        f"{model.name}, {model.weights}, at most {float(goal.budget):g} bits per value:",
        "",
        *textwrap.wrap(
            f'--kv "{result.plan.name}"{profile}',
            _WIDTH,
            initial_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        ),
        "",
        f"{result.bits:g} bits per value, {result.bytes_per_token:,} bytes per token; f16 takes "
        f"{f16 / result.bytes_per_token:.2f} times that.",
        "",
        _table(result),
        "",
    ]
    return "\n".join([*lines, *textwrap.wrap(_explanation(result, goal), _WIDTH)])


def _table(result: Result) -> str:
    on_text = {m.plan: m for m in result.tuned}
    best = result.checked[0]
    first = {c.name: c for c in compare(result.tuned, on_text[result.plan])}
    then = {c.name: c for c in compare(result.checked, best)}
    rows = [_row("tuned", on_text[result.plan], best, "")]
    rows += [_row(name, first[name], c, c.verdict) for name, c in then.items()]
    larger = [m for m in result.checked[1:] if m.plan.name not in then]
    rows += [_row(m.plan.name, on_text[m.plan], m, "") for m in larger]
    return table.render(_HEAD, rows, "lrrrrrl")


def _row(
    name: str, tuned: Measured | Comparison, checked: Measured | Comparison, verdict: str
) -> tuple[str, ...]:
    figures = (tuned.kld, tuned.kld_err, checked.kld, checked.kld_err)
    words = "within error" if verdict == NONE else verdict
    return (name, f"{checked.bits:.5g}", *(f"{max(figure, 0.0):.6f}" for figure in figures), words)


def _explanation(result: Result, goal: Goal) -> str:
    comparisons = compare(result.checked, result.checked[0])
    beaten = sum(c.verdict == BETTER for c in comparisons)
    unseen = [c.name for c in comparisons if c.verdict == NONE]
    words = (
        f"Mean KLD (nats) from a run with an f16 cache, with its standard error, over {goal.scored.chunks} "
        f"chunks of {goal.scored.n_ctx:,} tokens. It was tuned on {goal.text.name} and checked on "
        f"{goal.check_text.name}, which had no part in the choice. There it is better than {beaten} of the "
        f"{len(comparisons)} that are no larger, by more than twice the error of the difference."
    )
    if unseen:
        words += f" Within that error of: {', '.join(unseen)}."
    if result.profile is not None:
        words += f" K in types of ours: {result.profile}."
    if result.exact:
        words += f" Beside types of ours {result.exact} in f16, which the bits do not count."
    predicted = next((m.predicted for m in result.tuned if m.plan == result.plan), None)
    if predicted is not None:
        words += f" The sum of its single changes was {predicted:.5f}."
    return words


def as_json(result: Result, model: Subject, goal: Goal) -> dict[str, Any]:
    """The result as plain data."""

    def measured(m: Measured) -> dict[str, Any]:
        prediction = {} if m.predicted is None else {"predicted": m.predicted}
        return {"kv": m.plan.name, "bits": m.bits, "kld_mean": m.kld, "kld_mean_err": m.kld_err, **prediction}

    return {
        "model": model.name,
        "weights": model.weights,
        "model_sha256": model.sha256,
        "budget": float(goal.budget),
        "types": [kind.name for kind in goal.types],
        "n_ctx": goal.scored.n_ctx,
        "chunks": goal.scored.chunks,
        "text": goal.text.name,
        "check_text": goal.check_text.name,
        "profile": result.profile,
        "exact": result.exact,
        "kv": result.plan.name,
        "bits": result.bits,
        "bytes_per_token": result.bytes_per_token,
        "singles": [
            {"layer": unit.layer, "side": unit.side, "type": name, "kld_mean": kld, "kld_mean_err": error}
            for unit, types in result.singles.items()
            for name, (kld, error) in types.items()
        ],
        "tuned": [measured(m) for m in result.tuned],
        "checked": [measured(m) for m in result.checked],
        "comparisons": [asdict(c) for c in compare(result.checked, result.checked[0])],
        "commands": result.commands,
    }


def _verdict(tuned: Measured, kld: float, kld_err: float) -> str:
    return between(tuned.kld, tuned.kld_err, kld, kld_err).verdict(more_is_worse=True)

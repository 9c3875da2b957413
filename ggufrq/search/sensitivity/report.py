"""What the parts of a model lose by quantizing, and the recipe that was found: as tables and plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ggufrq.base import table
from ggufrq.build.project import Build
from ggufrq.ggufs.tensors import type_bits
from ggufrq.measure.verdict import NONE, between
from ggufrq.search.sensitivity.best_recipe import Candidate, Found, Goal, Result
from ggufrq.search.sensitivity.trials import Measured

_WIDTH = 79


def render(result: Result, goal: Goal) -> str:
    """The sensitivities, and the recipe beside what ggufrq comes with."""
    text, check_text = goal.texts
    s = goal.settings
    chosen = result.found.chosen if result.found is not None else {}
    parts = [
        f"{result.base}: mean KLD, in thousandths of a nat, with one part quantized",
        _sensitivities(result, chosen, lambda measured: measured.kld),
        "99.9th percentile of the KLD, in thousandths of a nat",
        _sensitivities(result, {}, lambda measured: measured.kld_p999),
        textwrap.fill(
            f"Against {result.gguf.name} over {s.chunks} chunks of {s.n_ctx:,} tokens of {text.name}, "
            f"{_matrix(result)}. " + ("* is what was chosen." if chosen else ""),
            _WIDTH,
        ),
    ]
    found = result.found
    if found is not None:
        parts += [
            f"{found.recipe.name}: {found.bytes:,} bytes, {found.checked[0].bits:.4g} bits per weight",
            _comparison(found),
            textwrap.fill(_explanation(result, found, check_text.name), _WIDTH),
        ]
    return "\n\n".join(parts)


def reproduction(result: Result, build: Build) -> str:
    """What it takes to measure the same again."""
    source = build.manifest.get("llama_cpp", {}).get("commit", "")
    lines = [
        f"llama.cpp {str(source)[:12]}, patch set {str(build.manifest.get('patch_set', ''))[:12]}; "
        f"{build.manifest.get('cpu') or 'processor unknown'}; {result.jobs} at once, threads of each: "
        f"{result.threads}.",
        "Each measurement, after a run on the unquantized model without --kl-divergence:",
    ]
    return "\n".join([*textwrap.wrap(lines[0], _WIDTH), lines[1], f"  {result.command}"])


def _matrix(result: Result) -> str:
    return f"importance matrix {result.matrix.name}" if result.matrix is not None else "no importance matrix"


def _sensitivities(result: Result, chosen: Mapping[str, str], figure: Callable[[Measured], float]) -> str:
    kinds = sorted(
        {option.kind for unit in result.singles for option in unit.options if not option.exact},
        key=lambda kind: (type_bits(kind), kind),
    )
    whole = [kind for kind in chosen.values() if kind not in kinds]
    rows = []
    for unit, singles in result.singles.items():
        by_kind = {
            option.kind: _short(1000 * figure(measured))
            + ("*" if chosen.get(unit.name) == option.kind else " ")
            for option, measured in zip(unit.options, singles, strict=True)
            if not option.exact
        }
        kept = [("*" if chosen.get(unit.name) not in by_kind else "")] if whole else []
        rows.append((unit.name, f"{unit.values / 1e6:.3g}", *(by_kind.get(k, "") for k in kinds), *kept))
    head = ("", "M", *(f"{kind} " for kind in kinds), *(["as is"] if whole else []))
    return table.render(head, rows, "l" + "r" * (len(head) - 1))


def _short(value: float) -> str:
    """Three digits, at most three of them behind the point."""
    return f"{value:.{3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _comparison(found: Found) -> str:
    head = ("", "bits", "mean KLD", "±", "99.9 %", "top, %", "the recipe is")
    best = found.checked[0]
    rows = [
        (
            one.name,
            f"{one.bits:.4g}",
            f"{one.measured.kld:.6f}",
            f"{one.measured.kld_err:.6f}",
            f"{one.measured.kld_p999:.4f}",
            f"{100 * one.measured.same_top:.1f}",
            "" if one is best else _verdict(best, one),
        )
        for one in found.checked
    ]
    return table.render(head, rows, "lrrrrrl")


def _verdict(best: Candidate, other: Candidate) -> str:
    a, b = best.measured, other.measured
    verdict = between(a.kld, a.kld_err, b.kld, b.kld_err).verdict(more_is_worse=True)
    return "within error" if verdict == NONE else verdict


def _explanation(result: Result, found: Found, check_text: str) -> str:
    best = found.tuned[0]
    matrix = "with the same matrix" if result.matrix is not None else "without a matrix"
    return (
        f"Measured on {check_text}, which had no part in the choice; the others are what ggufrq comes with "
        f"and the budget allows, {matrix}. The recipe is the best of "
        f"{len(found.tuned)} that were measured; its KLD there was {best.measured.kld:.6f} ± "
        f"{best.measured.kld_err:.6f}, the sum of its single changes {best.predicted or 0.0:.6f}."
    )


def as_json(result: Result, goal: Goal, build: Build) -> dict[str, Any]:
    """The result as plain data."""
    text, check_text = goal.texts
    found = result.found
    return {
        "model": result.base,
        "source": result.gguf.name,
        "imatrix": result.matrix.name if result.matrix is not None else None,
        "types": list(result.types),
        "by": goal.by,
        "text": text.name,
        "check_text": check_text.name,
        "settings": asdict(goal.settings),
        "singles": [
            {
                "unit": unit.name,
                "weights": unit.values,
                "tensors": [tensor.name for tensor in unit.tensors],
                "type": option.kind,
                "bytes": sum(option.sizes),
                **asdict(measured),
            }
            for unit, singles in result.singles.items()
            for option, measured in zip(unit.options, singles, strict=True)
            if not option.exact
        ],
        "budget": goal.budget.text if goal.budget is not None else None,
        "recipe": None if found is None else _recipe(found),
        "tuned": [] if found is None else _candidates(found.tuned),
        "checked": [] if found is None else _candidates(found.checked),
        "llama_cpp": build.manifest.get("llama_cpp", {}).get("commit"),
        "patch_set": build.manifest.get("patch_set"),
        "command": result.command,
    }


def _recipe(found: Found) -> dict[str, Any]:
    return {
        "name": found.recipe.name,
        "bytes": found.bytes,
        "bits": found.checked[0].bits,
        "chosen": found.chosen,
        "tensors": dict(found.checked[0].types),
    }


def _candidates(every: Sequence[Candidate]) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "bits": one.bits, "predicted": one.predicted, **asdict(one.measured)}
        for one in every
    ]

"""What the parts of a model lose by quantizing, and the recipe that was found: as tables and plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ggufrq.base import table
from ggufrq.build.project import Build
from ggufrq.ggufs.tensors import type_bits
from ggufrq.measure.verdict import NONE, between
from ggufrq.search.sensitivity.best_recipe import Candidate, Found, Goal, Result
from ggufrq.search.sensitivity.parts import Unit
from ggufrq.search.sensitivity.trials import Measured

_WIDTH = 79


def render(result: Result, goal: Goal) -> str:
    """The sensitivities, and the recipe beside what ggufrq comes with."""
    text, check_text = goal.texts
    s = goal.settings
    chosen = result.found.chosen if result.found is not None else {}
    if not result.singles:
        return "\n\n".join(_by_weights(result, chosen))
    parts = [
        f"{result.base}: mean KLD, in thousandths of a nat, with one part quantized",
        _sensitivities(_figures(result, lambda measured: measured.kld), chosen),
        "99.9th percentile of the KLD, in thousandths of a nat",
        _sensitivities(_figures(result, lambda measured: measured.kld_p999), {}),
        textwrap.fill(
            f"Against {result.gguf.name} over {s.chunks} chunks of {s.n_ctx:,} tokens of {text.name}, "
            f"{_matrix(result)}. {_legend(chosen)}",
            _WIDTH,
        ),
    ]
    found = result.found
    if found is not None:
        parts += [
            _title(found),
            _comparison(found),
            textwrap.fill(_explanation(result, found, check_text.name), _WIDTH),
        ]
    return "\n\n".join(parts)


def _by_weights(result: Result, chosen: Mapping[str, str]) -> list[str]:
    """The parts of a result without measurements."""
    assert result.estimates is not None
    parts = [
        f"{result.base}: the loss with one part quantized, estimated, in thousandths",
        _sensitivities(result.estimates, chosen),
        textwrap.fill(
            f"By the errors of the weights of {result.gguf.name}, {_matrix(result)}: nothing was measured. "
            "The figures tell parts and types from each other; they are not the KLD of this model. "
            + _legend(chosen),
            _WIDTH,
        ),
    ]
    return [*parts, *([_title(result.found)] if result.found is not None else [])]


def _title(found: Found) -> str:
    said = f"{found.recipe.name}: {found.bytes:,} bytes, {found.bits:.4g} bits per weight"
    place = found.placement
    if place is None:
        return said
    said += f"\n{place.vram:,} bytes of weights in VRAM, {place.ram:,} in RAM: --n-gpu-layers all"
    return said + (f" {place.option}, which is\n--override-tensor '{place.override}'" if place.option else "")


def reproduction(result: Result, build: Build) -> str:
    """What it takes to measure the same again."""
    commit = build.manifest.get("llama_cpp", {}).get("commit", "")
    lines = [
        f"llama.cpp {str(commit)[:12]}, patch set {str(build.manifest.get('patch_set', ''))[:12]}; "
        f"{build.manifest.get('cpu') or 'processor unknown'}; {result.jobs} at once, threads of each: "
        f"{result.threads}.",
        "Each measurement, after a run on the unquantized model without --kl-divergence:",
    ]
    return "\n".join([*textwrap.wrap(lines[0], _WIDTH), lines[1], f"  {result.command}"])


def _matrix(result: Result) -> str:
    return f"importance matrix {result.matrix.name}" if result.matrix is not None else "no importance matrix"


def _legend(chosen: Mapping[str, str]) -> str:
    """How the tables are to be read."""
    marked = "* is what was chosen." if chosen else "--bpw BITS or --size SIZE chooses a recipe."
    return f"M are millions of weights. {marked}"


def _figures(result: Result, figure: Callable[[Measured], float]) -> dict[Unit, list[float]]:
    return {unit: [figure(one) for one in singles] for unit, singles in result.singles.items()}


def _sensitivities(costs: Mapping[Unit, Sequence[float]], chosen: Mapping[str, str]) -> str:
    """Costs of the options of each unit in thousandths, with what was chosen marked."""
    kinds = sorted(
        {option.kind for unit in costs for option in unit.options if not option.exact},
        key=lambda kind: (type_bits(kind), kind),
    )
    whole = [kind for kind in chosen.values() if kind not in kinds]
    rows = []
    for unit, figures in costs.items():
        by_kind = {
            option.kind: _short(1000 * figure) + ("*" if chosen.get(unit.name) == option.kind else " ")
            for option, figure in zip(unit.options, figures, strict=True)
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
        f"Measured on {check_text}, which had no part in the choice; the others are what --quick "
        f"chooses, and what ggufrq comes with and the budget allows, {matrix}. The recipe is the best of "
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
        "text": text.name if result.singles else None,
        "check_text": check_text.name if result.singles else None,
        "settings": asdict(goal.settings) if result.singles else None,
        "singles": list(_singles(result)),
        "budget": goal.budget.text if goal.budget is not None else None,
        "recipe": None if found is None else _recipe(found),
        "tuned": [] if found is None else _candidates(found.tuned),
        "checked": [] if found is None else _candidates(found.checked),
        "llama_cpp": build.manifest.get("llama_cpp", {}).get("commit"),
        "patch_set": build.manifest.get("patch_set"),
        "command": result.command,
    }


def _singles(result: Result) -> Iterator[dict[str, Any]]:
    """Options by unit, with what they measured and what they should cost by the errors of weights."""
    for unit in result.singles or result.estimates or {}:
        for i, option in enumerate(unit.options):
            if option.exact:
                continue
            yield {
                "unit": unit.name,
                "weights": unit.values,
                "tensors": [tensor.name for tensor in unit.tensors],
                "type": option.kind,
                "bytes": sum(option.sizes),
                **(asdict(result.singles[unit][i]) if result.singles else {}),
                **({"estimate": result.estimates[unit][i]} if result.estimates is not None else {}),
            }


def _recipe(found: Found) -> dict[str, Any]:
    return {
        "name": found.recipe.name,
        "bytes": found.bytes,
        "bits": found.bits,
        "chosen": found.chosen,
        "placement": None
        if found.placement is None
        else {
            **asdict(found.placement),
            "option": found.placement.option,
            "override_tensor": found.placement.override,
        },
        "tensors": dict(found.types),
    }


def _candidates(every: Sequence[Candidate]) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "bits": one.bits, "predicted": one.predicted, **asdict(one.measured)}
        for one in every
    ]

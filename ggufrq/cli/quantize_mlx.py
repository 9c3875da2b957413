"""``ggufrq quantize --to mlx``: a folder for mlx-lm, or a family of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ggufrq.base import table
from ggufrq.base.errors import UsageError
from ggufrq.base.sizes import parse_size, size_text
from ggufrq.cli.sensitivity import parse_budget
from ggufrq.make.recipe import load

if TYPE_CHECKING:
    from ggufrq.mlx.weights import Made, Plan

#: What is made when nothing is asked for.
FAMILY_BITS, FAMILY_RECIPES = "2,3,4,5,6,8", ("proposal-c",)

#: What means something with ``--to mlx``.
_TAKEN = {
    *("model", "to", "bits", "recipes", "size", "bpw", "out", "dry_run", "as_json"),
    *("revision", "fold", "split_size"),
}


def to_mlx(
    model: str,
    bits: str | None,
    recipes: Sequence[str],
    *,
    sensitivity: str,
    quick: str,
    size: str | None,
    bpw: str | None,
    out: Path | None,
    revision: str | None,
    fold: str | None,
    split_size: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make it, or say what it would be; the family when neither bits nor a recipe are given. ``sensitivity``
    is the name of the recipe that is found by measurement. Raises UsageError, when mlx is not
    installed, too."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
        if given and parameter.name not in _TAKEN:
            raise UsageError(f"{parameter.opts[0]} is for GGUF files, not for --to mlx")
    if fold not in (None, "awq"):
        raise UsageError(f"--fold {fold} is for GGUF files", remedy="--fold awq")
    if bits is None and not recipes:
        bits, recipes = FAMILY_BITS, FAMILY_RECIPES
    if quick in recipes:
        raise UsageError(
            f"the recipe {quick} is for GGUF files, not for --to mlx",
            remedy=f"--recipe {sensitivity}, which measures",
        )
    budget = parse_budget(size, bpw)
    if sensitivity in recipes and budget is None:
        raise UsageError(
            "the recipe sensitivity is made for a budget",
            remedy="--recipe sensitivity --bpw 5, or --size 15GB",
        )
    if budget is not None and sensitivity not in recipes:
        raise UsageError("--size and --bpw are the budget of --recipe sensitivity")
    whats: list[Any] = [*_numbers(bits or "")]
    whats += [budget if name == sensitivity else load(name) for name in dict.fromkeys(recipes)]
    if not whats:
        raise UsageError("--bits names no bits", remedy="--bits 4, or --bits 3,4,8")
    try:
        from ggufrq.mlx import family, weights
    except ImportError:
        raise UsageError("--to mlx takes mlx and mlx-lm", remedy="pip install 'ggufrq[mlx]'") from None

    more = {} if split_size is None else {"most": parse_size(split_size)}
    request = weights.Request(model, whats[0], out, revision, fold, **more)
    if len(whats) == 1:
        made = None if dry_run else weights.quantize(request)
        plan = weights.plan(request) if made is None else made.plan
        folder = str(request.folder)
        click.echo(json.dumps(_data(plan, made, folder), indent=2) if as_json else _said(plan, made, folder))
        return
    requests = family.requests(request, whats)
    all_made: Sequence[Made | None] = [None] * len(requests) if dry_run else family.quantize(requests)
    pairs = [
        (weights.plan(one) if made is None else made.plan, made)
        for one, made in zip(requests, all_made, strict=True)
    ]
    folder = str(requests[0].folder.parent)
    if as_json:
        models = [
            _data(plan, made, str(one.folder)) for one, (plan, made) in zip(requests, pairs, strict=True)
        ]
        click.echo(json.dumps({"folder": folder, "models": models}, indent=2))
    else:
        click.echo(_said_family(pairs, folder))


def _numbers(bits: str) -> list[int]:
    """``2,3,4``, each once."""
    try:
        return list(dict.fromkeys(int(word) for word in bits.split(",") if word.strip()))
    except ValueError:
        raise UsageError(f"--bits {bits}: numbers are wanted, with commas", remedy="--bits 3,4") from None


def _data(plan: Plan, made: Made | None, folder: str) -> dict[str, Any]:
    data = {**asdict(plan), "bytes": plan.bytes, "bits": plan.bits, "folder": folder}
    if made is not None:
        data |= {"kld": made.kld, "text": made.text, "fresh": made.fresh}
    return data


def _said(plan: Plan, made: Made | None, folder: str) -> str:
    lines = [
        f"{plan.name}: {plan.bytes} bytes ({size_text(plan.bytes)}) in {len(plan.files)} files, "
        f"{plan.bits:.3f} bits/weight"
    ]
    lines += [f"  {name}: {size} bytes" for name, size in plan.files.items() if name.endswith(".safetensors")]
    lines.append("modules: " + ", ".join(f"{count} of {bits} bits" for bits, count in plan.modules.items()))
    if made is not None:
        lines.append(f"mean KLD to the model as it was: {made.kld:.5f}; it wrote {made.text!r}")
        lines.append(f"in {folder}" + ("" if made.fresh else ", kept"))
    return "\n".join(lines)


def _said_family(pairs: Sequence[tuple[Plan, Made | None]], folder: str) -> str:
    """A row for each model, as JSON has it in full."""
    rows = [
        (
            *(plan.name, plan.what, f"{plan.bytes:,}", size_text(plan.bytes), f"{plan.bits:.3f}"),
            *(("", "") if made is None else (f"{made.kld:.5f}", "" if made.fresh else "kept")),
        )
        for plan, made in pairs
    ]
    head = ("folder", "weights", "bytes", "size", "bits/weight", "mean KLD", "")
    total = size_text(sum(plan.bytes for plan, _ in pairs))
    return f"{table.render(head, rows, 'llrrrrl')}\n{total} in {folder}"

"""``ggufrq quantize --to mlx``: a folder for mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ggufrq.base.errors import UsageError
from ggufrq.base.sizes import parse_size, size_text
from ggufrq.cli.sensitivity import parse_budget
from ggufrq.make.recipe import load

#: What means something with ``--to mlx``.
_TAKEN = {
    *("model", "to", "bits", "recipes", "size", "bpw", "out", "dry_run", "as_json"),
    *("revision", "fold", "split_size"),
}


def to_mlx(
    model: str,
    bits: int | None,
    recipes: Sequence[str],
    *,
    sensitivity: str,
    size: str | None,
    bpw: str | None,
    out: Path | None,
    revision: str | None,
    fold: str | None,
    split_size: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make it, or say what it would be; ``sensitivity`` is the name of the recipe that is found by
    measurement. Raises UsageError when mlx is not installed, too."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
        if given and parameter.name not in _TAKEN:
            raise UsageError(f"{parameter.opts[0]} is for GGUF files, not for --to mlx")
    if (bits is None) == (not recipes) or len(recipes) > 1:
        raise UsageError("--to mlx takes either --bits or one --recipe", remedy="--bits 4")
    if fold not in (None, "awq"):
        raise UsageError(f"--fold {fold} is for GGUF files", remedy="--fold awq")
    budget = parse_budget(size, bpw)
    what: Any = bits
    if bits is None and recipes[0] == sensitivity:
        if budget is None:
            raise UsageError(
                "the recipe sensitivity is made for a budget",
                remedy="--recipe sensitivity --bpw 5, or --size 15GB",
            )
        what = budget
    elif budget is not None:
        raise UsageError("--size and --bpw are the budget of --recipe sensitivity")
    elif bits is None:
        what = load(recipes[0])
    try:
        from ggufrq.mlx import weights
    except ImportError:
        raise UsageError("--to mlx takes mlx and mlx-lm", remedy="pip install 'ggufrq[mlx]'") from None

    more = {} if split_size is None else {"most": parse_size(split_size)}
    request = weights.Request(model, what, out, revision, fold, **more)
    if dry_run:
        plan, made = weights.plan(request), None
    else:
        made = weights.quantize(request)
        plan = made.plan
    if as_json:
        data = {**asdict(plan), "bytes": plan.bytes, "bits": plan.bits, "folder": str(request.folder)}
        if made is not None:
            data |= {"kld": made.kld, "text": made.text, "fresh": made.fresh}
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(
        f"{plan.name}: {plan.bytes} bytes ({size_text(plan.bytes)}) in {len(plan.files)} files, "
        f"{plan.bits:.3f} bits/weight"
    )
    for name, count in plan.files.items():
        if name.endswith(".safetensors"):
            click.echo(f"  {name}: {count} bytes")
    modules = ", ".join(f"{count} of {bits} bits" for bits, count in plan.modules.items())
    click.echo(f"modules: {modules}")
    if made is not None:
        click.echo(f"mean KLD to the model as it was: {made.kld:.5f}; it wrote {made.text!r}")
        click.echo(f"in {request.folder}" + ("" if made.fresh else ", kept"))

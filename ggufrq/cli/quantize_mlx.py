"""``ggufrq quantize --to mlx``: a folder for mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from click.core import ParameterSource

from ggufrq.base.errors import UsageError
from ggufrq.base.sizes import size_text
from ggufrq.make.recipe import Recipe, load
from ggufrq.models.resolve import resolve

#: What means something with ``--to mlx``.
_TAKEN = {"model", "to", "bits", "recipes", "out", "dry_run", "as_json"}


def to_mlx(
    model: str,
    bits: int | None,
    recipes: Sequence[str],
    out: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make it, or say what it would be. Raises UsageError when mlx is not installed, too."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
        if given and parameter.name not in _TAKEN:
            raise UsageError(f"{parameter.opts[0]} is for GGUF files, not for --to mlx")
    if (bits is None) == (not recipes) or len(recipes) > 1:
        raise UsageError("--to mlx takes either --bits or one --recipe", remedy="--bits 4")
    what: int | Recipe = load(recipes[0]) if bits is None else bits
    try:
        from ggufrq.mlx import weights
    except ImportError:
        raise UsageError("--to mlx takes mlx and mlx-lm", remedy="pip install 'ggufrq[mlx]'") from None

    name = f"{bits}bit" if isinstance(what, int) else what.name
    folder = out or Path(f"{resolve(model).name}-mlx-{name}")
    if dry_run:
        plan, made = weights.plan(model, what), None
    else:
        made = weights.quantize(model, folder, what)
        plan = made.plan
    if as_json:
        data = {**asdict(plan), "bits": plan.bits, "folder": str(folder)}
        if made is not None:
            data |= {"kld": made.kld, "text": made.text, "fresh": made.fresh}
        click.echo(json.dumps(data, indent=2))
        return
    modules = ", ".join(f"{count} of {bits} bits" for bits, count in plan.modules.items())
    click.echo(f"{plan.what}: {plan.bytes} bytes ({size_text(plan.bytes)}), {plan.bits:.3f} bits/weight")
    click.echo(f"modules: {modules}")
    if made is not None:
        click.echo(f"mean KLD to the model as it was: {made.kld:.5f}; it wrote {made.text!r}")
        click.echo(f"in {folder}" + ("" if made.fresh else ", kept"))

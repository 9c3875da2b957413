"""``ggufrq quantize``: a family of GGUF files from one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ggufrq.base import table
from ggufrq.base.errors import UsageError
from ggufrq.base.sizes import parse_size, size_text
from ggufrq.build.builds import require_build
from ggufrq.cli.quantize_mlx import to_mlx
from ggufrq.cli.quantize_plan import (
    larger,
    plan_as_json,
    refuse_what_does_not_fit,
    render_plan,
    render_tensors,
)
from ggufrq.cli.sensitivity import parse_budget, solved
from ggufrq.cli.text_options import TEXT_FILE
from ggufrq.make import family as core
from ggufrq.make.fold.fold_file import KINDS
from ggufrq.make.plan import Family, Made, Request
from ggufrq.make.recipe import Recipe, load

#: The recipe that is made for the model at hand, by measurement, and the one by the errors of its weights.
SENSITIVITY, QUICK = "sensitivity", "quick"
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(
    epilog="Types that lose much without it (Q2_K, Q3_K_M, IQ1 to IQ3), and recipes that use them, get an "
    "importance matrix from the mix that comes with ggufrq, unless --imatrix or --calibrate is given."
)
@click.argument("model")
@click.option("--types", metavar="LIST", help="Types to make, with commas.  [default: those of --family]")
@click.option(
    "--family",
    type=click.Choice(list(core.families())),
    help="Make a family: " + "; ".join(f"{f.name}: {f.description}" for f in core.families().values()) + ".",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME|FILE",
    help="Make a recipe, shipped or your own; `sensitivity` finds the best one by measurement, `quick` a "
    "good one by the errors of the weights (GGUF).",
)
@click.option(
    "--to",
    type=click.Choice(["gguf", "mlx"]),
    default="gguf",
    show_default=True,
    help="What to make; mlx: a folder for mlx-lm for each of --bits and --recipe.",
)
@click.option(
    "--bits",
    metavar="LIST",
    help="Bits of all weights, for --to mlx, with commas.  [default: 2,3,4,5,6,8, and proposal-c]",
)
@click.option(
    "--size", metavar="SIZE", help="Budget of --recipe sensitivity or quick: bytes of the file, as 15GB."
)
@click.option("--bpw", metavar="BITS", help="Budget of --recipe sensitivity or quick: bits per weight.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the files.  [default: NAME-GGUF here, the cache for an embedded model; NAME-mlx-WHAT, "
    "NAME-mlx for several]",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be made, and what it takes.")
@click.option("--list-tensors", is_flag=True, help="Only list the type of every tensor.")
@click.option(
    "--imatrix", type=FILE, multiple=True, help="Importance matrix for all types; several are merged."
)
@click.option(
    "--calibrate",
    type=TEXT_FILE,
    multiple=True,
    metavar="TEXT",
    help="Make an importance matrix from this text; several add up.",
)
@click.option(
    "--fold",
    type=click.Choice(list(KINDS)),
    help="Rescale the model first, without changing what it computes: "
    + "; ".join(f"{kind}, {what}" for kind, what in KINDS.items())
    + ".",
)
@click.option("--split-size", metavar="SIZE", help="Split files that are larger: 5G, 500M.")
@click.option("--mmproj", is_flag=True, help="Make the vision projector, too.")
@click.option(
    "--mtp",
    type=click.Choice(core.MTP),
    default="keep",
    show_default=True,
    help="The head for further tokens: in the model, left out, or a file of its own.",
)
@click.option(
    "--pre-tokenizer", metavar="NAME", help="Declare the pre-tokenizer that llama.cpp does not know."
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--stream",
    is_flag=True,
    help="Fetch, quantize and delete a model on the Hub shard by shard: for one larger than the disk.",
)
@click.option("--requantize", is_flag=True, help="Accept a GGUF that is quantized already.")
@click.option("--no-run", is_flag=True, help="Do not run new files for a few tokens.")
@click.option("--force", is_flag=True, help="Replace files that ggufrq did not make.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def quantize(
    model: str,
    types: str | None,
    family: str | None,
    recipes: tuple[str, ...],
    dry_run: bool,
    list_tensors: bool,
    size: str | None,
    bpw: str | None,
    split_size: str | None,
    no_run: bool,
    as_json: bool,
    to: str,
    bits: str | None,
    **options: Any,
) -> None:
    """Make GGUF files of MODEL: a folder with safetensors, a Hub id, a GGUF file, or an embedded model.

    Files are checked before they get their names, and those that are there already are kept, so that the same
    command goes on after it was stopped. Beside them goes NAME-kv.gguf, the profile by which caches of our
    types keep K, made from a short text unless it is there.

    \b
    Examples:
      ggufrq quantize docs-qwen3-8m
      ggufrq quantize Qwen/Qwen3-0.6B --types Q4_K_M,Q8_0 --dry-run
      ggufrq quantize ./my-model --recipe proposal-c -o ./my-model-GGUF
      ggufrq quantize ./my-model --to mlx --bits 4
      ggufrq quantize ./my-model --to mlx --bits 3,4,8 --recipe proposal-c
    """
    if to == "mlx":
        to_mlx(
            model,
            bits,
            recipes,
            sensitivity=SENSITIVITY,
            quick=QUICK,
            size=size,
            bpw=bpw,
            split_size=split_size,
            dry_run=dry_run,
            as_json=as_json,
            **{name: options[name] for name in ("out", "revision", "fold")},
        )
        return
    if bits is not None:
        raise UsageError("--bits is for --to mlx", remedy="--types, or --recipe")
    build = require_build()
    budget = parse_budget(size, bpw)
    request = Request(
        model, (), split_size=parse_size(split_size) if split_size else None, run=not no_run, **options
    )
    recipes = tuple(dict.fromkeys(recipes))
    recipes_found: list[str | Recipe] = list(recipes)
    sought = [name for name in recipes if name in (SENSITIVITY, QUICK)]
    if budget is not None and not sought:
        raise UsageError("--size and --bpw are the budget of --recipe sensitivity or quick")
    for name in sought:
        quick = name == QUICK
        if dry_run or list_tensors:
            what, how = ("reads all weights", " --quick") if quick else ("takes measurements", "")
            raise UsageError(
                f"the recipe {name} {what}; there is no dry run of it",
                remedy=f"`ggufrq sensitivity {model} --bpw 5{how}` first, then its recipe by --recipe FILE",
            )
        recipes_found[recipes.index(name)] = solved(request, build, budget, quick=quick)
    request = replace(request, wants=core.parse_wants(chosen(types, family, recipes_found), build))
    if dry_run or list_tensors:
        plan = core.plan_family(request, build)
        if as_json:
            click.echo(json.dumps(plan_as_json(plan), indent=2))
        else:
            click.echo(render_tensors(plan) if list_tensors else render_plan(plan))
        refuse_what_does_not_fit(plan)
        return
    made = core.make_family(request, build)
    click.echo(json.dumps(as_data(made), indent=2) if as_json else render(made))


def chosen(types: str | None, family: str | None, recipes: Sequence[str | Recipe]) -> list[str | Recipe]:
    """All that is asked for; the default family when nothing is. Raises UsageError."""
    names: list[str | Recipe] = list(core.families()[family].types) if family else []
    if types is not None:
        names += [part.strip() for part in types.split(",") if part.strip()]
        if not types.strip(", "):
            raise UsageError("--types names no type", remedy=f"--types {','.join(core.DEFAULT_TYPES)}")
    names += [load(name) if isinstance(name, str) else name for name in recipes]
    return names or list(core.DEFAULT_TYPES)


def as_data(family: Family) -> dict[str, Any]:
    """The family as JSON data."""
    files = [{**asdict(made), "path": str(made.path)} for made in family.files]
    profile = None if family.profile is None else str(family.profile)
    return {
        "base": family.base,
        "source": family.source,
        "folder": str(family.folder),
        "files": files,
        "profile": profile,
    }


def render(family: Family) -> str:
    """The family as a table of plain text: name, type, size, bits per weight."""
    head = ("file", "type", "size", "bits/weight", "")
    rows = [
        (made.name, made.type, size_text(made.bytes), f"{made.bits:.2f}", note(made)) for made in family.files
    ]
    if family.profile is not None:
        size = size_text(family.profile.stat().st_size)
        rows.append((family.profile.name, "kv-profile", size, "", "for rotated types"))
    return f"{table.render(head, rows, 'llrrl')}\nin {family.folder}"


def note(made: Made) -> str:
    """What is special about a file."""
    notes = [f"{made.fold} folded"] if made.fold else []
    notes += ["imatrix"] if made.imatrix else []
    notes += [f"{len(made.parts)} parts"] if len(made.parts) > 1 else []
    notes += [larger(made.fallbacks)] if made.fallbacks else []
    notes += [f"{made.codes} tensors stay as they were"] if made.codes else []
    notes += [] if made.fresh else ["kept"]
    return ", ".join(notes)

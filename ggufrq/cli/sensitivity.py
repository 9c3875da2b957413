"""``ggufrq sensitivity``: what quantizing each part of a model costs, and the best recipe under a budget."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ggufrq.base import log, paths, texts
from ggufrq.base.errors import UsageError
from ggufrq.base.progress import progress
from ggufrq.base.sizes import parse_memory, parse_size, parse_tokens, size_text
from ggufrq.build.builds import require_build
from ggufrq.build.project import Build
from ggufrq.cache.cases import parse_cases
from ggufrq.cache.kv import DEFAULT_KV, Sought
from ggufrq.cli.out_options import RECIPE, OutFile, require_folder
from ggufrq.cli.text_options import TEXT_FILE
from ggufrq.make.plan import Request
from ggufrq.make.recipe import Recipe, dump
from ggufrq.measure.weight_quality import WeightSettings
from ggufrq.search.sensitivity import best_recipe, report
from ggufrq.search.sensitivity.parts import BY, DEFAULT_TYPES, parse_types
from ggufrq.search.sensitivity.solve import Budget
from ggufrq.search.sensitivity.trials import LOG

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("model")
@click.option("--size", metavar="SIZE", help="Bytes of the file, at most: 15GB, 500M, or a plain number.")
@click.option("--bpw", metavar="BITS", help="Bits per weight, at most.")
@click.option("--vram", metavar="SIZE", help="Memory of a GPU, cache included; the rest goes to the CPU.")
@click.option("--ram", metavar="SIZE", help="With --vram: memory for what stays with the CPU.")
@click.option(
    "--kv", default=DEFAULT_KV, show_default=True, metavar="TYPES", help="Cache that --vram holds, too."
)
@click.option("--kv-ctx", default="8K", show_default=True, metavar="N", help="Context of that cache, as 32K.")
@click.option(
    "--by",
    type=click.Choice(BY),
    default=BY[0],
    show_default=True,
    help="Choose a type for each class of tensors, each class in each range of layers, or each tensor.",
)
@click.option(
    "--ranges",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Ranges of layers for --by layer.",
)
@click.option(
    "--types",
    metavar="LIST",
    help=f"Types to choose from.  [default: {','.join(DEFAULT_TYPES)} and the model's own]",
)
@click.option("--imatrix", type=_FILE, help="Importance matrix, as llama-imatrix writes it.")
@click.option("--calibrate", type=TEXT_FILE, metavar="TEXT", help="Make an importance matrix from this text.")
@click.option("--text", type=TEXT_FILE, help="Text to choose on.  [default: the calibration text of ggufrq]")
@click.option(
    "--check-text", type=TEXT_FILE, help="Another text, to check on.  [default: the held-out text of ggufrq]"
)
@click.option(
    "--ctx", "n_ctx", type=click.IntRange(min=16), default=512, show_default=True, help="Tokens of a chunk."
)
@click.option(
    "--chunks", type=click.IntRange(min=1), default=16, show_default=True, help="Chunks of each text."
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    help="Measurements at once.  [default: one per core; 1 for large models]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=0),
    default=best_recipe.Goal.rounds,
    show_default=True,
    help="Rounds of eight neighbours of the best recipe that are measured, at most.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Choose by the errors of the weights alone, in a minute: nothing is measured.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the converted model and the matrix, as of quantize -o.",
)
@click.option(
    "-o",
    "--out",
    type=OutFile(RECIPE),
    metavar="FILE",
    help="Write the recipe to FILE.  [default: MODEL-sensitivity-BUDGET.toml here]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def sensitivity(
    model: str,
    size: str | None,
    bpw: str | None,
    vram: str | None,
    ram: str | None,
    kv: str,
    kv_ctx: str,
    types: str | None,
    n_ctx: int,
    chunks: int,
    folder: Path | None,
    out: Path | None,
    as_json: bool,
    imatrix: Path | None,
    calibrate: Path | None,
    revision: str | None,
    **options: Any,
) -> None:
    """Measure what quantizing each part of MODEL costs, and find the best recipe under a budget.

    One part is quantized at a time. With --size or --bpw the recipe with the least loss is found, written
    for `ggufrq quantize --recipe FILE`, and checked on a text that had no part in the choice. What was
    measured is kept: a run that was stopped goes on, and another budget takes a few new measurements.

    With --quick the budget is spent by the errors that the weights have in each type, under the importance
    matrix: a good recipe in a minute, where measuring takes hours. Measuring begins with it, too, and falls
    back on it where the disk has no room for a file to measure.

    \b
    Examples:
      ggufrq sensitivity docs-qwen3-8m --bpw 5
      ggufrq sensitivity docs-qwen3-8m --bpw 5 --quick
      ggufrq sensitivity ./my-model --size 15GB --by layer
      ggufrq sensitivity ./my-moe --quick --vram 24GB --ram 64GB --kv iso3 --kv-ctx 32K
    """
    _refuse_idle(
        {
            "--quick measures nothing": ("text", "check_text", "n_ctx", "chunks", "jobs", "rounds")
            if options["quick"]
            else (),
            "there is no --vram": ("kv", "kv_ctx") if vram is None else (),
            "--by is not layer": ("ranges",) if options["by"] != "layer" else (),
            "there is no budget": ("out", "rounds", "check_text") if (size, bpw, vram) == (None,) * 3 else (),
        }
    )
    budget = parse_budget(size, bpw)
    if budget is not None and vram is not None:
        raise UsageError("--vram is a budget of its own", remedy="without --size and --bpw")
    if (ram is None) != (vram is None):
        raise UsageError("--vram and --ram are one budget", remedy="both of them, or --size SIZE")
    if vram is not None and ram is not None:
        budget = two_memories(
            model, revision, parse_memory(vram), parse_memory(ram), kv, parse_tokens(kv_ctx)
        )
    goal = best_recipe.Goal(
        budget=budget,
        types=parse_types(types) if types is not None else None,
        settings=WeightSettings(n_ctx, chunks),
        **options,
    )
    build = require_build()
    request = Request(
        model,
        (),
        folder,
        imatrix=(imatrix,) if imatrix is not None else (),
        calibrate=(calibrate,) if calibrate is not None else (),
        revision=revision,
    )
    if out is None and budget is not None:
        require_folder(Path())  # where the recipe goes, whose name is not known yet
    result = analyse(request, build, goal)
    if as_json:
        click.echo(texts.to_json(report.as_json(result, goal, build), indent=1))
    else:
        again = f"\n\n{report.reproduction(result, build)}" if result.command else ""
        click.echo(f"{report.render(result, goal)}{again}")
    if result.found is not None:
        path = out or Path(f"{result.base}-{result.found.recipe.name}.toml")
        paths.atomic_write(path, dump(result.found.recipe))
        command = ["ggufrq", "quantize", model, "--recipe", str(path)]
        command += ["-o", str(folder)] if folder is not None else []
        command += ["--imatrix", str(imatrix)] if imatrix is not None else []
        command += ["--calibrate", str(calibrate)] if calibrate is not None else []
        command += ["--revision", revision] if revision is not None else []
        click.echo(f"\nwrote {path}; make the file by\n  {shlex.join(command)}", err=as_json)


def _refuse_idle(reasons: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError for an option that was given and would have no effect: their names by the reason."""
    context = click.get_current_context()
    options = {option.name: option.opts[-1] for option in context.command.params}
    for why, names in reasons.items():
        for name in names:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                said = options[name]
                raise UsageError(f"{said} has no effect here: {why}", remedy=f"without {said}")


def solved(request: Request, build: Build, budget: Budget | None, *, quick: bool = False) -> Recipe:
    """The recipe ``sensitivity`` for the model of a request, by measurement, or ``quick``, by the errors of
    its weights. Raises UsageError without a budget, and as ``best_recipe.analyse``."""
    if budget is None:
        name = "quick" if quick else "sensitivity"
        raise UsageError(
            f"the recipe {name} is made for a budget", remedy=f"--recipe {name} --bpw 5, or --size 15GB"
        )
    found = analyse(request, build, best_recipe.Goal(budget, quick=quick)).found
    assert found is not None
    if found.checked:
        measured = found.checked[0].measured
        log.say(f"{found.recipe.name}: mean KLD {measured.kld:.5f} ± {measured.kld_err:.5f}")
    return found.recipe


def parse_budget(size: str | None, bpw: str | None) -> Budget | None:
    """The budget that the options name, None without one. Raises UsageError."""
    if size is not None and bpw is not None:
        raise UsageError("a budget is a size or bits per weight, not both", remedy="--size or --bpw")
    if size is not None:
        return Budget(size=parse_size(size))
    if bpw is None:
        return None
    try:
        bits = Fraction(bpw)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"'{bpw}' is no number of bits", remedy="--bpw 5.25") from None
    if not 0 < bits <= 32:
        raise UsageError(f"{bpw} bits per weight are out of range", remedy="--bpw 5.25")
    return Budget(bpw=bits)


def two_memories(model: str, revision: str | None, vram: int, ram: int, kv: str, ctx: int) -> Budget:
    """The budget of a GPU's memory of ``vram`` bytes and of ``ram`` for the rest; with room on the first for
    a cache of these types and ``ctx`` tokens, and what llama.cpp computes in. Raises UsageError for types
    that the model's cache cannot have."""
    from ggufrq.ggufs.memory_shape import memory_shape
    from ggufrq.memory import metadata
    from ggufrq.memory.cells import ContextSettings
    from ggufrq.memory.compute import DryRun
    from ggufrq.memory.estimate import Memory
    from ggufrq.models.resolve import resolve

    build = require_build()
    headers = metadata.read(resolve(model, original=True), build, revision).headers
    cases = parse_cases(kv, Sought.AUTO, None, None)
    if len(cases) != 1:
        raise UsageError(
            f"weights are chosen beside one cache, and {kv} are {len(cases)}", remedy=f"--kv {cases[0].name}"
        )
    case = cases[0]
    with DryRun(headers, build) as dry:
        beside = Memory(memory_shape(headers), 0, dry.buffers).estimate(case.plan, ContextSettings(ctx))
    if beside.why_not is not None:
        raise UsageError(beside.why_not, remedy="--kv with other types")
    log.say(f"beside the weights {case.name} takes {size_text(beside.total)} for {ctx:,} tokens")
    return Budget(rooms=(vram, ram), beside=beside.total)


def analyse(request: Request, build: Build, goal: best_recipe.Goal) -> best_recipe.Result:
    """``best_recipe.analyse``, with its progress shown."""
    log_path = paths.logs_dir() / LOG
    log_path.unlink(missing_ok=True)
    with ExitStack() as stack:

        class Bar(progress):
            def expect(self, total: int) -> None:
                if self.total is None:  # only now: converting and the matrix have bars of their own
                    stack.enter_context(self)
                super().expect(total)

        bar = Bar("Weights", unit="tensors") if goal.quick else Bar("Measuring", unit="runs")
        result = best_recipe.analyse(request, build, goal, bar)
    if result.command:
        log.say(f"log of all that ran: {log_path}")
    return result

"""``ggufrq demo``: the main job from start to end, on the models that come with ggufrq."""

from __future__ import annotations

from pathlib import Path

import click

from ggufrq.base import log
from ggufrq.build.builds import ensure_build
from ggufrq.cli.out_options import JSON, OutFile
from ggufrq.cli.quantize import render as render_family
from ggufrq.flows import demo as core


@click.command()
@click.option(
    "--json",
    "json_file",
    type=OutFile(JSON),
    metavar="FILE",
    help="Write the tables to FILE as JSON.",
)
@click.option(
    "--models", metavar="LIST", help="Models to measure, with commas.  [default: both embedded models]"
)
@click.option(
    "--kv",
    metavar="LIST",
    help="Cache types to measure, with commas; K/V apart: iso3/planar4; with a rotation mode: iso3:block.  "
    "[default: f16, q8_0, q4_0, ours of 2 to 4 bits, iso3:block]",
)
@click.option(
    "--quick", is_flag=True, help="A short text and short runs: rough figures in well under a minute."
)
@click.option("--fresh", is_flag=True, help="Measure anew what is known from an earlier run.")
def demo(json_file: Path | None, models: str | None, kv: str | None, quick: bool, fresh: bool) -> None:
    """Build llama.cpp, quantize the embedded models, run one, and measure every cache type.

    What is there already is not done again, so that a demo that was stopped goes on from there.

    \b
    Examples:
      ggufrq demo
      ggufrq demo --quick --kv f16,iso3 --json table.json
    """
    todo = core.plan(models, kv, quick=quick, fresh=fresh)
    build = ensure_build()
    log.say(f"llama.cpp with the cache types: {build.bin}")
    for family in core.families(todo.models, build):
        click.echo(render_family(family) + "\n")
    given, cache = core.answer(todo.models[0], build)
    click.echo(core.render_answer(todo.models[0], given, cache) + "\n")
    rows = core.measure_all(todo, build)
    for name, of_model in rows.items():
        click.echo(f"{name}\n{core.render(of_model)}\n")
    click.echo(core.caption(rows[todo.models[-1]]))
    if json_file is not None:
        core.write_json(json_file, rows)
        log.say(f"wrote {json_file}")

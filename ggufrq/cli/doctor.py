"""``ggufrq doctor``: a table of what is there and what is missing."""

from __future__ import annotations

import json

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ggufrq.build import doctor as examination
from ggufrq.build.builds import usable_build

_STYLES = {"ok": "green", "missing": "bold red", "todo": "yellow", "optional": "dim"}
_WORDS = {"ok": "ok", "missing": "missing", "todo": "to do", "optional": "optional"}


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def doctor(ctx: click.Context, model: str | None, as_json: bool) -> None:
    """Say what is there, what is missing, and the command that mends it; and with MODEL which types its KV
    cache can be kept in, by its header alone.

    Exits with 1 when something is missing that a build or run needs.

    \b
    Examples:
      ggufrq doctor
      ggufrq doctor model.gguf
    """
    checks = examination.examine()
    if model is not None:
        checks.append(_of_model(model))
    good = examination.healthy(checks)
    if as_json:
        report = {"healthy": good, "checks": [check.to_json() for check in checks]}
        click.echo(json.dumps(report, indent=2))
    else:
        _render(checks)
    if not good:
        ctx.exit(1)


def _of_model(model: str) -> examination.Check:
    from ggufrq.memory import metadata
    from ggufrq.models.resolve import resolve

    build = usable_build()
    header = metadata.read(resolve(model), build).headers[0]
    return examination.of_model(model, header.values, gpu=build is not None and build.lacks_five_bits)


def _render(checks: list[examination.Check]) -> None:
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        table.add_row(
            Text(_WORDS[check.state], style=_STYLES[check.state]), Text(check.name), Text(check.found)
        )
    console.print(table)
    # Commands stand below the table, one per line and never wrapped, so that they can be copied.
    mending = [check for check in checks if check.remedy]
    if mending:
        console.print("\nTo mend:")
        for check in mending:
            console.print(
                Text(f"  {check.remedy}   # {check.name}"),
                soft_wrap=True,
                no_wrap=True,
                overflow="ignore",
                crop=False,
            )

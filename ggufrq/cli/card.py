"""``ggufrq card``: the model card of a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ggufrq.base import log, paths, texts
from ggufrq.build.builds import require_build
from ggufrq.card import mlx
from ggufrq.card.compose import Card, Wishes, make, parse_sibling
from ggufrq.cli.text_options import TEXT


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--repo", type=TEXT, metavar="USER/NAME", help="Where it will be published: for links and quantized_by."
)
@click.option(
    "--base-model", type=TEXT, metavar="USER/NAME", help="The original model.  [default: what the files say]"
)
@click.option("--license", type=TEXT, metavar="ID", help="Its licence.  [default: what the files say]")
@click.option(
    "--quantized-by", type=TEXT, metavar="NAME", help="Who made the files.  [default: that of --repo]"
)
@click.option(
    "--sibling", "siblings", multiple=True, metavar="DIR=USER/NAME", help="Another repository of the family."
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A report.json of `ggufrq validate`.  [default: those in folders of DIR]",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave out files with such names; more than once."
)
@click.option("--measure", is_flag=True, help="Measure weights and caches first; what is known is kept.")
@click.option("--quick", is_flag=True, help="With --measure: rough figures from short runs.")
@click.option("--no-run", is_flag=True, help="Do not run the quickstarts; they are labelled so.")
@click.option("--force", is_flag=True, help="Replace a README.md that ggufrq did not write.")
@click.option("--dry-run", is_flag=True, help="Print the card instead of writing it.")
@click.option("--json", "as_json", is_flag=True, help="Print what the card says as JSON.")
def card(
    folder: Path, siblings: tuple[str, ...], no_run: bool, dry_run: bool, as_json: bool, **wishes: Any
) -> None:
    """Write README.md, the model card, for what `ggufrq quantize` made in DIR: a family, a model for mlx, or
    several of them, each of which gets its own; --repo is then followed by `-4bit` and the like.

    From metadata, from measurements (`ggufrq validate`, or --measure), and from commands that are run on the
    smallest file before they are printed. Where nothing was measured it says so. Your own text between the
    marks in the card is kept when it is written anew, and so are keys that you add to its head.

    \b
    Examples:
      ggufrq card Qwen3-0.6B-GGUF --repo me/Qwen3-0.6B-GGUF --license apache-2.0
      ggufrq card Qwen3-0.6B-GGUF --repo me/Qwen3-0.6B-GGUF --measure --quick
    """
    said = Wishes(siblings=tuple(map(parse_sibling, siblings)), run=not no_run, **wishes)
    family = mlx.members(folder)
    cards: list[Card | mlx.MlxCard] = []
    if family:
        cards += mlx.make_family(family, said)
    else:
        cards.append(mlx.make(folder, said) if mlx.is_mlx(folder) else make(folder, require_build(), said))
    for made in cards:
        if not dry_run:
            paths.atomic_write(made.path, made.text)
            log.say(f"wrote {made.path}")
        elif not as_json:
            click.echo(made.text, nl=False)
        if made.not_measured:
            hint = "" if said.measure else "; --measure fills them"
            log.say(f"{made.not_measured} cells say 'not measured'{hint}")
    if as_json:
        data = [made.as_data() for made in cards]
        click.echo(texts.to_json(data if family else data[0], indent=2, default=str))

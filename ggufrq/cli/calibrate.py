"""``ggufrq calibrate``: the means of K that are subtracted before K is stored."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ggufrq.base import paths, table
from ggufrq.build.builds import require_build
from ggufrq.cache.kv import parse_kv
from ggufrq.make.ready import model_file
from ggufrq.measure import calibrate as core

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("model")
@click.argument("text", required=False, type=FILE)
@click.option(
    "-o",
    "--out",
    default="kv-calib.gguf",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.",
)
@click.option(
    "--kv", default="iso3", show_default=True, metavar="TYPE", help="Cache type of K: its rotation matters."
)
@click.option(
    "--ctx", "n_ctx", default=2048, show_default=True, type=click.IntRange(128), help="Tokens per chunk."
)
@click.option("--chunks", default=8, show_default=True, type=click.IntRange(1), help="Chunks of the text.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate(
    model: str,
    text: Path | None,
    out: Path,
    kv: str,
    n_ctx: int,
    chunks: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Take the means of K of MODEL over TEXT, for a cache that stores K without them.

    Pays where K has a large constant part, as in Qwen2.5: the table says how large. The file serves all
    quantizations of the model, and cache types of the same rotation (iso2, iso3, iso4). TEXT is one that
    comes with ggufrq unless given; use what the model will read, and a context as long as it will be.

    \b
    Examples:
      ggufrq calibrate model.gguf wiki.txt -o kv-calib.gguf
      ggufrq run model.gguf -p "…" --kv iso3 --kv-profile kv-calib.gguf
    """
    made = core.calibrate(
        model_file(model),
        text or paths.data_dir("texts") / "calibration.txt",
        out,
        require_build(),
        k_type=parse_kv(kv).k,
        mode=core.mode_of_k(),
        n_ctx=n_ctx,
        chunks=chunks,
        threads=threads,
    )
    click.echo(json.dumps(as_data(made), indent=2) if as_json else render(made))


def as_data(made: core.Calibration) -> dict[str, object]:
    """The result as JSON data."""
    return {
        "file": str(made.path),
        "model": str(made.model),
        "k_rotation": made.rotation,
        "tokens": made.tokens,
        "constant_share": made.share,
        "layers": [{"layer": layer.layer, "constant_share": layer.share} for layer in made.layers],
    }


def render(made: core.Calibration) -> str:
    """The result as a table of plain text: the share of the squared length of K that is constant."""
    rows = [(str(layer.layer), f"{100 * layer.share:.1f}") for layer in made.layers]
    return (
        f"{table.render(('layer', 'constant part of K, %'), rows, 'rr')}\n"
        f"{100 * made.share:.1f} % on average over {made.tokens:,} tokens, rotation {made.rotation}\n"
        f"use it by --kv-profile {made.path}"
    )

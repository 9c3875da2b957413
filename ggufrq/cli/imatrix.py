"""``ggufrq imatrix``: importance matrices made, merged and shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from ggufrq.base import log, table
from ggufrq.build.builds import require_build
from ggufrq.cli.out_options import MATRIX, OutFile
from ggufrq.cli.text_options import TEXT_FILE
from ggufrq.ggufs import imatrix as core

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def imatrix() -> None:
    """Make, merge and show importance matrices, which tell a quantizer what matters.

    `ggufrq quantize` makes one by itself where a type needs it, and keeps it beside its files.
    """


@imatrix.command()
@click.argument("model")
@click.option("-o", "--out", type=OutFile(MATRIX), required=True, help="The file to write.")
@click.option(
    "--text",
    "texts",
    type=TEXT_FILE,
    multiple=True,
    help="Calibration text; several add up.  [default: the mix that comes with ggufrq]",
)
@click.option(
    "--chunks",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Chunks of 512 tokens of each text, at most.",
)
def make(model: str, out: Path, texts: tuple[Path, ...], chunks: int) -> None:
    """Make the matrix of MODEL, a GGUF file or an embedded model; when stopped, the same command goes on.

    \b
    Examples:
      ggufrq imatrix make model-BF16.gguf -o model-imatrix.gguf
      ggufrq imatrix make docs-qwen3-8m --text chat.txt --text code.txt -o both.gguf
    """
    from ggufrq.make import matrix
    from ggufrq.make.ready import model_file

    build = require_build()
    matrix.make_alone(model_file(model, original=True), out, texts, build, chunks)
    log.say(f"wrote {out}")


@imatrix.command()
@click.argument("files", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=OutFile(MATRIX), required=True, help="The file to write.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Merge matrices of one model, as if their texts had been one.

    \b
    Example:
      ggufrq imatrix merge chat.gguf code.gguf -o both.gguf
    """
    core.write(core.merge([core.read(path) for path in files], [path.name for path in files]), out)
    log.say(f"wrote {out}")


@imatrix.command()
@click.argument("file", type=_FILE)
@click.option("--top", type=click.IntRange(1), metavar="N", help="Only the N tensors with the largest sums.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(file: Path, top: int | None, as_json: bool) -> None:
    """Show what is in a matrix, tensor by tensor, those with the largest activations first.

    --json has all digits, and the means, columns and tokens of each tensor.

    \b
    Example:
      ggufrq imatrix show model-imatrix.gguf --top 20
    """
    matrix = core.read(file)
    rows = core.statistics(matrix)[:top]
    if as_json:
        facts = {"datasets": matrix.datasets, "chunks": matrix.chunks, "chunk_size": matrix.chunk_size}
        click.echo(json.dumps({**facts, "tensors": [asdict(row) for row in rows]}, indent=2))
        return
    head = ("tensor", "sum", "max", "deviation", "active", "entropy", "unseen")
    body = [
        (
            row.tensor.removesuffix(".weight"),
            *(f"{value:.3g}" for value in (row.total, row.largest, row.deviation)),
            f"{100 * row.active:.1f} %",
            f"{100 * row.entropy:.1f} %",
            f"{row.unseen}/{row.experts}" if row.unseen else "",
        )
        for row in rows
    ]
    some = any(row.unseen for row in rows)
    shown = len(head) if some else len(head) - 1
    click.echo(f"{', '.join(matrix.datasets)}: {matrix.chunks} chunks of {matrix.chunk_size} tokens")
    click.echo(table.render(head[:shown], [row[:shown] for row in body], "lrrrrrr"[:shown]))
    click.echo("of the activations' mean squares by column")
    click.echo("entropy: of their shares, 100 % when all columns matter alike")
    if some:
        click.echo("unseen: experts that no token came to")

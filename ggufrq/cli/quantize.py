"""``ggufrq quantize``: a family of GGUF files from one model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from ggufrq import quantize as core
from ggufrq import table
from ggufrq.build import require_build


@click.command(
    epilog="Types that lose much without it (Q2_K, Q3_K_M, IQ1 to IQ3) get an importance matrix from the "
    "calibration text that comes with ggufrq, unless --imatrix gives one."
)
@click.argument("model")
@click.option(
    "--types",
    default=",".join(core.DEFAULT_TYPES),
    show_default=True,
    metavar="LIST",
    help="Types to make, with commas between them.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the files.  [default: NAME-GGUF here; the cache for an embedded model]",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Importance matrix for all types, as llama-imatrix writes it.",
)
@click.option(
    "--pre-tokenizer", metavar="NAME", help="Declare the pre-tokenizer that llama.cpp does not know."
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--requantize", is_flag=True, help="Accept a GGUF that is quantized already.")
@click.option("--force", is_flag=True, help="Replace files that ggufrq did not make.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def quantize(
    model: str,
    types: str,
    out: Path | None,
    imatrix: Path | None,
    pre_tokenizer: str | None,
    revision: str | None,
    requantize: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make GGUF files of MODEL: a folder with safetensors, a Hub id, a GGUF file, or an embedded model.

    Files are checked before they get their names, and those that are there already are kept, so that the same
    command goes on after it was stopped.

    \b
    Examples:
      ggufrq quantize docs-qwen3-8m
      ggufrq quantize Qwen/Qwen3-0.6B --types Q4_K_M,Q8_0
      ggufrq quantize ./my-model --types Q2_K -o ./my-model-GGUF
    """
    build = require_build()
    family = core.make_family(
        model,
        core.parse_types(types, build),
        build,
        out=out,
        imatrix=imatrix,
        pre_tokenizer=pre_tokenizer,
        revision=revision,
        requantize=requantize,
        force=force,
    )
    if as_json:
        files = [{**asdict(made), "path": str(made.path)} for made in family.files]
        click.echo(json.dumps({"base": family.base, "source": family.source, "files": files}, indent=2))
    else:
        click.echo(render(family))


def render(family: core.Family) -> str:
    """The family as a table of plain text: name, type, size, bits per weight."""
    head = ("file", "type", "size", "bits/weight", "")
    rows = [
        (made.name, made.type, size_text(made.bytes), f"{made.bits:.2f}", note(made)) for made in family.files
    ]
    return f"{table.render(head, rows, 'llrrl')}\nin {family.folder}"


def note(made: core.Made) -> str:
    """What is special about a file."""
    notes = ["imatrix"] if made.imatrix else []
    notes += [] if made.fresh else ["kept"]
    return ", ".join(notes)


def size_text(size: int) -> str:
    """Bytes as MB or GB, decimal, as the Hub shows them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

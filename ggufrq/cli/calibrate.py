"""``ggufrq calibrate``: a profile of K from a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ggufrq.base import log, paths, table
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.build.builds import require_build
from ggufrq.cli.out_options import PROFILE, OutFile, require_writable
from ggufrq.cli.text_options import TEXT_FILE
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.ggufs.header import read_header
from ggufrq.make.ready import model_file
from ggufrq.measure import calibrate as core
from ggufrq.models.names import names_beside


def _means_nothing(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise UsageError(
            "a profile serves all cache types and rotations, so --kv means nothing here any more",
            remedy="ggufrq calibrate MODEL TEXT, without --kv",
        )


@click.command()
@click.argument("model")
@click.argument("text", required=False, type=TEXT_FILE)
@click.option(
    "-o",
    "--out",
    type=OutFile(PROFILE),
    help="The file to write.  [default: NAME-kv.gguf beside the model, where it is found by name]",
)
@click.option(
    "--positions",
    type=click.IntRange(1),
    help="Positions that K is averaged over: the longest context that will be used.  [default: the model's "
    "own, 32768 at most]",
)
@click.option(
    "--ctx",
    "n_ctx",
    default=core.CHUNK_SIZE,
    show_default=True,
    type=click.IntRange(16),
    help="Tokens per chunk of the text.",
)
@click.option(
    "--chunks", default=core.CHUNKS, show_default=True, type=click.IntRange(1), help="Chunks of the text."
)
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads.  [default: one per core]")
@click.option("--kv", hidden=True, expose_value=False, callback=_means_nothing)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate(
    model: str,
    text: Path | None,
    out: Path | None,
    positions: int | None,
    n_ctx: int,
    chunks: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make the profile by which K of MODEL is kept from TEXT, not from the weights alone.

    The file is the model's own, whatever its quantization, and serves all cache types of ours. Moments are
    taken before RoPE and averaged over all positions, so a short text serves long contexts. TEXT is one that
    comes with ggufrq unless given; use what the model will read. The table says what is gained on text that
    was held out. A run that was stopped goes on.

    \b
    Examples:
      ggufrq calibrate model.gguf wiki.txt
      ggufrq calibrate model.gguf wiki.txt -o kv.gguf --chunks 16
      ggufrq run model.gguf -p "…" --kv iso3 --kv-profile kv.gguf
    """
    file = model_file(model)
    beside = file.parent / next(names_beside(file))
    if out is None:
        if beside.exists():
            _refuse_another(beside, file)
        require_writable(beside, PROFILE)
    made = core.profile_from_text(
        file,
        text or paths.data_dir("texts") / "calibration.txt",
        require_build(),
        positions=positions,
        n_ctx=n_ctx,
        chunks=chunks,
        threads=threads,
    )
    found = out is None
    out = out or beside
    made.profile.write(out)
    log.say(f"{out}: {len(made.profile.layers)} layers from {made.tokens:,} tokens")
    click.echo(json.dumps(as_data(made, file, out), indent=2) if as_json else render(made, out, found=found))


def _refuse_another(beside: Path, model: Path) -> None:
    """Raises UsageError where a file that was not asked for would be lost."""
    try:
        of_model = read_header(beside).values.get("rq.profile.model")
    except ModelError:
        of_model = None
    if of_model != fingerprint(model):
        raise UsageError(f"{beside} is there, and no profile of {model.name}", remedy="-o FILE, another name")


def as_data(made: core.Calibration, model: Path, out: Path) -> dict[str, Any]:
    """The result as JSON data."""
    return {
        "file": str(out),
        "model": str(model),
        "positions": made.profile.n_ctx,
        "tokens": made.tokens,
        "held_out": made.held,
        "noise": [
            {
                "first": gain.first,
                "last": gain.last,
                "none": 1.0,
                "weights": gain.weights,
                "text": gain.text,
                "layers": [
                    {"layer": il, "weights": weights, "text": text}
                    for il, (weights, text) in sorted(gain.layers.items())
                ],
            }
            for gain in made.gains
        ],
    }


def render(made: core.Calibration, out: Path, *, found: bool) -> str:
    """The result as plain text: the foretold noise of scores by positions and profiles, and how to use it."""
    use = f"run, serve and validate find {out.name} by its name" if found else f"use it by --kv-profile {out}"
    if not made.gains:
        return f"the text is too short to hold a part out and tell what is gained\n{use}"
    rows = [
        (
            f"{gain.first:,}-{gain.last:,}",
            "1",
            "-" if gain.weights is None else f"{gain.weights:.3f}",
            f"{gain.text:.3f}",
        )
        for gain in made.gains
    ]
    return (
        f"{table.render(('positions', 'no profile', 'from the weights', 'from this text'), rows, 'lrrr')}\n"
        f"foretold noise of attention scores on {made.held:,} tokens held out; the profile is from all "
        f"{made.tokens:,}\n{use}"
    )

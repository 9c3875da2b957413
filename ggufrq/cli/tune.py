"""``ggufrq tune``: the best cache types, layer by layer, within a budget."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import click

from ggufrq.base import log, paths, texts
from ggufrq.base.progress import progress
from ggufrq.build.builds import require_build
from ggufrq.cache.kv import Sought
from ggufrq.cli.cache_options import exact_options, profile_option
from ggufrq.cli.out_options import JSON, OutFile
from ggufrq.cli.text_options import TEXT_FILE
from ggufrq.make.ready import model_file, weights_of
from ggufrq.measure.base_run import Scored
from ggufrq.measure.cost import subject
from ggufrq.models.resolve import resolve
from ggufrq.search.tune import layers, report

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


_RECENT, _FIRST = exact_options(
    "Newest tokens in f16 beside types of ours, which the budget does not count.",
    "First tokens of each sequence in f16, likewise.",
)


@click.command()
@click.argument("model")
@click.option("--budget", default=3.5, show_default=True, help="Bits per value of K and V, at most.")
@click.option(
    "--types", default="iso2,iso3,iso4,q8_0", show_default=True, metavar="LIST", help="Types to choose from."
)
@click.option("--text", type=TEXT_FILE, help="Text to tune on.  [default: the calibration text of ggufrq]")
@click.option(
    "--check-text", type=TEXT_FILE, help="Another text, to check on.  [default: the held-out text of ggufrq]"
)
@click.option("--ctx", "n_ctx", default=2048, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", default=4, show_default=True, help="Chunks of each text.")
@click.option("-t", "threads", type=int, help="Threads.  [default: one per core]")
@profile_option(
    "Metric of K in types of ours: a file, one made from the weights, or none.  [default: NAME-kv.gguf "
    "beside the model, or else one from a short text]"
)
@_RECENT
@_FIRST
@click.option(
    "--json",
    "json_file",
    type=OutFile(JSON),
    metavar="FILE",
    help="Write all figures to FILE as JSON.",
)
@click.option("--fresh", is_flag=True, help="Measure anew what is known from an earlier run.")
def tune(
    model: str,
    budget: float,
    types: str,
    text: Path | None,
    check_text: Path | None,
    n_ctx: int,
    chunks: int,
    threads: int | None,
    kv_profile: Path | Sought | None,
    kv_recent: int | None,
    kv_first: int | None,
    json_file: Path | None,
    fresh: bool,
) -> None:
    """Find the best types for K and V of every layer of MODEL within a budget, by measurement.

    Prints them as --kv takes them, and what they are worth beside uniform caches, on a text that had no
    part in the choice. What was measured is kept: a run that was stopped goes on.

    \b
    Examples:
      ggufrq tune docs-qwen3-8m --budget 3.5
      ggufrq tune model.gguf --budget 4 --types iso3,iso4,q8_0 --json tune.json
    """
    folder = paths.data_dir("texts")
    goal = layers.Goal(
        Fraction(str(budget)),
        layers.parse_types(types),
        text or folder / "calibration.txt",
        check_text or folder / "heldout.txt",
        Scored(n_ctx, chunks, threads=threads),
        kv_profile,
        kv_recent,
        kv_first,
    )
    build = require_build()
    measured = subject(resolve(model).name, model_file(model), weights_of(model))
    log_path = paths.logs_dir() / "tune.log"
    log_path.unlink(missing_ok=True)
    with progress("Tuning", unit="runs") as bar:
        result = layers.tune(measured, build, goal, fresh=fresh, log=log_path, listener=bar)
    click.echo(report.render(result, measured, goal))
    if json_file is not None:
        data = texts.to_json(report.as_json(result, measured, goal), indent=1)
        paths.atomic_write(json_file, data + "\n")
        log.say(f"wrote {json_file}")
    log.say(f"log of all that ran: {log_path}")

"""``ggufrq advise``: which cache for a model, by measurement."""

from __future__ import annotations

from pathlib import Path

import click

from ggufrq.advise import ladder
from ggufrq.base import log, paths, sizes, texts
from ggufrq.base.errors import UsageError
from ggufrq.base.progress import progress
from ggufrq.build.builds import require_build
from ggufrq.cache.cases import parse_cases
from ggufrq.cache.kv import Sought
from ggufrq.cli.text_options import TEXT_FILE
from ggufrq.drive.cache_check import held_cases
from ggufrq.measure.divergence import subject_of

_CTX = "8K"


@click.command()
@click.argument("model")
@click.option(
    "--loss",
    type=click.FloatRange(0, min_open=True),
    default=ladder.LOSS,
    show_default=True,
    metavar="KLD",
    help="Recommend the smallest cache with at most this mean KLD (nats).",
)
@click.option(
    "--fits", metavar="SIZE", help="Recommend what loses least with the whole model in 2GiB, or 24GB."
)
@click.option(
    "--ctx", default=_CTX, show_default=True, metavar="N", help="Context that sizes are for, as 8K or 32K."
)
@click.option(
    "--kv",
    default=ladder.DEFAULT_KV,
    show_default=True,
    metavar="LIST",
    help="Caches to measure beside f16, with commas: iso3; planar4; K/V apart iso3/planar4; with layers that "
    "differ 'iso3; 0,-1:q8_0'.",
)
@click.option("--chunks", type=click.IntRange(1), default=2, show_default=True, help="Parts of the text.")
@click.option(
    "--text",
    type=TEXT_FILE,
    help="Text that the model has not seen.  [default: the held-out text that comes with ggufrq]",
)
@click.option("-t", "threads", type=click.IntRange(1), help="Threads.  [default: one per core]")
@click.option("--fresh", is_flag=True, help="Measure anew what is known from an earlier run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def advise(
    model: str,
    loss: float,
    fits: str | None,
    ctx: str,
    kv: str,
    chunks: int,
    text: Path | None,
    threads: int | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Measure what caches take and lose on MODEL, and recommend one.

    Caches of our types are measured as `ggufrq run` keeps them, with a profile and with the newest and first
    tokens in f16 where the device can hold them. The result is kept: `ggufrq run` and `serve` take the
    recommendation with --kv auto, and warn of a type that was measured as ruinous. What is known from an
    earlier run is not measured again.

    \b
    Examples:
      ggufrq advise docs-qwen3-8m
      ggufrq advise model.gguf --loss 0.01 --ctx 32K
      ggufrq advise model.gguf --fits 2GiB --ctx 32K
    """
    from ggufrq.advise.report import render

    wishes = ladder.Wishes(sizes.parse_tokens(ctx), loss, sizes.parse_memory(fits) if fits else None)
    cases = parse_cases(kv, Sought.AUTO, None, None)
    if "+" in kv or any(case.mode or case.scale for case in cases):
        raise UsageError(
            "advise measures caches as `ggufrq run` keeps them, without marks and modes",
            remedy=f"ggufrq validate {model} --kv '{kv}'",
        )
    build = require_build()
    measured = subject_of(model)
    log_path = paths.logs_dir() / "advise.log"
    log_path.unlink(missing_ok=True)
    with progress("Measuring", len(cases), unit="caches") as bar:
        found = ladder.climb(
            measured,
            held_cases(cases, measured.path),
            build,
            wishes,
            text or paths.data_dir("texts") / "heldout.txt",
            chunks=chunks,
            threads=threads,
            fresh=fresh,
            log=log_path,
            listener=bar,
        )
    click.echo(texts.to_json(found.as_data(), indent=2) if as_json else render(found))
    log.say(f"log of all that ran: {log_path}")

"""``ggufrq claims``: what was published, beside what is measured here."""

from __future__ import annotations

from pathlib import Path

import click

from ggufrq.base import log, paths, texts
from ggufrq.build.builds import require_build
from ggufrq.cli.out_options import JSON, OutFile
from ggufrq.cli.text_options import TEXT_FILE


@click.command()
@click.argument("model", default="docs-qwen3-8m")
@click.option("--ctx", type=click.IntRange(256), help="Context of perplexity.  [default: 2048, as published]")
@click.option("--chunks", type=click.IntRange(1), default=8, show_default=True, help="Texts of that length.")
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True, help="Rounds of speed.")
@click.option(
    "--text",
    type=TEXT_FILE,
    help="Text that the model has not seen.  [default: the held-out text that comes with ggufrq]",
)
@click.option(
    "-t", "--threads", type=click.IntRange(1), help="Threads of llama-bench.  [default: its choice]"
)
@click.option("--fresh", is_flag=True, help="Measure anew what is known from an earlier run.")
@click.option(
    "--json",
    "json_file",
    type=OutFile(JSON),
    metavar="FILE",
    help="Write the result to FILE as JSON.",
)
def claims(
    model: str,
    ctx: int | None,
    chunks: int,
    rounds: int,
    text: Path | None,
    threads: int | None,
    fresh: bool,
    json_file: Path | None,
) -> None:
    """Run RotorQuant's published table again on MODEL, and say which of its claims hold.

    Three-bit caches with the rotation and the scale as published, with a Hadamard rotation in place of
    TurboQuant, and as they are here: perplexity against f16, decode, prefill, compression, parameters, sizes.
    What is known from an earlier run is not measured again.

    \b
    Examples:
      ggufrq claims
      ggufrq claims model.gguf --json claims.json
    """
    from ggufrq.base.progress import progress
    from ggufrq.measure import claims as core
    from ggufrq.measure.validate.plan import make_plan
    from ggufrq.measure.validate.validation import look
    from ggufrq.report.claims import render

    build = require_build()
    plan = make_plan(model, text=text)
    facts = look(plan)
    published = core.published()
    longest = facts.n_ctx_train or published["table"]["context"]
    settings = core.ClaimSettings(
        ctx or min(published["table"]["context"], longest), chunks, rounds=rounds, threads=threads
    )
    log_path = paths.logs_dir() / f"claims-{facts.model.name}.log"
    log_path.unlink(missing_ok=True)
    with progress("Measuring", core.steps(settings), unit="steps") as bar:
        result = core.measure(
            facts.model, build, plan.text, settings, fresh=fresh, log=log_path, listener=bar
        )
        bar.update(core.steps(settings))
    click.echo(render(result))
    log.say(f"log of all that ran: {log_path}")
    if json_file is not None:
        paths.atomic_write(json_file, texts.to_json(result, indent=1, allow_nan=False) + "\n")
        log.say(f"wrote {json_file}")

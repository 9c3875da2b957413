"""``ggufrq run``: one prompt with a quantized KV cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ggufrq.base import log, texts
from ggufrq.base.errors import UsageError
from ggufrq.cache.kv import Sought
from ggufrq.cli.cache_options import cache_options, settle, warn
from ggufrq.cli.text_options import TEXT, TEXT_FILE
from ggufrq.drive import run as core
from ggufrq.make.ready import model_file
from ggufrq.tools import passed_on


@click.command()
@click.argument("model")
@click.argument("places", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("-p", "--prompt", type=TEXT, metavar="TEXT", help="What to ask, or with --raw to continue.")
@click.option(
    "-f",
    "--file",
    "file",
    type=TEXT_FILE,
    help="Read the prompt from a file.",
)
@cache_options
@click.option(
    "-n", "tokens", default=256, show_default=True, help="Longest answer, in tokens (-1: no limit)."
)
@click.option("--temp", type=float, help="Temperature; 0 always takes the likeliest token.")
@click.option("--seed", type=int, help="Seed of the sampling.")
@click.option("--raw", is_flag=True, help="Continue the text instead of answering as in a chat.")
@click.option("--json", "as_json", is_flag=True, help="Print answer and figures as JSON.")
def run(
    model: str,
    places: tuple[str, ...],
    prompt: str | None,
    file: Path | None,
    kv: str,
    kv_profile: Path | Sought | None,
    kv_recent: int | None,
    kv_first: int | None,
    n_ctx: int,
    threads: int | None,
    llama_cpp: Path | None,
    fallback: bool,
    tokens: int,
    temp: float | None,
    seed: int | None,
    raw: bool,
    as_json: bool,
) -> None:
    """Ask MODEL once and tell what the KV cache took.

    MODEL is a GGUF file, an embedded model, or a Hub id with GGUF files (user/model or user/model:Q4_K_M).
    The answer goes to stdout, the figures to stderr. What follows -- are options of llama.cpp for where the
    model is to lie: -ngl, -dev, -ot, --n-cpu-moe and the like.

    \b
    Examples:
      ggufrq run docs-qwen3-8m -p "CREATE TABLE" --raw --kv iso3
      ggufrq run model.gguf -p "Why?" --kv "iso3/planar4; 0,-1:q8_0"
      ggufrq run model.gguf -p "Why?" -- -dev none
    """
    passed_on.check_places(places)
    if (prompt is None) == (file is None):
        raise UsageError("give the prompt either by -p or by -f", remedy=f'ggufrq run {model} -p "…"')
    text = prompt if prompt is not None else texts.read(file) if file else ""
    programs, plan = settle(
        ["ggufrq", "run", model, "-p", "…"], model, kv, kv_profile, kv_recent, kv_first, llama_cpp, fallback
    )
    path = model_file(model)
    warn(path, plan, programs, model)
    try:
        answer = core.generate(
            path,
            text,
            plan,
            programs,
            tokens=tokens,
            n_ctx=n_ctx,
            raw=raw,
            threads=threads,
            temperature=temp,
            seed=seed,
            env=passed_on.variables(),
            places=places,
            on_text=None if as_json else lambda piece: click.echo(piece, nl=False),
        )
    except KeyboardInterrupt:
        click.echo("\nstopped", err=True)
        click.get_current_context().exit(130)
    if as_json:
        click.echo(texts.to_json({"model": model, **asdict(answer), "log": str(answer.log)}, indent=2))
        return
    if not answer.text.strip():
        log.say("the model ended its answer at once; one that was not made for chats continues a text: --raw")
    click.echo("" if answer.text.endswith("\n") else "\n", nl=False)
    click.echo("cache  " + "\n       ".join(core.cache_lines(answer, plan)), err=True)
    click.echo(f"speed  {core.speed_text(answer)}", err=True)

"""``ggufrq serve``: an OpenAI-compatible server with a quantized KV cache."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from ggufrq.base.errors import UsageError
from ggufrq.cache.kv import Sought, parse_kv
from ggufrq.cli.cache_options import cache_options, settle, warn
from ggufrq.drive import cache_check
from ggufrq.drive import serve as core
from ggufrq.make.ready import head_beside, model_file
from ggufrq.tools import passed_on

_DRAFT_KV = "q8_0"


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("model")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
@cache_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port.  [default: 8080 or, if taken, a free one]")
@click.option(
    "--parallel", default=1, show_default=True, help="Requests answered at a time; they share the context."
)
@click.option(
    "--draft",
    metavar="MODEL|mtp",
    help="Guess tokens ahead by this smaller model of the same vocabulary, by one made for MODEL (EAGLE-3, "
    "DFlash), or by the head MODEL has for it.",
)
@click.option("--mtp", is_flag=True, help="The same as --draft mtp.")
@click.option(
    "--draft-kv",
    help="KV cache data type of the draft, as --kv but for all layers; the profile is not for it.  "
    f"[default: {_DRAFT_KV}]",
)
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait until it is ready.")
@click.option("-v", "--verbose", is_flag=True, help="Show the server's log.")
def serve(
    model: str,
    extra: tuple[str, ...],
    kv: str,
    kv_profile: Path | Sought | None,
    kv_recent: int | None,
    kv_first: int | None,
    n_ctx: int,
    threads: int | None,
    llama_cpp: Path | None,
    fallback: bool,
    host: str,
    port: int | None,
    parallel: int,
    draft: str | None,
    mtp: bool,
    draft_kv: str | None,
    timeout: float,
    verbose: bool,
) -> None:
    """Serve MODEL with an OpenAI-compatible API until Ctrl-C. What follows -- goes to llama-server as it is,
    but for options that ggufrq has itself or that take the log away, which are refused.

    With --draft the answer to /completion says how many guesses were right (timings: draft_n,
    draft_n_accepted), and the log, too: what is gained is up to the two models.

    \b
    Examples:
      ggufrq serve docs-qwen3-8m --kv iso3
      ggufrq serve model.gguf --kv "iso3/planar4; 0,-1:q8_0" -- --cache-reuse 256
      ggufrq serve Qwen3-8B-Q4_K_M.gguf --draft Qwen3-0.6B-Q8_0.gguf
      ggufrq serve Qwen3.5-27B-Q4_K_M.gguf --mtp --draft-kv iso4
    """
    if mtp and draft not in (None, "mtp"):
        raise UsageError(
            "--mtp and --draft name two that would guess", remedy="--mtp, or --draft with another model"
        )
    draft = "mtp" if mtp else draft
    if draft is None and draft_kv is not None:
        raise UsageError(
            "--draft-kv is for the cache of a draft, and there is none",
            remedy="--draft MODEL, or --mtp",
        )
    programs, plan = settle(
        ["ggufrq", "serve", model], model, kv, kv_profile, kv_recent, kv_first, llama_cpp, fallback
    )
    path = model_file(model, head=draft == "mtp")
    guess = None
    if draft is not None:
        which = head_beside(path) if draft == "mtp" else model_file(draft, draft=True)
        guess = core.Draft(which, parse_kv(draft_kv or _DRAFT_KV))
    warn(path, plan, programs, model)
    on_log = (lambda text: click.echo(text, err=True, nl=False)) if verbose else None
    with (
        _stopping_cleanly(),
        core.serving(
            path,
            plan,
            programs,
            host=host,
            port=port,
            n_ctx=n_ctx,
            parallel=parallel,
            threads=threads,
            timeout=timeout,
            draft=guess,
            extra=extra,
            env=passed_on.variables(),
            on_log=on_log,
        ) as running,
    ):
        size = running.kv_bytes
        amount = f"{size:,} bytes" if size is not None else f"{running.context.kv_mib:.2f} MiB"
        profile = "" if running.profile is None else f"{running.profile}\n"
        if running.draft is not None:
            name, context = running.draft
            profile += f"Draft: {name}, {cache_check.found(context)}, {context.kv_mib:.2f} MiB.\n"
        click.echo(running.url)
        click.echo(
            f"{path.name} with its KV cache in {running.plan.title}: {amount} for "
            f"{running.context.tokens:,} tokens.\n{profile}Ctrl-C stops it. Try:\n"
            f"{core.example(running.url)}",
            err=True,
        )
        core.watch(running, on_log)


@contextmanager
def _stopping_cleanly() -> Iterator[None]:
    """Ctrl-C and TERM end the server, and with it the command, without an error."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""``ggufrq validate``: what caches cost on a model, with errors and verdicts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ggufrq.base import log, paths, texts
from ggufrq.base.errors import ToolError
from ggufrq.build.builds import require_build
from ggufrq.cache.kv import Sought, profile_word
from ggufrq.cli.cache_options import exact_options, profile_option
from ggufrq.cli.out_options import JSON, OutFile
from ggufrq.cli.text_options import TEXT_FILE
from ggufrq.cli.validate_hf import validate_hf
from ggufrq.measure.validate.assemble import failed
from ggufrq.measure.validate.plan import DEFAULT_CASES, SECTIONS, make_plan
from ggufrq.models.resolve import resolve

_RECENT, _FIRST = exact_options(
    "Newest tokens in f16, for the caches of our types, or only for those written so (iso3+recent32).",
    "First tokens of each sequence in f16, likewise (iso3+first1).",
)


@click.command()
@click.argument("model")
@click.option(
    "--lane",
    type=click.Choice(["hf"]),
    help="hf: caches of transformers, ours beside its own (--kv iso3,hqq4,fp8), on a model as on the Hub.",
)
@click.option(
    "--kv",
    metavar="LIST",
    help="Caches, with commas: iso3; K/V apart iso3/planar4; with a rotation mode iso3:block, and the scale "
    f"as published iso3:block:norm; with layers that differ 'iso3; 0,-1:q8_0'.  [default: {DEFAULT_CASES}]",
)
@click.option("--against", default="f16", show_default=True, help="The cache that all are compared with.")
@profile_option(
    "Metric of K for the caches of our types but those written iso3+plain, or only for those written "
    "iso3+profile.  [default: NAME-kv.gguf beside the model, or else one from a short text]"
)
@_RECENT
@_FIRST
@click.option(
    "--ctx",
    metavar="LIST",
    help="Contexts of perplexity, KLD and needles.  [default: 8192; needles 1024,4096]",
)
@click.option("--chunks", type=click.IntRange(1), help="Texts per context.  [default: 2]")
@click.option("--depths", metavar="LIST", help="Depths that speed is measured at.  [default: 0,1024,2048]")
@click.option(
    "--text",
    type=TEXT_FILE,
    help="Text that the model has not seen.  [default: the held-out text that comes with ggufrq]",
)
@click.option("--sections", metavar="LIST", help=f"Only these of {','.join(SECTIONS)}.")
@click.option("--seed", type=int, help="Chooses places in the text and needles.  [default: 1]")
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads of llama.cpp.  [default: its choice]")
@click.option("--quick", is_flag=True, help="Short runs: rough figures in under a minute for a small model.")
@click.option("--fresh", is_flag=True, help="Measure anew what is known from an earlier run.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for report.html, report.json and logs.  [default: validate-NAME]",
)
@click.option(
    "--json",
    "json_file",
    type=OutFile(JSON),
    metavar="FILE",
    help="Write the result to FILE too.",
)
def validate(
    model: str,
    lane: str | None,
    kv: str | None,
    against: str,
    kv_profile: Path | Sought | None,
    kv_recent: int | None,
    kv_first: int | None,
    ctx: str | None,
    chunks: int | None,
    depths: str | None,
    text: Path | None,
    sections: str | None,
    seed: int | None,
    threads: int | None,
    quick: bool,
    fresh: bool,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Measure what caches cost MODEL in quality, memory and speed, and say which differences are real.

    Perplexity and divergence, greedy agreement, needles, repetition and speed, each against the same run with
    another cache (f16); the build is held against the specification first. What is known from an earlier run
    is not measured again, so that one that was stopped goes on. Fails when a check or a case fails.

    \b
    Examples:
      ggufrq validate docs-qwen3-8m --kv iso3,q4_0 --quick
      ggufrq validate model.gguf --kv iso3,iso3:block:norm,q8_0 --ctx 2048,8192 -o report
      ggufrq validate docs-qwen3-8m --lane hf
    """
    if lane is not None:
        validate_hf(
            model,
            kv=kv,
            profile=kv_profile,
            recent=kv_recent,
            first=kv_first,
            ctx=_numbers(ctx, "--ctx"),
            chunks=chunks,
            text=text,
            threads=threads,
            quick=quick,
            json_file=json_file,
        )
        return
    from ggufrq.measure.validate.validation import validate as run

    plan = make_plan(
        model,
        kv=kv,
        against=against,
        ctx=_numbers(ctx, "--ctx"),
        chunks=chunks,
        depths=_numbers(depths, "--depths"),
        sections=_words(sections),
        profile=kv_profile,
        recent=kv_recent,
        first=kv_first,
        text=text,
        seed=seed,
        threads=threads,
        quick=quick,
        again=shlex.join(["ggufrq", "validate", *_arguments()]),
    )
    folder = out or Path(f"validate-{resolve(model).name}")
    build = require_build()
    result = run(plan, build, out=folder, fresh=fresh)
    _write(result, folder, json_file)
    wrong = failed(result)
    if wrong:
        raise ToolError(
            "\n".join([f"{len(wrong)} of the checks and cases failed", *(f"  {line}" for line in wrong)]),
            remedy=f"see {folder / 'logs'}",
        )


def _write(result: dict[str, Any], folder: Path, json_file: Path | None) -> None:
    from ggufrq.report import html, terminal

    click.echo(terminal.render(result))
    data = texts.to_json(result, indent=1, allow_nan=False) + "\n"
    for path in filter(None, (folder / "report.json", json_file)):
        paths.atomic_write(path, data)
    paths.atomic_write(folder / "report.html", html.render(result))
    log.say(f"wrote {folder / 'report.html'}, report.json and logs")


def _arguments() -> list[str]:
    """The options as they were given, but for those that say where results go and what is done anew."""
    context = click.get_current_context()
    words = [str(context.params["model"])]
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and name not in ("model", "out", "json_file", "fresh"):
            value = context.params[name]
            value = profile_word(value) if name == "kv_profile" else value
            words += [option.opts[-1], *([] if value is True else [str(value)])]
    return words


def _words(text: str | None) -> list[str] | None:
    return [word.strip() for word in text.split(",") if word.strip()] if text else None


def _numbers(text: str | None, option: str) -> list[int] | None:
    words = _words(text) or []
    if not all(word.isdecimal() for word in words):
        raise click.BadParameter(f"'{text}' is no list of numbers", param_hint=option)
    return [int(word) for word in words] or None

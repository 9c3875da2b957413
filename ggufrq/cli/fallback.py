"""``ggufrq fallback``: settings for runtimes that lack our cache types."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from ggufrq.base import texts
from ggufrq.base.sizes import size_text
from ggufrq.make.ready import model_file
from ggufrq.runtimes import fallback as core
from ggufrq.runtimes import runtime, runtimes

_WIDTH = 100


@click.command()
@click.argument("runtime_name", metavar="RUNTIME", type=click.Choice(list(runtimes())))
@click.argument("model")
@click.option(
    "-c",
    "context",
    type=click.IntRange(min=1),
    help="Context, in tokens.  [default: the model's own, at most 32768]",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="Write the files into this folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print settings and files as JSON.")
def fallback(runtime_name: str, model: str, context: int | None, out: Path | None, as_json: bool) -> None:
    """Settings that serve best without our cache types: q8_0 and flash attention, as words and as a file.

    RUNTIME is lmstudio, ollama, koboldcpp, jan, vllm or llama.cpp. Says, too, how much longer a context iso3
    would hold in the same memory. What each runtime takes was looked up; the date and the source are shown.

    \b
    Examples:
      ggufrq fallback ollama model.gguf -o .
      ggufrq fallback llama.cpp docs-qwen3-8m -c 8192
    """
    advice = core.advise(runtime(runtime_name), model_file(model), context)
    written = core.write(advice, out) if out is not None else []
    if as_json:
        data = {**advice.as_data(), "written": [str(path) for path in written]}
        click.echo(texts.to_json(data, indent=2))
        return
    click.echo(render(advice, written))


def render(advice: core.Advice, written: list[Path]) -> str:
    """The advice as plain text; files are shown unless they were written."""
    r = advice.runtime
    lines = [
        f"{r.name} takes {', '.join(r.types)}" + ("" if r.apart else ", K and V alike"),
        f"(looked up on {r.checked}: {r.version})",
        "",
        f"cache            {r.use}, {r.bits_per_value:g} bits per value",
        f"flash attention  {r.flash_attention}",
        f"context          {_context(advice)}",
    ]
    if r.environment:
        lines.append(
            "environment      " + " ".join(f"{name}={value}" for name, value in r.environment.items())
        )
    lines += ["", "steps"]
    lines += [f"  {number}. {step}" for number, step in enumerate(advice.steps, 1)]
    for file in advice.files:
        title = "lines for" if file.add else "file"
        lines += ["", f"{title} {file.name} ({file.verified})"]
        lines += [textwrap.indent(file.text.rstrip(), "    ")] if not written else []
    lines += [f"wrote {path}" for path in written]
    lines += ["", *map(_note, advice.notes)]
    lines += ["", "sources", *(f"  {source}" for source in r.sources)]
    return "\n".join(lines)


def _context(advice: core.Advice) -> str:
    text = f"{advice.context:,} tokens"
    if advice.kv_bytes is not None:
        text += f" in {size_text(advice.kv_bytes)}"
    if advice.holds is None:
        return f"{text}; whether {core.OURS} can hold this model's heads its metadata does not tell"
    if advice.times is None:
        return f"{text}; {core.OURS} cannot hold this model's cache: {advice.why_not}"
    if advice.ours_context is None:
        return f"{text}; {core.OURS} would hold {advice.times:.2f} times as many in the same memory"
    text += f"; {core.OURS} would hold {advice.ours_context:,} in the same memory ({advice.times:.2f} times)"
    if advice.trained is not None and advice.ours_context > advice.trained:
        text += f"; the model was made for {advice.trained:,}"
    return text


def _note(text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )

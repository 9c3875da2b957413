"""``ggufrq memory``: what a model takes, by cache type and context, from its metadata."""

from __future__ import annotations

import json
from contextlib import ExitStack

import click

from ggufrq.base import sizes
from ggufrq.base.errors import UsageError
from ggufrq.build.builds import usable_build
from ggufrq.cache.cases import parse_cases
from ggufrq.cache.kv import Sought


@click.command(
    epilog="Compute buffers are what llama.cpp itself says in a dry run without weights, or, where it is not "
    "built, an estimate. MODEL may be a Hub id: only headers are downloaded."
)
@click.argument("model")
@click.option(
    "--ctx", metavar="LIST", help="Contexts, as 8K,32K,262K.  [default: 8K, 32K, 128K and the model's own]"
)
@click.option(
    "--kv",
    default="f16,q8_0,iso5,q4_0,iso4,iso3,iso2",
    show_default=True,
    metavar="LIST",
    help='Cache types, K/V apart or by layer: "f16,iso3/planar4,iso3; 0,-1:q8_0"; with what takes room '
    "beside them: iso3+profile+first1+recent32.",
)
@click.option("--fits", metavar="SIZE", help="The largest context for each type in 24GB, or 24GiB.")
@click.option(
    "--vram", metavar="SIZE", help="Place the model in so much memory of a GPU, and the rest with the CPU."
)
@click.option("--ram", metavar="SIZE", help="With --vram: at most so much with the CPU.")
@click.option(
    "--parallel",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Sequences that share the context, as -np of llama-server.",
)
@click.option("--weights", metavar="TYPE", help="Weights in a type or recipe of `ggufrq quantize`.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--why", is_flag=True, help="Say how the figures come about, and which published ones are wrong."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def memory(
    model: str,
    ctx: str | None,
    kv: str,
    fits: str | None,
    vram: str | None,
    ram: str | None,
    parallel: int,
    weights: str | None,
    revision: str | None,
    why: bool,
    as_json: bool,
) -> None:
    """Show what MODEL takes of memory: weights, KV cache, recurrent state and compute buffers.

    With --vram, which layers' experts (of dense models, feed-forward parts) stay with the CPU so that all
    else fits on a GPU, as options for llama.cpp.

    \b
    Examples:
      ggufrq memory docs-qwen3.5-8m
      ggufrq memory Qwen/Qwen3-8B --weights Q4_K_M --kv q8_0,iso3 --fits 24GB
      ggufrq memory model.gguf --vram 24GB --ram 64GB --ctx 32K --kv iso3
      ggufrq memory model.gguf --ctx 32K,128K --kv "f16,iso3/planar4,iso3; 0,-1:q8_0"
    """
    from ggufrq.ggufs.memory_shape import memory_shape, tensor_bytes
    from ggufrq.memory import metadata
    from ggufrq.memory.compute import DryRun
    from ggufrq.memory.estimate import Memory
    from ggufrq.memory.report import Report
    from ggufrq.memory.weights import weight_sizes
    from ggufrq.models.resolve import resolve

    if ram is not None and vram is None:
        raise UsageError("--ram is what --vram leaves for the CPU", remedy="--vram SIZE too, or --fits SIZE")
    if vram is not None and fits is not None:
        raise UsageError("--fits is one memory, --vram two", remedy="one of them")
    room = (sizes.parse_memory(vram), sizes.parse_memory(ram) if ram else None) if vram else None
    cases = parse_cases(kv, Sought.AUTO, None, None)
    contexts = [sizes.parse_tokens(part) for part in ctx.split(",")] if ctx else None
    budget = sizes.parse_memory(fits) if fits else None
    build = usable_build()
    plans = [case.plan for case in cases]
    found = metadata.read(resolve(model), build, revision)
    shape = memory_shape(found.headers)
    tensors = weight_sizes(model, weights, revision) if weights else tensor_bytes(found.headers)
    with ExitStack() as stack:
        dry = stack.enter_context(DryRun(found.headers, build)).buffers if build else None
        memory = Memory(shape, sum(tensors.values()), dry, gpu=build is not None and build.lacks_five_bits)
        report = Report(found.name, memory, plans, parallel, weights, tensors, room)
        click.echo(
            json.dumps(report.as_data(contexts, budget), indent=2)
            if as_json
            else report.render(contexts, budget, why=why)
        )

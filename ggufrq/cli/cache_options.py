"""Options of the commands that keep a cache, ``run`` and ``serve``, and what they come to."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ggufrq.cache.kv import MAX_RECENT, KvPlan, parse_plan
from ggufrq.drive import run as core
from ggufrq.tools.programs import Programs

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--kv",
        default="iso3",
        show_default=True,
        metavar="TYPES",
        help='Cache type; K/V apart: iso3/planar4; some layers apart: "iso3; 0-1,-1:q8_0".',
    ),
    click.option(
        "--kv-calib",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        metavar="FILE",
        help="Subtract the means of K in this file of `ggufrq calibrate`.",
    ),
    click.option(
        "--kv-recent",
        type=click.IntRange(0, MAX_RECENT),
        default=0,
        show_default=True,
        metavar="N",
        help="Let each query see its newest N tokens in f16.",
    ),
    click.option(
        "-c", "n_ctx", default=4096, show_default=True, help="Context, in tokens: what the cache holds."
    ),
    click.option("-t", "threads", type=int, help="Threads.  [default: one per core]"),
    click.option(
        "--llama-cpp",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        metavar="DIR",
        help="Use the programs of another llama.cpp.",
    ),
    click.option("--fallback", is_flag=True, help="Use q8_0 where that llama.cpp lacks the type."),
)


def cache_options(function: Command) -> Command:
    """Adds the options, in this order, to a command."""
    return functools.reduce(lambda made, option: option(made), reversed(_OPTIONS), function)


def settle(
    command: list[str],
    kv: str,
    kv_calib: Path | None,
    kv_recent: int,
    llama_cpp: Path | None,
    fallback: bool,
) -> tuple[Programs, KvPlan]:
    """The programs and the cache that the options mean; ``command`` is the command line to repeat, without
    them. Raises UsageError, BuildError, and ToolError as ``run.settle``."""
    plan = parse_plan(kv).calibrated(kv_calib).with_recent(kv_recent)
    programs = core.programs_for(llama_cpp)
    if llama_cpp:
        command = [*command, "--llama-cpp", str(llama_cpp)]
    return programs, core.settle(plan, programs, fallback=fallback, command=shlex.join(command))

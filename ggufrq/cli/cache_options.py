"""Options of the commands that keep a cache, ``run`` and ``serve``, and what they come to."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ggufrq.advise import choice
from ggufrq.base import log
from ggufrq.cache.kv import DEFAULT_FIRST, DEFAULT_KV, DEFAULT_RECENT, MAX_EXACT, KvPlan, Sought, parse_plan
from ggufrq.drive import run as core
from ggufrq.make.ready import model_file
from ggufrq.tools.programs import Programs

#: What ``--kv`` takes in place of types.
AUTO = "auto"

Command = TypeVar("Command", bound=Callable[..., Any])


def _profile(ctx: click.Context, param: click.Parameter, value: str) -> Path | Sought | None:
    """``weights``, ``none``, or a file, as the plan of a cache takes them."""
    if value in ("none", "weights", "auto"):
        return None if value == "none" else Sought(value)
    found: Path = _FILE.convert(value, param, ctx)
    return found


class _ProfileOption(click.Option):
    """An option whose name of before is understood, but told nowhere."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Both names lead to it."""
        told, self.opts = self.opts, [*self.opts, "--kv-calib"]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = told


_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def profile_option(text: str) -> Callable[[Command], Command]:
    """``--kv-profile`` with this help."""
    return click.option(
        "--kv-profile",
        cls=_ProfileOption,
        default="auto",
        callback=_profile,
        metavar="FILE|weights|none",
        help=text,
    )


def exact_options(recent: str, first: str) -> tuple[Callable[[Command], Command], ...]:
    """``--kv-recent`` and ``--kv-first`` with this help; None where they are not given."""

    def option(name: str, default: int, text: str) -> Callable[[Command], Command]:
        return click.option(
            f"--kv-{name}",
            type=click.IntRange(0, MAX_EXACT),
            metavar="N",
            help=f"{text}  [default: {default} with a type of ours, where the device holds them]",
        )

    return option("recent", DEFAULT_RECENT, recent), option("first", DEFAULT_FIRST, first)


_OPTIONS = (
    click.option(
        "--kv",
        default=DEFAULT_KV,
        show_default=True,
        metavar="TYPES",
        help='Cache type; K/V apart: iso3/planar4; some layers apart: "iso3; 0-1,-1:q8_0"; auto: what '
        "`ggufrq advise` recommends.",
    ),
    profile_option(
        "Metric of K in types of ours: a file, one made from the weights, or none.  [default: NAME-kv.gguf "
        "beside the model, or else one from a short text]"
    ),
    *exact_options(
        "Let each query see its newest N tokens in f16.", "And the first N tokens of its sequence."
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


def warn(model: Path, plan: KvPlan, programs: Programs, name: str) -> None:
    """Say in one line when a cache is a bad choice for a GGUF model, which the user calls ``name``."""
    said = choice.warning(model, plan, programs.build, name)
    if said is not None:
        log.say(said)


def cache_options(function: Command) -> Command:
    """Adds the options, in this order, to a command."""
    return functools.reduce(lambda made, option: option(made), reversed(_OPTIONS), function)


def settle(
    command: list[str],
    model: str,
    kv: str,
    kv_profile: Path | Sought | None,
    kv_recent: int | None,
    kv_first: int | None,
    llama_cpp: Path | None,
    fallback: bool,
) -> tuple[Programs, KvPlan]:
    """The programs and the cache that the options mean for MODEL; ``command`` is the command line to repeat,
    without them. The profile is yet to be found. Raises UsageError, BuildError, ModelError, and ToolError as
    ``run.settle``."""

    def wished(types: str) -> KvPlan:
        plan = parse_plan(types).with_wished(kv_recent, kv_first)
        return plan.with_profile(kv_profile) if kv_profile is not Sought.AUTO or plan.k_ours else plan

    auto = kv.strip().lower() == AUTO
    plan = wished(DEFAULT_KV if auto else kv)
    programs = core.programs_for(llama_cpp)
    if auto:
        plan = wished(choice.recommended(model_file(model), programs.build, model))
    if llama_cpp:
        command = [*command, "--llama-cpp", str(llama_cpp)]
    return programs, core.settle(plan, programs, fallback=fallback, command=shlex.join(command))

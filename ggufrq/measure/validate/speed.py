"""Speed against the base, by llama-bench.

Pairwise in one run: in every round each case takes its turn, every second round in reverse order, and is
compared with the base of the same round. A machine that gets slower or faster meanwhile does so for both. Of
the repetitions within a turn the fastest counts, since other work on a machine only ever slows a run down.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ToolError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, assignments
from ggufrq.drive.cache_check import check_context
from ggufrq.measure.base_run import run_tool
from ggufrq.measure.verdict import NONE, mean_and_error, paired
from ggufrq.tools import bench
from ggufrq.tools.logs import Context, parse_context

FASTER, SLOWER = "faster", "slower"
_REPETITIONS = 2

Turn = dict[int, bench.Speed]


@dataclass(frozen=True)
class SpeedSettings:
    """Prefill of ``prompt`` and decode of ``generate`` tokens behind each of ``depths`` tokens, ``rounds``
    times. ``threads`` None: llama.cpp's choice."""

    depths: tuple[int, ...]
    prompt: int
    generate: int
    rounds: int
    threads: int | None


def speed_steps(cases: Sequence[Case], settings: SpeedSettings) -> int:
    """How many runs ``measure_speed`` makes."""
    return len(cases) * (settings.rounds + 1)


def measure_speed(
    model: Path,
    cases: Sequence[Case],
    build: Build,
    settings: SpeedSettings,
    *,
    log: Path,
    listener: Listener = SILENT,
) -> dict[str, dict[str, Any]]:
    """Speed of each case by its name; ``cases[0]`` is the base. See ``compare`` for the figures.

    ``listener`` is told of every run. Raises ToolError when llama-bench fails, CacheError when it kept a
    cache otherwise than asked for.
    """
    commands: dict[str, str] = {}
    for case in cases:
        listener.step(f"{case.name}: speed, a trial")
        check_cache(model, case, build, log)
        listener.advance()
    turns: dict[str, list[Turn]] = {case.name: [] for case in cases}
    for number in range(settings.rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            listener.step(f"{case.name}: speed, round {number + 1} of {settings.rounds}")
            args = _arguments(model, case, settings)
            env = case.environment()
            found, _ = run_tool(build, "llama-bench", args, bench.parse_depths, env=env, log=log)
            if set(found) != set(settings.depths):
                raise ToolError(f"llama-bench measured depths {sorted(found)}, not {list(settings.depths)}")
            listener.advance()
            turns[case.name].append(found)
            commands[case.name] = _shown(model, case, args)
    base = turns[cases[0].name]
    return {
        case.name: {
            **compare(turns[case.name], None if case == cases[0] else base),
            "rounds": settings.rounds,
            "prompt": settings.prompt,
            "generate": settings.generate,
            "commands": [commands[case.name]],
        }
        for case in cases
    }


def compare(turns: Sequence[Turn], base: Sequence[Turn] | None) -> dict[str, Any]:
    """Threads, and a point per depth: medians over the rounds of tokens/s and of the ratio to the base's
    tokens/s in the same round, standard errors, all ratios, and verdicts.

    A verdict compares the mean logarithm of the ratio with its error over the rounds (Student's t, 95 %). The
    base itself (``base`` None) has ratio 1 and no verdict.
    """
    points = []
    for depth in sorted(turns[0]):
        point: dict[str, Any] = {"depth": depth}
        for kind in ("prefill", "decode"):
            speeds = [_tokens(turn[depth], kind) for turn in turns]
            point[f"{kind}_tps"] = round(statistics.median(speeds), 2)
            point[f"{kind}_err"] = round(mean_and_error(speeds)[1], 2)
            other = speeds if base is None else [_tokens(turn[depth], kind) for turn in base]
            ratios = [mine / theirs for mine, theirs in zip(speeds, other, strict=True)]
            median, error, verdict = judge(ratios)
            point[f"{kind}_ratio"] = round(median, 4)
            point[f"{kind}_ratio_err"] = round(error, 4)
            point[f"{kind}_ratios"] = [round(ratio, 4) for ratio in ratios]
            point[f"verdict_{kind}"] = None if base is None else verdict
        points.append(point)
    return {"threads": turns[0][points[0]["depth"]].threads, "points": points}


def judge(ratios: Sequence[float]) -> tuple[float, float, str | None]:
    """Median of ratios of speeds, its standard error, and whether they say ``faster``, ``slower`` or ``no
    difference seen``; no verdict on fewer than two."""
    median = statistics.median(ratios)
    spread = paired([math.log(ratio) for ratio in ratios])
    if spread is None:
        return median, 0.0, None
    seen = abs(spread.value) > spread.beyond * spread.error
    return median, median * spread.error, (FASTER if spread.value > 0 else SLOWER) if seen else NONE


def check_cache(model: Path, case: Case, build: Build, log: Path | None) -> None:
    """Let llama-bench run a few tokens and tell in its log how it keeps the cache, which it does not say when
    it measures.

    Raises CacheError when that is not as the case says.
    """
    args = bench.arguments(model, case.pair, prompt=16, generate=0, repetitions=1, verbose=True)
    context, _ = run_tool(build, "llama-bench", args, _kept, env=case.environment(), log=log)
    check_context(case, context, model, None, None)


def _kept(stdout: str, stderr: str) -> Context:
    context = parse_context(stderr)
    if context is None or not stdout.strip():
        raise bench.failed(stderr)
    return context


def _arguments(model: Path, case: Case, settings: SpeedSettings) -> list[str]:
    return bench.arguments(
        model,
        case.pair,
        prompt=settings.prompt,
        generate=settings.generate,
        depth=settings.depths,
        repetitions=_REPETITIONS,
        threads=settings.threads,
    )


def _shown(model: Path, case: Case, args: list[str]) -> str:
    """The command line with files by their names alone."""
    words = [model.name if arg == str(model) else arg for arg in args]
    return assignments(case.shown()) + shlex.join(["llama-bench", *words])


def _tokens(speed: bench.Speed, kind: str) -> float:
    return speed.prefill_best if kind == "prefill" else speed.decode_best

"""llama-completion: plain continuation of a text. The text comes on stdout, the log on stderr."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ggufrq.cache.kv import KvPlan
from ggufrq.tools.logs import Context, failure, parse_context
from ggufrq.tools.tail import Tail

_TIMING = (
    r"(?:common_perf_print: |print_timing: id +\d+ \| task \d+ \| ) *{what} += +[\d.]+ ms / +(\d+) "
    r"(?:tokens|runs) +\( *[\w.]+ ms per token, +([\d.]+|inf|nan) tokens per second\)"
)
_PROMPT = re.compile(_TIMING.format(what="prompt eval time"))
_EVAL = re.compile(_TIMING.format(what="eval time"))


@dataclass(frozen=True)
class Generation:
    """Tokens and tokens per second of prompt and answer, and the context that they ran in."""

    prompt_tokens: int
    prompt_tps: float
    tokens: int
    tps: float
    context: Context


def common_arguments(
    model: Path,
    prompt: str | Path,
    plan: KvPlan,
    *,
    tokens: int,
    n_ctx: int,
    threads: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
) -> list[str]:
    """What llama-completion and llama-cli take alike; the prompt as text, or the file that it is in."""
    args = ["-m", str(model), *(["-f", str(prompt)] if isinstance(prompt, Path) else ["-p", prompt])]
    args += ["--no-escape", "-n", str(tokens), "-c", str(n_ctx), "-fa", "on"]
    args += [*plan.arguments(), "-lv", "4", "--log-colors", "off"]
    if threads:
        args += ["-t", str(threads)]
    if temperature is not None:
        args += ["--temp", f"{temperature:g}"]
    if seed is not None:
        args += ["-s", str(seed)]
    return args


def arguments(
    model: Path,
    prompt: str | Path,
    plan: KvPlan,
    *,
    tokens: int,
    n_ctx: int,
    threads: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
) -> list[str]:
    """Arguments that continue ``prompt`` by up to ``tokens`` tokens in a context of ``n_ctx``."""
    args = common_arguments(
        model,
        prompt,
        plan,
        tokens=tokens,
        n_ctx=n_ctx,
        threads=threads,
        temperature=temperature,
        seed=seed,
    )
    return [*args, "-no-cnv", "--no-display-prompt"]


def continuation() -> Tail:
    """Takes stdout in chunks and gives the continuation, without what llama-completion adds at its end."""
    return Tail(" [end of text]\n\n\n", "\n\n")


def parse_timing(log: str) -> Generation:
    """What the log of llama-completion or llama-cli tells of the last generation.

    Raises ToolError, with the tool's own reason, when nothing was generated or the generation broke off, and
    Incomplete when the end of the log is missing.
    """
    prompt = _last(_PROMPT, log)
    answer = _last(_EVAL, log)
    context = parse_context(log)
    failed = "send_error: " in log
    if failed or prompt is None or answer is None or context is None:
        raise failure(log, "the generation failed")
    return Generation(int(prompt[1]), _rate(prompt[2]), int(answer[1]), _rate(answer[2]), context)


def _rate(text: str) -> float:
    """Tokens per second; 0 where too little was done to tell (``inf``, ``nan``)."""
    rate = float(text)
    return rate if math.isfinite(rate) else 0.0


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    every = list(pattern.finditer(text))
    return every[-1] if every else None

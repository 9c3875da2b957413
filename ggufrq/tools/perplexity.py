"""llama-perplexity: perplexity, and the divergence of one run from another.

It exits with 0 after a text that is too short, a missing base file, or a failed decode: only its output
counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base.errors import ToolError
from ggufrq.cache.kv import KvPlan
from ggufrq.tools.logs import Context, Incomplete, failure, parse_context

_NUMBER = r"(-?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf))"
_FINAL = re.compile(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}")
_PLAN = re.compile(r"(?:calculating perplexity|computing) over (\d+) chunks, n_ctx=(\d+)")
_CHUNK = re.compile(r"\[(\d+)\]-?(?:[\d.]+|nan|inf),")
_ROW = re.compile(r"^ *(\d+) +\S+ ± +\S+ +\S+ ± ", re.MULTILINE)
#: Below this number of scored tokens it prints no statistics.
_LEAST_SCORED = 100
_NOT_A_NUMBER = re.compile(r"\[\d+\]-?(?:nan|inf),|^ *\d+ +-?(?:nan|inf) ± ", re.MULTILINE)
_FAILED = re.compile(r"failed to decode|failed reading log-probs for chunk")


class NoNumbers(ToolError):
    """What was computed is NaN or infinite."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with its standard error over ``chunks`` texts of ``n_ctx`` tokens, and the context it was
    taken in."""

    ppl: float
    ppl_err: float
    chunks: int
    n_ctx: int
    context: Context


@dataclass(frozen=True)
class Divergence:
    """A run against a base run: perplexities, the mean of ln(PPL / base PPL) over tokens, Kullback-Leibler
    divergence (nats), and how often the likeliest token is the same (a share, 0 to 1). ``err`` are standard
    errors over the scored tokens."""

    ppl: float
    ppl_err: float
    ppl_base: float
    ln_ratio: float
    ln_ratio_err: float
    kld_mean: float
    kld_mean_err: float
    kld_max: float
    kld_p999: float
    kld_p99: float
    kld_median: float
    same_top: float
    same_top_err: float
    chunks: int
    n_ctx: int
    context: Context


def arguments(
    model: Path,
    text: Path,
    plan: KvPlan,
    base: Path,
    *,
    n_ctx: int,
    chunks: int,
    divergence: bool,
    threads: int | None = None,
    together: int | None = None,
) -> list[str]:
    """Arguments of a run over ``chunks`` texts of ``n_ctx`` tokens, all in one batch or only ``together`` of
    them (its cache and its memory are for so many); the base run (``divergence`` false) writes ``base``, the
    others are compared with it."""
    args = ["-m", str(model), "-f", str(text), "-c", str(n_ctx), "-b", str(n_ctx * (together or chunks))]
    args += [
        "--chunks",
        str(chunks),
        "--no-escape",
        "-fa",
        "on",
        *plan.arguments(),
        "-lv",
        "4",
    ]
    args += ["--kl-divergence-base", str(base)]
    if divergence:
        args.append("--kl-divergence")
    if threads:
        args += ["-t", str(threads)]
    return args


def parse_perplexity(stdout: str, stderr: str) -> Perplexity:
    """The result of a run without ``--kl-divergence``. Raises ToolError when it did not finish or is no
    number."""
    _require_numbers(stdout, "the perplexity")
    final = _FINAL.search(stderr) or _FINAL.search(stdout)
    if final is None:
        raise _unfinished(stderr, stdout)
    chunks, n_ctx = _plan(stderr)
    done = max((int(m[1]) for m in _CHUNK.finditer(stdout)), default=0)
    if done != chunks:
        raise Incomplete(f"llama-perplexity finished {done} of {chunks} chunks")
    ppl, err = float(final[1]), float(final[2])
    if not math.isfinite(ppl):
        raise NoNumbers(f"the perplexity is {final[1]}: the model or the cache computes no numbers any more")
    return Perplexity(ppl, err, chunks, n_ctx, _context(stderr))


def parse_divergence(stdout: str, stderr: str) -> Divergence:
    """The result of a run with ``--kl-divergence``. Raises ToolError when it did not finish or is no
    number."""
    _require_numbers(stdout, "the divergence")
    if _FAILED.search(stderr) or "KL divergence statistics" not in stdout or "Same top p:" not in stdout:
        raise _unfinished(stderr, stdout)
    chunks, n_ctx = _plan(stderr)
    rows = [int(m[1]) for m in _ROW.finditer(stdout)]
    if rows != list(range(1, chunks + 1)):
        raise Incomplete(f"llama-perplexity finished {len(rows)} of {chunks} chunks")
    ppl, ppl_err = _pair(stdout, r"Mean PPL\(Q\)")
    ppl_base, _ = _pair(stdout, r"Mean PPL\(base\)")
    ln_ratio, ln_ratio_err = _pair(stdout, r"Mean ln\(PPL\(Q\)/PPL\(base\)\)")
    mean, mean_err = _pair(stdout, r"Mean +KLD")
    top, top_err = _pair(stdout, "Same top p")
    result = Divergence(
        ppl=ppl,
        ppl_err=ppl_err,
        ppl_base=ppl_base,
        ln_ratio=ln_ratio,
        ln_ratio_err=ln_ratio_err,
        kld_mean=mean,
        kld_mean_err=mean_err,
        kld_max=_single(stdout, "Maximum KLD"),
        kld_p999=_single(stdout, r"99\.9% +KLD"),
        kld_p99=_single(stdout, r"99\.0% +KLD"),
        kld_median=_single(stdout, "Median +KLD"),
        same_top=top / 100,
        same_top_err=top_err / 100,
        chunks=chunks,
        n_ctx=n_ctx,
        context=_context(stderr),
    )
    if not (math.isfinite(result.ppl) and math.isfinite(result.kld_mean)):
        raise NoNumbers("the divergence is not a number: the model or the cache computes no numbers any more")
    return result


def _require_numbers(stdout: str, what: str) -> None:
    if _NOT_A_NUMBER.search(stdout):
        raise NoNumbers(f"{what} is not a number: the model or the cache computes no numbers any more")


def chunks_done(stdout: str) -> int:
    """How many chunks a run that still goes on has printed."""
    return max((int(m[1]) for pattern in (_CHUNK, _ROW) for m in pattern.finditer(stdout)), default=0)


def _plan(stderr: str) -> tuple[int, int]:
    found = _PLAN.search(stderr)
    if found is None:
        raise ToolError("llama-perplexity does not say over how many chunks it ran")
    return int(found[1]), int(found[2])


def _context(stderr: str) -> Context:
    found = parse_context(stderr)
    if found is None:
        raise ToolError("llama-perplexity does not say which cache it used")
    return found


def _pair(text: str, label: str) -> tuple[float, float]:
    found = re.search(rf"^{label} *: +{_NUMBER} ± +{_NUMBER}", text, re.MULTILINE)
    if found is None:
        raise Incomplete(f"llama-perplexity did not print '{label}'")
    error = float(found[2])
    # the root of a variance that should be zero and came out below, when a run is compared with itself
    return float(found[1]), 0.0 if math.isnan(error) else error


def _single(text: str, label: str) -> float:
    found = re.search(rf"^{label}: +{_NUMBER}", text, re.MULTILINE)
    if found is None:
        raise Incomplete(f"llama-perplexity did not print '{label}'")
    return float(found[1])


def _unfinished(stderr: str, stdout: str) -> ToolError:
    rows = chunks_done(stdout)
    plan = _PLAN.search(stderr)
    if rows and plan is not None and int(plan[1]) * (int(plan[2]) // 2 - 1) < _LEAST_SCORED:
        return ToolError(
            f"too few tokens were scored for statistics ({rows} chunks)",
            remedy="a longer text, or more chunks",
        )
    return failure(stderr, "llama-perplexity gave no result")

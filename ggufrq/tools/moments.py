"""llama-rq-moments: sums over a text of K and of products of K and Q before RoPE, by layer and KV head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ggufrq.tools.logs import Incomplete, failure

PROGRAM = "llama-rq-moments"
_PLAN = re.compile(r"^moments: (\d+) chunks of \d+ tokens, \d+ held out, (\d+) done$", re.MULTILINE)
_CHUNK = re.compile(r"\[(\d+)\]")


def arguments(
    model: Path,
    text: Path,
    out: Path,
    *,
    n_ctx: int,
    chunks: int,
    threads: int | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """Arguments that sum over up to ``chunks`` chunks of ``n_ctx`` tokens of ``text`` into ``out``; a
    file of the same chunks is gone on with. ``extra`` are further options."""
    args = ["-m", str(model), "-o", str(out), "-c", str(n_ctx), "--chunks", str(chunks), "-lv", "4"]
    args += ["-f", str(text), "--no-escape", "-fa", "on", "-ctk", "f16", "-ctv", "f16"]
    return [*args, *([] if threads is None else ["-t", str(threads)]), *extra]


def plan(stdout: str) -> tuple[int, int] | None:
    """How many chunks there are, and how many of them were done before; None until the run has said so."""
    found = _PLAN.search(stdout)
    return (int(found[1]), int(found[2])) if found else None


def chunks_done(stdout: str) -> int:
    """How many chunks are done, of a run that may still go on."""
    planned = plan(stdout)
    return max((int(m[1]) for m in _CHUNK.finditer(stdout)), default=planned[1] if planned else 0)


def check(stdout: str, stderr: str) -> None:
    """Raises ToolError when the run did not finish."""
    planned = plan(stdout)
    if planned is None:
        raise failure(stderr, f"{PROGRAM} gave no result")
    if chunks_done(stdout) != planned[0]:
        raise Incomplete(f"{PROGRAM} finished {chunks_done(stdout)} of {planned[0]} chunks")

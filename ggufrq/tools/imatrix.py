"""llama-imatrix: which weights matter, from a calibration text."""

from __future__ import annotations

import re
from pathlib import Path

from ggufrq.tools.logs import Incomplete, failure

_PLAN = re.compile(r"compute_imatrix: computing over (\d+) chunks")
_CHUNK = re.compile(r"\[(\d+)\]")


def arguments(model: Path, text: Path, out: Path, *, n_ctx: int = 512, chunks: int = -1) -> list[str]:
    """Arguments that write the importance matrix of ``model`` over ``chunks`` texts (-1: all) to ``out``."""
    args = ["-m", str(model), "-f", str(text), "-o", str(out), "--output-format", "gguf"]
    return [*args, "-c", str(n_ctx), "--chunks", str(chunks), "--no-escape", "-lv", "4"]


def chunks_planned(stderr: str) -> int | None:
    """How many chunks the run is over, once it has said so."""
    found = _PLAN.search(stderr)
    return int(found[1]) if found else None


def chunks_done(stdout: str) -> int:
    """How many chunks a run that still goes on has printed."""
    return max((int(m[1]) for m in _CHUNK.finditer(stdout)), default=0)


def check(stdout: str, stderr: str) -> int:
    """The chunks of a finished run. Raises ToolError when it did not finish all."""
    planned, done = chunks_planned(stderr), chunks_done(stdout)
    if planned is None or "Final estimate" not in stdout + stderr:
        raise failure(stderr, "llama-imatrix gave no result")
    if done != planned:
        raise Incomplete(f"llama-imatrix finished {done} of {planned} chunks")
    return done

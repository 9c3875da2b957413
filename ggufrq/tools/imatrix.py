"""llama-imatrix: which weights matter, from a calibration text."""

from __future__ import annotations

import re
from pathlib import Path

from ggufrq.tools.logs import Incomplete, failure

#: Chunks that a pass of the tool computes together: as many as it does by itself with chunks of 512 tokens.
TOGETHER = 4
_PLAN = re.compile(r"compute_imatrix: computing over (\d+) chunks")
_CHUNK = re.compile(r"\[(\d+)\]")
_END = "not enough tokens left after removing"


def arguments(
    model: Path,
    text: Path,
    out: Path,
    *,
    n_ctx: int = 512,
    chunks: int = -1,
    skip: int = 0,
    onto: Path | None = None,
) -> list[str]:
    """Arguments that write the importance matrix of ``model`` over ``chunks`` chunks of a text (-1: all),
    without the first ``skip``, to ``out``, added to what the matrix ``onto`` has."""
    args = ["-m", str(model), "-f", str(text), "-o", str(out), "--output-format", "gguf"]
    args += ["-c", str(n_ctx), "-b", str(TOGETHER * n_ctx)]
    args += ["--chunks", str(chunks), "--no-escape", "--parse-special", "-lv", "4"]
    args += ["--chunk", str(skip)] if skip else []
    return [*args, "--in-file", str(onto)] if onto is not None else args


def chunks_planned(stderr: str) -> int | None:
    """How many chunks the run is over, once it has said so."""
    found = _PLAN.search(stderr)
    return int(found[1]) if found else None


def chunks_done(stdout: str) -> int:
    """How many chunks a run that still goes on has printed."""
    return max((int(m[1]) for m in _CHUNK.finditer(stdout)), default=0)


def at_end(stderr: str) -> bool:
    """Whether the text had too little left behind the chunks that were to be skipped."""
    return _END in stderr


def check(stdout: str, stderr: str) -> int:
    """The chunks of a finished run. Raises ToolError when it did not finish all."""
    planned, done = chunks_planned(stderr), chunks_done(stdout)
    if planned is None or "Final estimate" not in stdout + stderr:
        raise failure(stderr, "llama-imatrix gave no result")
    if done != planned:
        raise Incomplete(f"llama-imatrix finished {done} of {planned} chunks")
    return done

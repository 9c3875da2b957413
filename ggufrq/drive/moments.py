"""llama-rq-moments run on a text: sums of K, K Kᵀ and Q Qᵀ before RoPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.base.errors import ToolError
from ggufrq.base.machine import cores
from ggufrq.build.project import Build
from ggufrq.tools import moments as tool
from ggufrq.tools.logs import ended, remedy_of, retried


def sum_moments(
    out: Path,
    model: Path,
    text: Path,
    build: Build,
    on_chunks: Callable[[int, int | None], None],
    *,
    n_ctx: int,
    chunks: int,
    threads: int | None = None,
    extra: Sequence[str] = (),
) -> None:
    """Sum over up to ``chunks`` chunks of ``n_ctx`` tokens of ``text`` into ``out``, which is gone on with
    where it is there; ``on_chunks`` is told how many are done, and of how many; ``extra`` are options for the
    program. Raises ToolError when it fails or the text has less than one chunk."""
    args = tool.arguments(
        model, text, out, n_ctx=n_ctx, chunks=chunks, threads=threads or cores(), extra=extra
    )
    output = ""

    def on_stdout(more: str) -> None:
        nonlocal output
        output += more
        planned = tool.plan(output)
        on_chunks(tool.chunks_done(output), planned[0] if planned else None)

    def attempt() -> None:
        nonlocal output
        output = ""
        done = proc.run(
            [build.tool(tool.PROGRAM), *args],
            log=paths.logs_dir() / "calibrate.log",
            check=False,
            on_stdout=on_stdout,
        )
        if done.rc != 0:
            why = ended(done)
            raise ToolError(why, remedy=remedy_of(why))
        tool.check(done.stdout, done.stderr)

    retried(attempt)

"""llama-bench: tokens per second in prefill and decode."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.errors import ToolError
from ggufrq.kv import KvPair
from ggufrq.tools.logs import explain


@dataclass(frozen=True)
class Speed:
    """Tokens per second, with standard deviations over the repetitions, behind ``depth`` tokens of
    context."""

    prefill: float
    prefill_sd: float
    decode: float
    decode_sd: float
    depth: int
    threads: int
    type_k: str
    type_v: str
    cpu: str
    commit: str


def arguments(
    model: Path,
    pair: KvPair,
    *,
    prompt: int = 512,
    generate: int = 32,
    depth: int = 0,
    repetitions: int = 2,
    threads: int | None = None,
) -> list[str]:
    """Arguments that measure one prefill of ``prompt`` and one decode of ``generate`` tokens behind ``depth``
    tokens."""
    args = ["-m", str(model), "-o", "json", "-fa", "on", "-ctk", pair.k.name, "-ctv", pair.v.name]
    args += ["-p", str(prompt), "-n", str(generate), "-d", str(depth), "-r", str(repetitions)]
    if threads:
        args += ["-t", str(threads)]
    return args


def parse(stdout: str, stderr: str) -> Speed:
    """The result of a run with ``arguments``. Raises ToolError when it failed or measured something else."""
    try:
        records: list[dict[str, Any]] = json.loads(stdout)
    except ValueError:
        raise ToolError(f"llama-bench gave no result: {explain(stderr, 'it does not say why')}") from None
    by_kind = {("prefill" if record["n_prompt"] else "decode"): record for record in records}
    if len(records) != 2 or len(by_kind) != 2:
        raise ToolError(f"llama-bench gave {len(records)} results instead of a prefill and a decode")
    prefill, decode = by_kind["prefill"], by_kind["decode"]
    if not (prefill["avg_ts"] > 0 and decode["avg_ts"] > 0):
        raise ToolError("llama-bench measured no tokens per second")
    return Speed(
        prefill=prefill["avg_ts"],
        prefill_sd=prefill["stddev_ts"],
        decode=decode["avg_ts"],
        decode_sd=decode["stddev_ts"],
        depth=prefill["n_depth"],
        threads=prefill["n_threads"],
        type_k=prefill["type_k"],
        type_v=prefill["type_v"],
        cpu=prefill["cpu_info"],
        commit=prefill["build_commit"],
    )

"""llama-bench: tokens per second in prefill and decode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ToolError
from ggufrq.cache.kv import KvPair
from ggufrq.tools.logs import explain


@dataclass(frozen=True)
class Speed:
    """Tokens per second, with standard deviations over the repetitions and the fastest of these, behind
    ``depth`` tokens of context."""

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
    prefill_best: float
    decode_best: float


def arguments(
    model: Path,
    pair: KvPair,
    *,
    prompt: int = 512,
    generate: int = 32,
    depth: int | Sequence[int] = 0,
    repetitions: int = 2,
    threads: int | None = None,
    verbose: bool = False,
) -> list[str]:
    """Arguments that measure one prefill of ``prompt`` and one decode of ``generate`` tokens behind ``depth``
    tokens, or behind each of several depths. ``verbose`` puts the library's log on stderr."""
    depths = [depth] if isinstance(depth, int) else depth
    args = ["-m", str(model), "-o", "json", "-fa", "on", "-ctk", pair.k.name, "-ctv", pair.v.name]
    args += ["-p", str(prompt), "-n", str(generate), "-d", ",".join(map(str, depths)), "-r", str(repetitions)]
    if threads:
        args += ["-t", str(threads)]
    return [*args, "-v"] if verbose else args


def parse(stdout: str, stderr: str) -> Speed:
    """The result of a run at one depth. Raises ToolError when it failed or measured something else."""
    return _speed(_records(stdout, stderr))


def parse_depths(stdout: str, stderr: str) -> dict[int, Speed]:
    """The results of a run at several depths, by depth. Raises as ``parse``."""
    by_depth: dict[int, list[dict[str, Any]]] = {}
    for record in _records(stdout, stderr):
        by_depth.setdefault(record["n_depth"], []).append(record)
    return {depth: _speed(records) for depth, records in by_depth.items()}


def _records(stdout: str, stderr: str) -> list[dict[str, Any]]:
    try:
        records: list[dict[str, Any]] = json.loads(stdout)
    except ValueError:
        raise failed(stderr) from None
    return records


def failed(stderr: str) -> ToolError:
    """The error for a run without a result."""
    return ToolError(f"llama-bench gave no result: {explain(stderr, 'it does not say why')}")


def _speed(records: list[dict[str, Any]]) -> Speed:
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
        prefill_best=max(prefill["samples_ts"]),
        decode_best=max(decode["samples_ts"]),
    )

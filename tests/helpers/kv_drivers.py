"""The programs of tests/cache, and how they are run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ggufrq import proc

HYBRID, DENSE = "docs-qwen3.5-8m", "docs-qwen3-8m"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run(
    driver: Path,
    *arguments: str | Path,
    mode: str | None = None,
    layers: str | None = None,
    calib: Path | None = None,
    recent: int | None = None,
) -> dict[str, Any]:
    """What the program prints as JSON, with the variables that these options stand for."""
    env = {**ONE_THREAD, "LLAMA_RQ_MODE": mode, "LLAMA_RQ_LAYERS": layers}
    env["LLAMA_RQ_RECENT"] = None if recent is None else str(recent)
    env["LLAMA_RQ_CALIB"] = None if calib is None else str(calib)
    done = proc.run([driver, *arguments], env=env, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result

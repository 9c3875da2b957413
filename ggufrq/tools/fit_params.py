"""llama-fit-params: loads a model without its weights and says what a context would allocate."""

from __future__ import annotations

import re
from pathlib import Path

from ggufrq.base.errors import ToolError
from ggufrq.cache.kv import KvPlan
from ggufrq.tools.logs import explain

_COMPUTE = re.compile(r"sched_reserve: +\S+ compute buffer size = +([\d.]+) MiB")
_REFUSED = re.compile(r"error loading model: (.+)")
_RESERVING = "sched_reserve: reserving"
_MIB = 1 << 20


def arguments(model: Path, plan: KvPlan, *, n_ctx: int, parallel: int = 1) -> list[str]:
    """Arguments that print what a context of ``n_ctx`` tokens for so many sequences takes."""
    args = ["-m", str(model), "-c", str(n_ctx), "-np", str(parallel), "-fa", "on", *plan.arguments()]
    return [*args, "-fitp", "on", "-lv", "5", "--log-colors", "off"]


def loading(model: Path) -> list[str]:
    """Arguments that load a model and say no more than why that fails."""
    # where it prints what it would allocate, a failure aborts it, and with it the end of its log
    return ["-m", str(model), "-c", "64", "-lv", "1", "--log-colors", "off"]


def refusal(log: str) -> str | None:
    """Why the model was not loaded, None when it was."""
    found = _REFUSED.search(log)
    return found[1].strip() if found else None


def compute_bytes(log: str) -> int:
    """Bytes of the compute buffers of the last context that a log tells of, over all backends, to a hundredth
    of a MiB. Raises ToolError when it tells of none."""
    found = _COMPUTE.findall(log[max(0, log.rfind(_RESERVING)) :])
    if not found:
        raise ToolError(f"llama.cpp does not say what it computes in: {explain(log, 'no compute buffer')}")
    return round(sum(map(float, found)) * _MIB)

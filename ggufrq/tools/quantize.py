"""llama-quantize: the types it knows, what a quantization would take, and what it did."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ggufrq.errors import ToolError
from ggufrq.tools.logs import explain

_TYPE = re.compile(r"^ +(\d+) +or +(\w+) +: *(?:alias for (\w+))?", re.MULTILINE)
_SIZE = re.compile(r"(model|quant) size += +([\d.]+) MiB \(([\d.]+) BPW\)")
_TENSOR = re.compile(r"^\[ *(\d+)/ *(\d+)\] +\S+", re.MULTILINE)
_FALLBACK = re.compile(r"WARNING: (\d+) of (\d+) tensor\(s\) required fallback")
_FAILED = re.compile(
    r"failed to quantize(?: model from .*?|): (.+)|llama_model_quantize: failed to quantize: (.+)"
)


@dataclass(frozen=True)
class Outcome:
    """Sizes in MiB as printed, bits per weight, and the tensors that could not take the type asked for."""

    model_mib: float
    quant_mib: float
    bits: float
    tensors: int
    fallbacks: int


def arguments(
    model: Path,
    out: Path | None,
    type_name: str,
    *,
    imatrix: Path | None = None,
    dry_run: bool = False,
    requantize: bool = False,
) -> list[str]:
    """Arguments that quantize ``model`` to ``out``; with ``dry_run`` only sizes are computed and ``out`` is
    not used."""
    args: list[str] = []
    if dry_run:
        args.append("--dry-run")
    if requantize:
        args.append("--allow-requantize")
    if imatrix is not None:
        args += ["--imatrix", str(imatrix)]
    args.append(str(model))
    if out is not None and not dry_run:
        args.append(str(out))
    return [*args, type_name]


def parse_types(text: str) -> dict[str, str]:
    """Types that the help lists, by name; an alias maps to the type that it stands for, others to themselves.

    Raises ToolError when the help lists none.
    """
    types = {m[2]: m[3] or m[2] for m in _TYPE.finditer(text)}
    if not types:
        raise ToolError("llama-quantize does not list the types it knows")
    return types


def parse(rc: int, output: str) -> Outcome:
    """The outcome of a run or a dry run. Raises ToolError with the tool's own reason when it failed."""
    sizes = {m[1]: (float(m[2]), float(m[3])) for m in _SIZE.finditer(output)}
    if rc != 0 or set(sizes) != {"model", "quant"}:
        raise ToolError(f"llama-quantize failed: {_reason(output)}")
    fallback = _FALLBACK.search(output)
    tensors = max((int(m[2]) for m in _TENSOR.finditer(output)), default=0)
    mib, bits = sizes["quant"]
    return Outcome(sizes["model"][0], mib, bits, tensors, int(fallback[1]) if fallback else 0)


def tensors_done(output: str) -> tuple[int, int]:
    """Tensors begun and tensors in all, of a run that still goes on."""
    every = _TENSOR.findall(output)
    return (int(every[-1][0]), int(every[-1][1])) if every else (0, 0)


def _reason(output: str) -> str:
    for found in _FAILED.finditer(output):
        reason = found[1] or found[2]
        if reason:
            return reason
    return explain(output, "it does not say why")

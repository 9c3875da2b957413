"""llama-quantize: the types it knows, what a quantization would take, and what it did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base.errors import ToolError
from ggufrq.tools.logs import Incomplete, explain

#: MiB of rows that llama-quantize keeps at a time; its own default is 8192. The result does not depend on it.
BUFFER_MIB = 512
#: Longest text of a value that it writes into the metadata.
LONGEST_VALUE = 127

_NEED_MATRIX = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s")
_TYPE = re.compile(r"^ +(\d+) +or +(\w+) +: *(?:alias for (\w+))?", re.MULTILINE)
_SIZE = re.compile(r"(model|quant) size += +([\d.]+) MiB \(([\d.]+) BPW\)")
_TENSOR = re.compile(r"^\[ *(\d+)/ *(\d+)\] +\S+", re.MULTILINE)
_BEGUN = re.compile(r"^\[ *\d+/ *\d+\] +(\S+)", re.MULTILINE)
_LINE = re.compile(
    r"^\[ *(\d+)/ *(\d+)\] +(\S+) +- \[([\d, ]+)\], type = +(\w+), "
    r"size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?",
    re.MULTILINE,
)
_FALLBACK = re.compile(r"WARNING: (\d+) of (\d+) tensor\(s\) required fallback")
_FAILED = re.compile(
    r"failed to quantize(?: model from .*?|): (.+)|llama_model_quantize: failed to quantize: (.+)"
)
_IMATRIX = re.compile(r"(?:failed to load imatrix|missing imatrix metadata)[^\n]*")


@dataclass(frozen=True)
class Outcome:
    """Sizes in MiB as printed, bits per weight, and the tensors that could not take the type asked for."""

    model_mib: float
    quant_mib: float
    bits: float
    tensors: int
    fallbacks: int


@dataclass(frozen=True)
class TensorLine:
    """One tensor of a dry run: ``shape`` begins with the row length; types are names in lower case."""

    name: str
    shape: tuple[int, ...]
    type: str
    target: str


def arguments(
    model: Path,
    out: Path | None,
    type_name: str,
    *,
    imatrix: Path | None = None,
    dry_run: bool = False,
    requantize: bool = False,
    pure: bool = False,
    tensor_types: Path | None = None,
    metadata: Mapping[str, str] | None = None,
    alignment: int | None = None,
) -> list[str]:
    """Arguments that quantize ``model`` to ``out``; with ``dry_run`` only sizes are computed and ``out`` is
    not used. ``tensor_types`` is a file of ``tensor_type_lines``; ``metadata`` are text values by key;
    ``alignment`` is what the new file says of the places of its tensors, else what the old one says."""
    args: list[str] = []
    if dry_run:
        args.append("--dry-run")
    if requantize:
        args.append("--allow-requantize")
    if pure:
        args.append("--pure")
    if imatrix is not None:
        args += ["--imatrix", str(imatrix)]
    if tensor_types is not None:
        args += ["--tensor-type-file", str(tensor_types)]
    for key, value in (metadata or {}).items():
        args += ["--override-kv", f"{key}=str:{value}"]
    if alignment is not None:
        args += ["--override-kv", f"general.alignment=int:{alignment}"]
    args += ["--max-buffer-size", str(BUFFER_MIB), str(model)]
    if out is not None and not dry_run:
        args.append(str(out))
    return [*args, type_name]


def requires_matrix(name: str, kind: str, type_name: str) -> bool:
    """Whether llama-quantize refuses to give a tensor the type ``kind`` in a file of ``type_name`` without an
    entry of an importance matrix (``tensor_requires_imatrix`` in src/llama-quant.cpp)."""
    if name in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return False
    return kind in _NEED_MATRIX or (kind == "q2_k" and type_name.upper() == "Q2_K_S")


def tensor_type_lines(types: Mapping[str, str]) -> str:
    """The content of a ``--tensor-type-file`` that gives each tensor its type.

    llama-quantize searches each pattern anywhere in a name, takes the first that is found, and turns patterns
    (not names) to lower case: so each is anchored and escaped, and a capital letter becomes ``.``.
    """
    lines = []
    for name, kind in types.items():
        pattern = "".join("." if c.isupper() else c if c.isalnum() or c in "_-" else f"\\{c}" for c in name)
        lines.append(f"^{pattern}$={kind}")
    return "\n".join(lines) + "\n"


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


def not_held(output: str) -> str | None:
    """The tensor whose values a run found not to be held by the type that they were to get, None when it did
    not stop for that."""
    names = _BEGUN.findall(output)
    return names[-1] if names and "data validation failed" in output else None


def parse_tensors(output: str) -> list[TensorLine]:
    """Every tensor of a dry run with the type that it would get. Raises Incomplete when some are missing."""
    lines, total = [], 0
    for found in _LINE.finditer(output):
        total = int(found[2])
        shape = [int(part) for part in found[4].split(",")]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        kind = found[5].lower()
        lines.append(TensorLine(found[3], tuple(shape), kind, (found[6] or kind).lower()))
    if not lines or len(lines) != total:
        raise Incomplete(f"llama-quantize listed {len(lines)} of {total} tensors")
    return lines


def tensors_done(output: str) -> tuple[int, int]:
    """Tensors begun and tensors in all, of a run that still goes on."""
    every = _TENSOR.findall(output)
    return (int(every[-1][0]), int(every[-1][1])) if every else (0, 0)


def _reason(output: str) -> str:
    for found in _FAILED.finditer(output):
        reason = found[1] or found[2]
        if reason:
            return reason
    matrix = _IMATRIX.search(output)
    return matrix[0] if matrix else explain(output, "it does not say why")

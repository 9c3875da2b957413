"""One quantization: what llama-quantize would make of a model, to the byte, and making it as planned."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufrq.base import paths, proc
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.build.project import Build
from ggufrq.ggufs.files import GgufFacts, model_header, read_gguf, verify_types
from ggufrq.ggufs.header import ALIGNMENT, Header, pad, read_header
from ggufrq.ggufs.tensors import is_float, type_bytes
from ggufrq.ggufs.values import losses
from ggufrq.tools import quantize as tool
from ggufrq.tools.logs import retried

#: llama-quantize has mixtures of these types; the file is labelled by the usual one.
_LABELS = {
    "q2_k": "Q2_K",
    "q3_k": "Q3_K_M",
    "q4_k": "Q4_K_M",
    "q5_k": "Q5_K_M",
    "iq2_s": "IQ2_M",
    "mxfp4": "MXFP4_MOE",
}
#: Values that llama-quantize writes itself, or leaves out.
_REPLACED = (
    "general.quantization_version",
    "general.file_type",
    "split.no",
    "split.count",
    "split.tensors.count",
)
_U32_VALUE, _HEADER_START = 4, 24


@dataclass(frozen=True)
class Job:
    """A quantization: ``type_name`` as llama-quantize knows it; ``types`` gives every tensor its type when a
    recipe chooses them, None when llama-quantize does; ``metadata`` are text values for the new file."""

    source: Path
    type_name: str
    types: Mapping[str, str] | None = None
    imatrix: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    requantize: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a job will make: type of every tensor by name, bits per weight, bytes of the file, and the tensors
    that could not take the type asked for."""

    types: dict[str, str]
    bits: float
    file_bytes: int
    fallbacks: int


def label(types: Mapping[str, str], values: Mapping[str, int]) -> str:
    """The type that a file with these types of tensors is labelled with: that of most of its quantized
    weights. ``values`` are the values of each tensor. Raises UsageError when nothing is quantized."""
    weights: Counter[str] = Counter()
    for name, kind in types.items():
        if not is_float(kind):
            weights[kind] += values[name]
    if not weights:
        raise UsageError("the recipe quantizes no tensor of this model", remedy="--types BF16")
    most = max(weights, key=lambda kind: (weights[kind], kind))
    return _LABELS.get(most, most.upper())


def forecast(job: Job, build: Build, *, log: Path | None = None) -> Forecast:
    """What a job will make, by llama-quantize's own dry run. Raises ToolError, and ModelError when it would
    not give the tensors the types of the job."""

    def attempt() -> tuple[list[tool.TensorLine], tool.Outcome]:
        output, rc = _run(job, None, build, log)
        outcome = tool.parse(rc, output)
        return tool.parse_tensors(output), outcome

    lines, outcome = retried(attempt)
    types = {line.name: line.target for line in lines}
    for name, kind in (job.types or {}).items():
        if types.get(name) != kind:
            raise ModelError(f"llama-quantize would make {name} {types.get(name)} instead of {kind}")
    sizes = [type_bytes(line.target, _values(line.shape), line.shape[0]) for line in lines]
    weights = sum(_values(line.shape) for line in lines)
    size = _header_bytes(model_header(job.source), job, lines) + sum(pad(size) for size in sizes)
    return Forecast(types, 8 * sum(sizes) / weights, size, outcome.fallbacks)


def make(
    job: Job,
    out: Path,
    build: Build,
    planned: Mapping[str, str],
    *,
    log: Path | None = None,
    listener: Listener = SILENT,
) -> GgufFacts:
    """Quantize straight into ``out`` and check that every tensor has the planned type. Raises ToolError or
    ModelError; then ``out`` may be left half-made."""

    def on_stderr(line: str) -> None:
        begun = tool.tensors_done(line)[0]
        if begun:
            listener.reach(begun - 1)

    output, rc = _run(job, out, build, log, on_stderr)
    beyond = tool.not_held(output) if rc else None
    if beyond is not None:
        kind = planned.get(beyond, job.type_name).upper()
        raise ModelError(
            f"{beyond} has values that {kind} does not hold: beyond its range, or no numbers",
            remedy="BF16 and F32 hold all; a value so large may also be damage",
        )
    tool.parse(rc, output)
    facts = read_gguf(out)
    verify_types(facts, planned, job.type_name)
    for loss in losses(job.source, out):
        if not loss.error <= loss.most:
            raise ModelError(
                f"{loss.tensor} as {loss.kind} is not what it was made of: its error is {loss.error:.2g} of "
                f"its values, where this type should cost {loss.most:.2g} at most",
                remedy="without --imatrix, if one was given, or a larger type; its values may be too small "
                "or too large for this one",
            )
    return facts


def quantize_file(
    source: Path,
    out: Path,
    types: Mapping[str, str],
    build: Build,
    *,
    imatrix: Path | None = None,
    log: Path | None = None,
    listener: Listener = SILENT,
) -> Path:
    """Quantize ``source`` to ``out`` with exactly these types (every tensor by name); ``out`` appears when it
    is whole and checked. Raises ToolError or ModelError."""
    values = {tensor.name: tensor.values for tensor in model_header(source).tensors}
    job = Job(source, label(types, values), types, imatrix)
    with paths.atomic_path(out) as temporary:
        make(job, temporary, build, types, log=log, listener=listener)
    return out


def _run(
    job: Job,
    out: Path | None,
    build: Build,
    log: Path | None,
    on_stderr: Callable[[str], None] | None = None,
) -> tuple[str, int]:
    """Output and exit status of llama-quantize; a dry run without ``out``."""
    with _tensor_types(job.types) as types:
        # The name of the matrix is written into the file as it is given here: it must not be a path.
        args = tool.arguments(
            job.source.absolute(),
            out.absolute() if out is not None else None,
            job.type_name,
            imatrix=Path(job.imatrix.name) if job.imatrix is not None else None,
            dry_run=out is None,
            requantize=job.requantize,
            tensor_types=types,
            metadata=job.metadata,
            alignment=ALIGNMENT if read_header(job.source).alignment != ALIGNMENT else None,
        )
        done = proc.run(
            [build.tool("llama-quantize"), *args],
            cwd=job.imatrix.absolute().parent if job.imatrix is not None else None,
            log=log,
            check=False,
            on_stderr=on_stderr,
        )
    return done.stderr + done.stdout, done.rc


@contextmanager
def _tensor_types(types: Mapping[str, str] | None) -> Iterator[Path | None]:
    """A file that llama-quantize reads the types from: a command line would be too long for large models."""
    if types is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="ggufrq-") as folder:
        path = Path(folder) / "tensor-types.txt"
        path.write_text(tool.tensor_type_lines(types), encoding="utf-8")
        yield path


def _header_bytes(source: Header, job: Job, lines: list[tool.TensorLine]) -> int:
    """Bytes of the new file before its data: the metadata of the source, changed as llama-quantize does, and
    the list of tensors."""
    new: dict[str, int] = {key: _U32_VALUE for key in _REPLACED[:2]}
    new |= {key: 8 + len(value.encode()) for key, value in job.metadata.items()}
    new |= _imatrix_values(job.imatrix)
    kept = sum(size for key, size in source.value_bytes.items() if key not in new and key not in _REPLACED)
    added = sum(8 + len(key.encode()) + 4 + size for key, size in new.items())
    infos = sum(8 + len(line.name.encode()) + 4 + 8 * len(line.shape) + 4 + 8 for line in lines)
    return pad(_HEADER_START + kept + added + infos)


def _imatrix_values(imatrix: Path | None) -> dict[str, int]:
    """Bytes of the values by which llama-quantize tells of an importance matrix."""
    if imatrix is None:
        return {}
    values: dict[str, Any] = read_header(imatrix).values
    sizes = {"quantize.imatrix.file": 8 + min(len(imatrix.name.encode()), tool.LONGEST_VALUE)}
    datasets = values.get("imatrix.datasets")
    if datasets:
        sizes["quantize.imatrix.dataset"] = 8 + min(len(datasets[0].encode()), tool.LONGEST_VALUE)
    sizes["quantize.imatrix.entries_count"] = _U32_VALUE
    if values.get("imatrix.chunk_count", 0) > 0:
        sizes["quantize.imatrix.chunks_count"] = _U32_VALUE
    return sizes


def _values(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count

"""Folding a file: what will be said of it, and the folded copy with the matrix that belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import log
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.progress import progress
from ggufrq.build.project import Build
from ggufrq.ggufs.files import model_header
from ggufrq.ggufs.tensors import is_float, type_name
from ggufrq.make.fold import awq, imatrix, kv
from ggufrq.make.fold.facts import KEY, architecture_of, pairs
from ggufrq.make.fold.folding import Folding
from ggufrq.make.fold.weights import Weights, write_changed

#: The kinds of folding, and what each is good for.
KINDS = {
    "awq": "the weights quantize better",
    "kv": "keys quantize better in a cache of any runtime",
}
#: Part of what tells folded files from one another; to be raised when the same input gives other files.
_VERSIONS = {"awq": 1, "kv": 2}


@dataclass(frozen=True)
class Folded:
    """A folded model, the importance matrix that belongs to it when there was one, and what was found."""

    model: Path
    imatrix: Path | None
    folding: Folding


def identity(kind: str) -> str:
    """What tells files that were folded in this way from others."""
    return f"{kind}/{_VERSIONS[kind]}"


def metadata(kind: str, model: Path) -> dict[str, str]:
    """What a folded file says of itself: text values, known before it is folded. Raises ModelError when the
    model cannot be folded in this way."""
    header = model_header(model)
    infos = header.tensors
    architecture = architecture_of(header.values, model.name)
    for info in infos:
        if not is_float(type_name(info.type) or ""):
            raise ModelError(
                f"{info.name} of {model.name} is quantized; only models in 16 or 32 bits can be folded",
                remedy="start from the F16 or BF16 file or the original model",
            )
    names: Iterable[str]
    if kind == "kv":
        names = kv.parts(architecture, infos)
    else:
        names = dict.fromkeys(pair.rule.name for pair in pairs(architecture, infos))
    return {KEY: kind, f"{KEY}.version": str(_VERSIONS[kind]), f"{KEY}.parts": " ".join(names)}


def check_types(kind: str, types: Mapping[str, str], label: str) -> None:
    """Raise UsageError when there is nothing to gain: AWQ is for types that lose something."""
    if kind == "awq" and all(is_float(name) for name in types.values()):
        raise UsageError(
            f"--fold awq is for quantized types; {label} keeps the weights", remedy="--types Q4_K_M"
        )


def fold(
    kind: str,
    model: Path,
    out: Path,
    types: Mapping[str, str],
    build: Build,
    *,
    matrix: Path | None = None,
    known: Folding | None = None,
) -> Folded:
    """Write ``model`` folded for ``types`` (of every tensor, by name) into the new folder ``out``, and beside
    it the importance matrix ``matrix`` for it, under its name.

    ``awq`` needs the matrix. ``known`` is what an earlier call found for the same model: nothing is searched
    again. Raises ModelError, UsageError or ToolError.
    """
    said = metadata(kind, model)
    out.mkdir()
    path = out / "folded.gguf"
    with Weights(model) as weights:
        if known is not None:
            folding = known
        elif kind == "awq":
            if matrix is None:
                raise UsageError("--fold awq needs an importance matrix", remedy="--calibrate TEXT")
            with progress("Searching scales", unit="pairs") as bar:
                folding = awq.find(weights, matrix, types, build, listener=bar)
        else:
            with progress("Scales of keys", unit="layers") as bar:
                folding = kv.find(weights, model, listener=bar)
        with progress("Folding", len(weights.places), unit="tensors") as bar:
            write_changed(weights, path, folding.changes, said, listener=bar)
    log.say(summary(folding))
    made = None
    if matrix is not None:
        made = out / matrix.name
        imatrix.write_folded(matrix, made, folding.changes)
    return Folded(path, made, folding)


def summary(folding: Folding) -> str:
    """How much was folded and what it is expected to gain, in a line."""
    gains = sorted(found.gain for found in folding.found if found.gain > 1)
    return (
        f"folded {len(gains)} of {len(folding.found)} places; the error to be expected there falls by "
        f"{100 * (1 - 1 / gains[len(gains) // 2]):.1f} % (median)"
    )

"""What quantizing the parts of a model should cost, from its weights and its importance matrix alone: no
forward passes.

A tensor's error in a type is the mean square error of its products with the inputs that the importance matrix
has seen, as a share of the products' own: a sample of its rows goes through the very code that llama-quantize
runs. Such relative errors add up linearly to the loss of a model as long as they are small, each with a
factor of its own (V. Malinovskii et al., Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem, 2024). The factors here are one for each class of tensors, in ``quick.toml``, fitted to
what was measured on one model. They tell classes from each other; the loss itself has to be measured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ggufrq.base import machine, parallel
from ggufrq.base.progress import SILENT, Listener
from ggufrq.base.toml import tomllib
from ggufrq.build.project import Build
from ggufrq.ggufs.tensors import Inventory, Tensor, is_float
from ggufrq.make.fold import imatrix
from ggufrq.make.fold.changes import F32, F64
from ggufrq.make.fold.codes import Codes
from ggufrq.make.fold.weights import Weights
from ggufrq.make.recipe import class_of
from ggufrq.search.sensitivity.parts import Unit, layers

#: Rows of a tensor that are looked at, in so many pieces over all its experts and rows.
_ROWS, _PIECES = 256, 16


def costs(
    model: Inventory,
    gguf: Path,
    matrix: Path | None,
    units: Sequence[Unit],
    build: Build,
    *,
    listener: Listener = SILENT,
) -> dict[Unit, list[float]]:
    """What each option of each unit should cost, by the class of its tensors: comparable with each other, and
    nothing more. ``gguf`` is the model in 16 bits, ``listener`` is told of its tensors. Raises ModelError for
    a file that is cut short."""
    wanted: dict[Tensor, set[str]] = {}
    for unit in units:
        for option in unit.options:
            for tensor in unit.tensors:
                wanted.setdefault(tensor, set()).add(option.types[tensor.name])
    found = errors(gguf, matrix, wanted, build, listener=listener)
    tied = all(tensor.name != "output.weight" for tensor in model)
    depth = max(1, layers(model))
    # A layer changes its share of what all of them add up to
    scale = {
        tensor.name: factor(class_of(tensor.name, model.architecture), tied=tied)
        / (depth if tensor.name.startswith("blk.") else 1)
        for tensor in wanted
    }
    return {
        unit: [sum(scale[n] * found[n, kind] for n, kind in option.types.items()) for option in unit.options]
        for unit in units
    }


def errors(
    gguf: Path,
    matrix: Path | None,
    wanted: Mapping[Tensor, Iterable[str]],
    build: Build,
    *,
    listener: Listener = SILENT,
) -> dict[tuple[str, str], float]:
    """Relative errors by name of the tensor and type, of a sample of its rows."""
    power = imatrix.read(matrix) if matrix is not None else {}
    codes = Codes(build)
    found: dict[tuple[str, str], float] = {}
    reading = threading.Lock()
    with Weights(gguf) as weights:

        def take(tensor: Tensor) -> None:
            with reading:
                sample = _sample(weights, tensor.name)
            seen = power.get(tensor.name)
            for kind in sorted(wanted[tensor]):
                same = kind == tensor.type or is_float(kind)
                found[tensor.name, kind] = 0.0 if same else _error(codes, kind, sample, seen)

        for _ in parallel.each(take, list(wanted), machine.cores()):
            listener.advance()
    return found


@dataclass(frozen=True)
class _Piece:
    """Some rows [rows, columns] of one expert."""

    expert: int
    values: F32


def _sample(weights: Weights, name: str) -> list[_Piece]:
    """Rows from all over a tensor, all of them where there are few."""
    experts, rows, _ = weights.shape(name)
    if experts * rows <= _ROWS:
        return [_Piece(expert, weights.read(name, expert)) for expert in range(experts)]
    count = _ROWS // _PIECES
    # Steps of an irrational share of the whole, so that experts are not met at the same row each
    firsts = [int(experts * rows * ((0.5 + i * 0.6180339887498949) % 1)) for i in range(_PIECES)]
    places = sorted((first // rows, min(first % rows, max(0, rows - count))) for first in firsts)
    return [_Piece(expert, weights.read(name, expert, first, min(count, rows))) for expert, first in places]


def _error(codes: Codes, kind: str, sample: Sequence[_Piece], seen: F64 | None) -> float:
    """The relative error of a sample in a type, weighed by the mean squares of the inputs [experts, columns],
    or by none."""
    lost = whole = 0.0
    for piece in sample:
        power = None if seen is None else seen[piece.expert % len(seen)]
        weight = np.ones(piece.values.shape[1]) if power is None else power
        # Types of few bits are not made without an importance, and of all ones it is none
        decoded = codes.decoded(kind, piece.values, weight.astype(np.float32))
        lost += float((np.square(decoded - piece.values, dtype=np.float64) @ weight).sum())
        whole += float((np.square(piece.values, dtype=np.float64) @ weight).sum())
    return lost / whole if whole else 0.0


def factor(group: str | None, *, tied: bool) -> float:
    """By what the relative error of a class counts, or of tensors of no class; ``tied``: the embedding
    computes the output, too."""
    table = _factors()
    if tied and group == "token_embd":
        group = "output"
    return table.get(group or "", table["other"])


@cache
def _factors() -> dict[str, float]:
    data = tomllib.loads(Path(__file__).with_name("quick.toml").read_text(encoding="utf-8"))
    return {name: float(value) for name, value in data["factors"].items()}

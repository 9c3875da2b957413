"""The importance matrix as folding sees it: how large the inputs of each tensor are, and what is left of that
when a tensor's columns are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ggufrq.ggufs import imatrix
from ggufrq.make.fold.changes import F32, F64, Change


def read(path: Path) -> dict[str, F64]:
    """Mean square of each input of each tensor, [experts, columns], from a matrix that llama-imatrix wrote.
    Experts that no token reached have ones, as llama-quantize takes it. Raises ModelError."""
    found = {}
    for name, entry in imatrix.read(path).entries.items():
        counts = entry.counts.astype(np.float64).reshape(-1, 1)
        found[name] = np.where(counts > 0, entry.sums.astype(np.float64) / np.maximum(counts, 1), 1.0)
    return found


def write_folded(path: Path, out: Path, changes: Mapping[str, Change]) -> None:
    """Write the matrix ``path``, for a model whose weights were changed by ``changes``, to ``out``."""
    whole = imatrix.read(path)
    entries = {
        name: replace(entry, sums=_divided(entry.sums, changes[name])) if name in changes else entry
        for name, entry in whole.entries.items()
    }
    imatrix.write(replace(whole, entries=entries), out)


def _divided(sums: F32, inputs: Change) -> F32:
    """Sums of squares [experts, columns] where ``inputs`` changes the weights."""
    out: F64 = sums.astype(np.float64)
    if inputs.columns is not None:
        out /= np.square(inputs.columns)
    return out.astype(np.float32)

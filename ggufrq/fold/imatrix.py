"""The importance matrix as folding sees it: how large the inputs of each tensor are, and what is left of that
when a tensor's columns are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ggufrq.fold.changes import F32, F64, Change, turned
from ggufrq.fold.weights import Weights, write_changed

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read(path: Path) -> dict[str, F64]:
    """Mean square of each input of each tensor, [experts, columns], from a matrix that llama-imatrix wrote.
    Experts that no token reached have ones, as llama-quantize takes it."""
    found = {}
    with Weights(path) as matrix:
        for info in matrix.tensors:
            if not info.name.endswith(_SUMS):
                continue
            name = info.name.removesuffix(_SUMS)
            sums = matrix.whole(info.name).astype(np.float64)
            counts = matrix.whole(name + _COUNTS).astype(np.float64).reshape(-1, 1)
            found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
    return found


@dataclass(frozen=True)
class _Divided(Change):
    """Sums of squares [experts, columns] where ``inputs`` changes the weights."""

    inputs: Change = field(default_factory=Change)

    def apply(self, values: F32, expert: int, first: int) -> F32:
        """As ``Change.apply``: one row per expert."""
        out: F64 = values.astype(np.float64)
        if self.inputs.columns is not None:
            factors = self.inputs.columns
            out /= np.square(factors[first : first + len(out)] if len(factors) > 1 else factors)
        if self.inputs.turn_columns is not None:
            # exact where the inputs of a head are not correlated, which their squares cannot tell
            out = turned(out, np.square(self.inputs.turn_columns))
        return out.astype(np.float32)


def write_folded(path: Path, out: Path, changes: Mapping[str, Change]) -> None:
    """Write the matrix ``path``, for a model whose weights were changed by ``changes``, straight into
    ``out``."""
    with Weights(path) as matrix:
        names = [info.name.removesuffix(_SUMS) for info in matrix.tensors if info.name.endswith(_SUMS)]
        divided = {name + _SUMS: _Divided(inputs=changes[name]) for name in names if name in changes}
        write_changed(matrix, out, divided, {})

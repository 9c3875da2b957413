"""What folding does to the values of one tensor: factors for its rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufrq.base.errors import ModelError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """A tensor is [experts, rows, columns] here, a vector one row. ``rows`` [experts or 1, rows] and
    ``columns`` [experts or 1, columns] are factors."""

    rows: F64 | None = None
    columns: F64 | None = None

    def then(self, other: Change) -> Change:
        """Both changes in one."""
        return Change(_product(self.rows, other.rows), _product(self.columns, other.columns))

    def apply(self, values: F32, expert: int, first: int) -> F32:
        """The change of rows ``first`` and following of one expert, ``values`` [rows, columns]."""
        out = values.astype(np.float64)
        if self.columns is not None:
            out *= self.columns[expert % len(self.columns)]
        if self.rows is not None:
            out *= self.rows[expert % len(self.rows), first : first + len(out), None]
        return out.astype(np.float32)


def as_type(values: F32, kind: str, name: str) -> npt.NDArray[np.generic]:
    """Values in the type ``f32`` or ``f16``. Raises ModelError when they do not fit into it."""
    if kind == "f32":
        return values
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise ModelError(
            f"{name} has a value of {largest:g} after folding, which f16 cannot hold",
            remedy="leave out --fold, or start from a GGUF in F32",
        )
    return values.astype(np.float16)


def _product(a: F64 | None, b: F64 | None) -> F64 | None:
    return b if a is None else a if b is None else a * b

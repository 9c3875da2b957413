"""What folding does to the values of one tensor: factors for its rows and columns, and rotations of heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ggufrq.base.errors import ModelError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """A tensor is [experts, rows, columns] here, a vector one row. ``rows`` [experts or 1, rows] and
    ``columns`` [experts or 1, columns] are factors; ``turn_rows`` and ``turn_columns`` are matrices [d, d]
    that each d rows or columns are multiplied by: W -> turn_rows W turn_columns^T, block by block."""

    rows: F64 | None = None
    columns: F64 | None = None
    turn_rows: F64 | None = None
    turn_columns: F64 | None = None

    def then(self, other: Change) -> Change:
        """Both changes in one. ValueError where they would have to be kept in order."""
        for side in ("rows", "columns"):
            mine, theirs = (
                {name for name in (side, f"turn_{side}") if getattr(change, name) is not None}
                for change in (self, other)
            )
            if mine and theirs and (mine | theirs) != {side}:
                raise ValueError(f"{side} are turned and scaled, or turned twice")
        return replace(
            self,
            rows=_product(self.rows, other.rows),
            columns=_product(self.columns, other.columns),
            turn_rows=other.turn_rows if self.turn_rows is None else self.turn_rows,
            turn_columns=other.turn_columns if self.turn_columns is None else self.turn_columns,
        )

    @property
    def step(self) -> int:
        """Rows that must be changed together."""
        return 1 if self.turn_rows is None else len(self.turn_rows)

    def apply(self, values: F32, expert: int, first: int) -> F32:
        """The change of rows ``first`` and following of one expert, ``values`` [rows, columns]; whole heads
        where rows are turned."""
        out = values.astype(np.float64)
        if self.columns is not None:
            out *= self.columns[expert % len(self.columns)]
        if self.turn_columns is not None:
            out = turned(out, self.turn_columns)
        if self.turn_rows is not None:
            blocks = out.reshape(-1, len(self.turn_rows), out.shape[1])
            out = (self.turn_rows @ blocks).reshape(out.shape)
        if self.rows is not None:
            out *= self.rows[expert % len(self.rows), first : first + len(out), None]
        return out.astype(np.float32)


def turned(values: F64, matrix: F64) -> F64:
    """Every d values of a row multiplied by ``matrix`` [d, d]."""
    out: F64 = (values.reshape(len(values), -1, len(matrix)) @ matrix.T).reshape(values.shape)
    return out


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

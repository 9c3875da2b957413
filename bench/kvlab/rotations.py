"""Rotation matrices for heads of 256 values that are rotated in halves, for comparison with the codec's."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from ggufrq.codec.rotate import Family, Mode, rotation_matrix

F32 = npt.NDArray[np.float32]


@cache
def rotation(family: Family, mode: Mode, dim: int, size: int = 128) -> F32:
    """Rotation of heads of ``dim`` values, ``size`` (128 or 256) values at a time, float32 [dim, dim], its
    own inverse. Raises ValueError."""
    if dim % size:
        raise ValueError(f"heads of {dim} values cannot be rotated {size} at a time")
    return np.kron(np.eye(dim // size, dtype=np.float32), rotation_matrix(family, mode, size))

"""The rotation of a head in mx."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from ggufrq.base.errors import ModelError
from ggufrq.codec.rotate import SIZES, Family, rotation_matrix


@cache
def rotation(family: Family, dim: int) -> mx.array:
    """The rotation of heads of ``dim`` values, float32 [dim, dim], its own inverse: over 256 values where
    they divide a head, else over 128 or 64. Raises ModelError when 64 does not divide ``dim``."""
    size = next((n for n in sorted(SIZES, reverse=True) if dim % n == 0), None)
    if size is None:
        raise ModelError(
            f"heads of {dim} values cannot be kept in types of ggufrq: they are no multiple of 64",
            remedy="a cache of mlx-lm: KVCache, or QuantizedKVCache",
        )
    one = rotation_matrix(family, "full", size)
    return mx.array(np.kron(np.eye(dim // size, dtype=np.float32), one))

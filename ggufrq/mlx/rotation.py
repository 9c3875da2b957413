"""The rotation of a head in mx."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from ggufrq.base.errors import ModelError
from ggufrq.codec.rotate import Family, head_rotation


@cache
def rotation(family: Family, dim: int) -> mx.array:
    """``head_rotation`` of heads of ``dim`` values. Raises ModelError when 64 does not divide ``dim``."""
    try:
        return mx.array(head_rotation(family, dim))
    except ValueError as error:
        raise ModelError(str(error), remedy="a cache of mlx-lm: KVCache, or QuantizedKVCache") from None

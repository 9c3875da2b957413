"""What K and V are stored in: a rotation, and for K the metric of a profile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from ggufrq.base.errors import ModelError
from ggufrq.codec.rotate import Family, head_rotation
from ggufrq.profile import LayerProfile


@dataclass(frozen=True)
class Basis:
    """Stored is (x - ``mean``) · ``into``, and queries are multiplied by ``query``, the transpose of its
    inverse. Both maps are [1 or heads, dim, dim]; the mean is [heads, 1, dim], or None."""

    into: mx.array
    query: mx.array
    mean: mx.array | None = None

    def store(self, x: mx.array) -> mx.array:
        """x [batch, heads, cells, dim] as it is stored, float32."""
        return self.centred(x.astype(mx.float32)) @ self.into

    def centred(self, x: mx.array) -> mx.array:
        """x without the mean, which adds as much to all scores of a query and so to none."""
        return x if self.mean is None else x - self.mean

    def restore(self, stored: mx.array) -> mx.array:
        """The inverse of ``store``, where there is no mean."""
        return stored @ self.query.swapaxes(-1, -2)

    def like(self, other: Basis | None) -> bool:
        """Whether it is the same as another one."""
        if other is None or (self.mean is None) != (other.mean is None):
            return False
        same = self.into is other.into or mx.array_equal(self.into, other.into).item()
        return bool(same and (self.mean is other.mean or mx.array_equal(self.mean, other.mean).item()))


@cache
def of_rotation(family: Family, dim: int) -> Basis:
    """The rotation of heads of ``dim`` values alone. Raises ModelError when 64 does not divide ``dim``."""
    try:
        turned = mx.array(head_rotation(family, dim))
    except ValueError as error:
        raise ModelError(str(error), remedy="a cache of mlx-lm: KVCache, or QuantizedKVCache") from None
    return Basis(turned, turned)


def of_profile(family: Family, profile: LayerProfile) -> Basis:
    """The rotation behind a profile's maps, for K."""
    turned = head_rotation(family, profile.k_map.shape[1]).astype(np.float64)
    into, query = (mx.array((m @ turned).astype(np.float32)) for m in (profile.k_map, profile.q_map))
    mean = None if profile.k_mean is None else mx.array(profile.k_mean[:, None].astype(np.float32))
    return Basis(into, query, mean)

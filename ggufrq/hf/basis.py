"""What K and V are stored in: a rotation, and for K the metric of a profile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ggufrq.base.errors import ModelError
from ggufrq.codec.rotate import Family, head_rotation
from ggufrq.profile.file import LayerProfile


@dataclass(frozen=True)
class Basis:
    """Stored is ``into`` · (x - ``mean``), queries are multiplied by ``query``. Both maps are [1 or heads,
    dim, dim], ``query`` the transpose of the inverse of ``into``; the mean is [heads, 1, dim], or None."""

    into: torch.Tensor
    query: torch.Tensor
    mean: torch.Tensor | None = None

    def store(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, heads, cells, dim] as it is stored, float32."""
        x = x.float() if self.mean is None else x.float() - self.mean
        return x @ self.into.mT

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """q [batch, heads, queries, dim] as it meets what is stored, but for what the mean adds to all scores
        of a query alike (``shared``)."""
        return q.float() @ self.query.mT

    def shared(self, q: torch.Tensor) -> torch.Tensor | None:
        """What the mean adds to all scores of each query in q [batch, heads, queries, dim], [batch, heads,
        queries, 1]; None without a mean."""
        return None if self.mean is None else q.float() @ self.mean.mT

    def restore(self, stored: torch.Tensor) -> torch.Tensor:
        """The inverse of ``store``."""
        x = stored @ self.query
        return x if self.mean is None else x + self.mean


def basis(
    family: Family, heads: int, dim: int, device: torch.device, profile: LayerProfile | None = None
) -> Basis:
    """The basis for ``heads`` heads of ``dim`` values: the rotation of the family, over 256 values where they
    divide a head, else over 128 or 64, behind the profile's maps.

    Raises ModelError when 64 does not divide ``dim``, or the profile is for other heads.
    """
    try:
        rotation = head_rotation(family, dim).astype(np.float64)
    except ValueError as error:
        raise ModelError(
            str(error), remedy="a cache of transformers: DynamicCache, or QuantizedCache"
        ) from None
    into = query = rotation[None]
    mean = None
    if profile is not None:
        if profile.k_map.shape[:2] != (heads, dim):
            raise ModelError(
                f"the profile is for {profile.k_map.shape[0]} heads of {profile.k_map.shape[1]} values, and "
                f"the model has {heads} of {dim}",
                remedy="the profile of this very model",
            )
        into, query = rotation @ profile.k_map, rotation @ profile.q_map
        if profile.k_mean is not None:
            mean = torch.tensor(profile.k_mean[:, None], dtype=torch.float32, device=device)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Basis(tensor(into), tensor(query), mean)

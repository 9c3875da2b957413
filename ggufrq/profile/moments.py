"""Moments of Q and K before RoPE, foretold from the weights alone.

Behind a norm the inputs of a layer are taken as white: x = w ⊙ z + b with z of mean 0 and covariance 1, w and
b being the norm's weights and bias. A LayerNorm takes the mean over the channels out, so there z has
covariance 1 - 11ᵀ/n. Then a projection W x + c has mean W b + c and covariance (W diag w)(W diag w)ᵀ. QK-norm
divides by the root mean square, here by the root of its mean, and multiplies by its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """First and second moments of the heads of a layer: ``mean`` [heads, dim], ``second`` [heads, dim, dim]
    (E[x xᵀ], the mean not taken out)."""

    mean: F64
    second: F64

    @property
    def covariance(self) -> F64:
        """Second moments around the mean."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(frozen=True)
class Input:
    """What a projection reads: ``weight`` and ``bias`` [n] of the norm before it, none where nothing is
    multiplied or added; ``centered`` when the norm takes the mean over the channels out."""

    weight: F64 | None = None
    bias: F64 | None = None
    centered: bool = False


def project(rows: F32, source: Input, bias: F64 | None = None) -> tuple[F64, F64]:
    """Mean [dim] and second moment [dim, dim] of one head: ``rows`` [dim, n] are those of the projection,
    ``bias`` [dim] is its own.

    The product is taken in 32 bits: its error is far below the ridge of the solution, and it is half the
    time.
    """
    mean = np.zeros(len(rows)) if bias is None else np.asarray(bias, np.float64)
    if source.bias is not None:
        mean = mean + rows @ source.bias
    if source.weight is not None:
        rows = rows * source.weight.astype(np.float32)
    if source.centered:
        rows = rows - rows.mean(axis=1, keepdims=True)
    return mean, (rows @ rows.T).astype(np.float64) + np.outer(mean, mean)


def normalize(
    moments: Moments,
    weight: F64 | None,
    bias: F64 | None = None,
    *,
    whole: bool = False,
    centered: bool = False,
) -> Moments:
    """Moments behind QK-norm with ``weight`` and ``bias``, which broadcast to [heads, dim]; ``whole`` when
    all heads are normalized together, ``centered`` when it is a LayerNorm of each head."""
    mean, second = moments.mean, moments.second
    if centered and not whole:
        mean = mean - mean.mean(axis=-1, keepdims=True)
        second = second - second.mean(axis=-1, keepdims=True)
        second = second - second.mean(axis=-2, keepdims=True)
    square = np.trace(second, axis1=1, axis2=2) / second.shape[-1]
    square = np.full_like(square, square.mean()) if whole else square
    factor = 1 / np.sqrt(np.where(square > 0, square, 1.0))[:, None] * np.ones_like(mean)
    if weight is not None:
        factor = factor * weight
    mean, second = mean * factor, second * factor[:, :, None] * factor[:, None, :]
    if bias is not None:
        shift = np.broadcast_to(bias, mean.shape)
        cross = mean[:, :, None] * shift[:, None, :]
        second = second + cross + np.swapaxes(cross, 1, 2) + shift[:, :, None] * shift[:, None, :]
        mean = mean + shift
    return Moments(mean, second)


def grouped(moments: Moments, kv_heads: int) -> F64:
    """Mean second moment [kv_heads, dim, dim] of the query heads that share a head of K, which follow each
    other."""
    heads, dim = moments.mean.shape
    return np.asarray(moments.second.reshape(kv_heads, heads // kv_heads, dim, dim).mean(axis=1))

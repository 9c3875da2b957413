"""The metric of the queries: the symmetric matrix A for which K is stored as A (k - μ) and queries as A⁻¹ q.

An error δ of what is stored costs δᵀ A⁻¹ Σq A⁻¹ δ in squared scores, and a code with one scale makes errors
that follow tr(A Σk A), alike in all directions once rotated. So tr(Σk A²) · tr(Σq A⁻²) is to be least. Its
minimum over positive definite A is (tr (Σk^½ Σq Σk^½)^½)², where A² Σk A² = Σq, that is

    A² = Σk^-½ (Σk^½ Σq Σk^½)^½ Σk^-½,

the matrix that carries Σk over to Σq (optimal transport between Gaussians).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

#: Added to both moments, as a part of their mean variance: directions that the weights make (nearly) empty
#: are not empty in a real text, and A must stay well conditioned.
RIDGE = 1e-3


@dataclass(frozen=True)
class Metric:
    """A and its inverse, each [..., dim, dim] and symmetric, and by how much they make the product of the two
    traces smaller [...]."""

    forward: F64
    inverse: F64
    gain: F64


def solve(k: F64, q: F64, ridge: float = RIDGE) -> Metric:
    """The best metric for covariances of K and second moments of Q, both [..., dim, dim].

    A is scaled so that what is stored has the mean square of K itself: tr(A Σk A) = tr Σk.
    """
    k, q = _ridged(k, ridge), _ridged(q, ridge)
    root, root_inverse = _powers(k, 0.5, -0.5)
    (middle,) = _powers(root @ q @ root, 0.5)
    square = root_inverse @ middle @ root_inverse
    forward, inverse = _powers(square, 0.5, -0.5)
    gain = _trace(k) * _trace(q) / _trace(middle) ** 2
    scale = np.sqrt(_trace(k) / _trace(k @ square))[..., None, None]
    return Metric(forward * scale, inverse / scale, gain)


def _ridged(moment: F64, ridge: float) -> F64:
    """Symmetric, positive definite; a head that the weights leave empty counts as white."""
    dim = moment.shape[-1]
    mean = _trace(moment)[..., None, None] / dim
    white = np.eye(dim)
    return np.where(mean > 0, (moment + np.swapaxes(moment, -1, -2)) / 2 + ridge * mean * white, white)


def _powers(matrix: F64, *exponents: float) -> tuple[F64, ...]:
    """Powers of symmetric positive definite matrices [..., dim, dim]."""
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, -1, -2)) / 2)
    values = np.maximum(values, np.finfo(np.float64).tiny)
    return tuple((vectors * (values**e)[..., None, :]) @ np.swapaxes(vectors, -1, -2) for e in exponents)


def _trace(matrix: F64) -> F64:
    return np.asarray(np.trace(matrix, axis1=-2, axis2=-1), np.float64)

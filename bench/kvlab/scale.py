"""The scale of a block for code points that have been chosen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def fitted(x: F32, points: F32, inner: bool = False) -> F32:
    """``points`` [n, b] times the fp16 scale of least squares for x, or with ``inner`` of x.y = x.x."""
    tiny = np.float32(1e-12)
    cross = np.einsum("ij,ij->i", x, points)
    if inner:
        d = np.einsum("ij,ij->i", x, x) / np.maximum(cross, tiny)
    else:
        d = cross / (np.einsum("ij,ij->i", points, points) + tiny)
    half = np.minimum(d, 65504).astype(np.float16).astype(np.float32)
    return np.asarray(points * half[:, None], np.float32)

"""Rows of values that are hard on a code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def hard(block: int) -> F32:
    """Gaussian, heavy-tailed, tiny and huge rows, and any bit pattern at all."""
    rng = np.random.default_rng(5)
    powers = np.exp2(rng.integers(-45, 60, (300, 1)).astype(np.float32))
    parts = [
        rng.standard_normal((300, block)),
        rng.standard_t(1.5, (200, block)),
        rng.standard_normal((300, block)) * powers,
        np.zeros((2, block)),
        np.full((2, block), 1e9),
    ]
    patterns = rng.integers(0, 2**32, (300, block), dtype=np.uint32).view(np.float32)
    return np.concatenate([np.concatenate(parts).astype(np.float32), patterns])

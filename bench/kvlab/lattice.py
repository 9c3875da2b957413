"""Lattice codes: D4 and E8 points within a sphere, three bits per value, and an fp16 scale per block.

Nearest points after Conway and Sloane (Fast quantizing and decoding algorithms for lattice quantizers, IEEE
Trans. Inf. Theory 28, 1982). A sphere of D4 holds 3961 points of squared length 40 or less, one of E8 the
largest number below 2**24.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvlab.scale import fitted

F32 = npt.NDArray[np.float32]
Name = Literal["d4", "e8"]
#: Lattice steps that are tried, in deviations of a block.
_STEPS = {"d4": (0.40, 0.44, 0.48, 0.53, 0.58), "e8": (0.46, 0.50, 0.54, 0.59, 0.64)}


@cache
def radius(name: Name) -> int:
    """Largest squared length of a code's points, so that they number 2**12 (D4) or 2**24 (E8) at most."""
    points, length = 1, 0
    limit = 2 ** (12 if name == "d4" else 24)
    while True:
        n = length // 2 + 1
        shell = _shell(name, n)
        if points + shell > limit:
            return length
        points, length = points + shell, length + 2


def _shell(name: Name, n: int) -> int:
    """Number of points of squared length 2*n, from the theta series."""
    if name == "d4":
        return 24 * sum(d for d in range(1, 2 * n + 1, 2) if (2 * n) % d == 0)
    return 240 * sum(d**3 for d in range(1, n + 1) if n % d == 0)


def _nearest_d(x: F32) -> F32:
    """Nearest point of D_n: integers with an even sum."""
    y = np.rint(x)
    error = x - y
    odd = np.flatnonzero(y.sum(axis=1) % 2)
    worst = np.abs(error[odd]).argmax(axis=1)
    y[odd, worst] += np.where(error[odd, worst] >= 0, 1, -1)
    return np.asarray(y)


def _nearest(name: Name, x: F32) -> F32:
    y = _nearest_d(x)
    if name == "d4":
        return y
    z = _nearest_d(x - np.float32(0.5)) + np.float32(0.5)
    closer = ((x - z) ** 2).sum(axis=1) < ((x - y) ** 2).sum(axis=1)
    return np.where(closer[:, None], z, y)


def _inside(name: Name, x: F32) -> F32:
    """Nearest points within the sphere; vectors beyond it are drawn in until theirs is."""
    limit = radius(name)
    y = _nearest(name, x)
    out = np.flatnonzero((y * y).sum(axis=1) > limit)
    share = 1.0
    while len(out):
        length = np.sqrt((x[out] ** 2).sum(axis=1, keepdims=True))
        drawn = (x[out] * np.minimum(1, np.sqrt(limit) / length) * share).astype(np.float32)
        y[out] = _nearest(name, drawn)
        out = out[(y[out] ** 2).sum(axis=1) > limit]
        share *= 0.97
    return y


def lattice(x: F32, name: Name, inner: bool = False) -> F32:
    """What the code makes of x [n, b], 8 dividing b: the best of a few steps, then a fitted scale."""
    width = 4 if name == "d4" else 8
    sigma = np.sqrt((x * x).mean(axis=1, keepdims=True)) + np.float32(1e-12)
    best: F32 = np.zeros_like(x)
    least = np.full(len(x), np.inf)
    for step in _STEPS[name]:
        points = _inside(name, (x / (sigma * step)).reshape(-1, width).astype(np.float32)).reshape(x.shape)
        y = fitted(x, points)
        error = ((x - y) ** 2).sum(axis=1)
        better = error < least
        best[better] = points[better]
        least = np.where(better, error, least)
    return fitted(x, best, inner)

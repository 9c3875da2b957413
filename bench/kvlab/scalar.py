"""The scalar code in float32: the frozen codebooks, with the several ways to choose the scale of a block.

``lsq`` is the codec's own search without its integers, about ten times as fast as the reference; a test holds
it to that. The others exist to be compared with it. Codes of 1 and 6 bits, which the codec does not have,
get their codebook as the others got theirs.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ggufrq.codec.derive import STARTS, int8_centroids, lloyd_max
from ggufrq.codec.tables import code, load

F32 = npt.NDArray[np.float32]
Scale = Literal["lsq", "norm", "inner", "search", "best"]
#: Starts of widths that are not in the codec, as STARTS.
OTHER_STARTS = {1: (43, 52, 64), 6: (126, 144, 150)}


@cache
def _codebook(bits: int) -> tuple[F32, F32, float]:
    """Positive centroids with the outermost 1, thresholds between them, and the outermost in sigmas."""
    frozen = str(bits) in load()["codes"]
    positive = code(bits).magnitudes if frozen else int8_centroids(bits)[2 ** (bits - 1) :]
    magnitudes = np.asarray(np.array(positive, np.float32) / 127, np.float32)
    edges = np.asarray((magnitudes[1:] + magnitudes[:-1]) / 2, np.float32)
    return magnitudes, edges, lloyd_max(len(magnitudes))[-1]


def _nearest(a: F32, d: F32, bits: int) -> F32:
    """Centroid of each magnitude a [n, b] under the scales d [n]."""
    magnitudes, edges, _ = _codebook(bits)
    index = np.zeros(a.shape, np.int8)
    for edge in edges:
        index += a > (d * edge)[:, None]
    return np.asarray(magnitudes[index])


def _half(d: F32) -> F32:
    return d.astype(np.float16).astype(np.float32)


def scalar(x: F32, bits: int, scale: Scale = "lsq") -> F32:
    """What a block code makes of x [n, b]: float32 [n, b]. One fp16 scale per row.

    ``lsq``: least squares, the best of three starts, as the codec. ``norm``: the length of the row, as the
    method was published. ``inner``: indices as lsq, then the scale that keeps the row's product with itself,
    x.y = x.x, so that the code does not shrink. ``search``: the best of 24 starts, near the optimum of lsq;
    ``best``: that, and then the scale of inner.
    """
    a = np.abs(x)
    tiny = np.float32(1e-12)
    if scale == "norm":
        d = _half(np.sqrt((a * a).mean(axis=1)) * np.float32(_codebook(bits)[2]))
        return np.asarray(np.copysign(_nearest(a, d, bits) * d[:, None], x), np.float32)
    starts = (
        np.array({**STARTS, **OTHER_STARTS}[bits]) / 129
        if scale not in ("search", "best")
        else np.linspace(0.4, 1.15, 24)
    )
    peak = a.max(axis=1)
    best = np.zeros(len(a), np.float32)
    d = np.zeros(len(a), np.float32)
    for start in starts:
        m = _nearest(a, peak * np.float32(start), bits)
        num = np.einsum("ij,ij->i", a, m)
        den = np.einsum("ij,ij->i", m, m) + tiny
        gain = num * num / den
        better = gain > best
        d = np.where(better, num / den, d)
        best = np.where(better, gain, best)
    m = _nearest(a, d, bits)
    d = _half(np.einsum("ij,ij->i", a, m) / (np.einsum("ij,ij->i", m, m) + tiny))
    m = _nearest(a, d, bits)
    if scale in ("inner", "best"):
        d = _half(np.einsum("ij,ij->i", a, a) / (np.einsum("ij,ij->i", a, m) + tiny))
    return np.asarray(np.copysign(m * d[:, None], x), np.float32)

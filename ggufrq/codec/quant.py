"""The codes: blocks of 128 values to 34, 50, 66 or 82 bytes and back, of 64 values to 18, 26, 34 or 42. This
is the specification.

Decoding: value = d * centroid / 128 with the block's fp16 scale d; exact in float32.

Encoding looks for the scale and the indices of least squared error. For given indices the best scale is
sum(x*c) / sum(c*c), for a given scale the best index is that of the nearest centroid; taking turns is
Lloyd's method (derive.py) on the scale alone. It stops in local minima, so it starts three times, between a
clipped and a full range, and refines the start that takes most off the error, sum(x*c)**2 / sum(c*c).
Indices are then chosen for the scale as it is rounded to fp16.

The scale that is stored in the end is another one for these indices, sum(x*x) / sum(x*c). With it the inner
product of a block with what is decoded from it is that with itself. The least-squares scale falls short of
that by the squared error, alike in every block: scores of attention and its output would be too small. The
error that is left averages out over many keys and values, which a common factor does not; so the squared
error of a block grows by its square (3 % at 3 bits), and the error of attention shrinks.

All of it is done on integers. Values are scaled by a power of two (exact) and truncated to 15 bits, sums
are exact and so do not depend on their order, scales are fixed-point, rounded down. The one rounding of a
float is that of the scale to fp16. Every compiler and every backend can therefore produce the same bytes.

``scale="lsq"`` stores the least-squares scale, ``scale="norm"`` one that follows from the norm of the block,
as in the method as it was published (in llama.cpp LLAMA_RQ_SCALE): kept to compare with.

NaN is encoded as +0, infinities and magnitudes above 64992.25 as 64992.25 with their sign. A block without
a magnitude of 2**-24 or more, or whose scale rounds to zero in fp16, is all zero bytes. The sign is the
sign bit: encoding -x gives the complement of every index.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ggufrq.codec.pack import U8, pack, unpack
from ggufrq.codec.tables import Code, code

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Scale = Literal["inner", "lsq", "norm"]

BITS_INF = 0x7F800000  # bit patterns of float32: above this are NaN
BITS_MAX = 0x477DE040  # 64992.25 = 65504 * 127 / 128
BITS_MIN = 0x33800000  # 2**-24
LARGEST_FP16 = np.float32(65504)
CHUNK = 4096  # blocks at a time, to bound the memory


def _levels(a: I64, s: I64, c: Code) -> I64:
    """Level of each magnitude a [n, block] under the scale s [n], in units of 2**-11 of a per centroid
    unit."""
    level = np.zeros_like(a)
    for mid2 in c.mid2:
        level += a > np.minimum(s * mid2 >> 12, 32767)[:, None]
    return level


def _fit(a: I64, level: I64, c: Code) -> tuple[I64, I64]:
    """Least-squares scale [n] of a [n, block] in units of 2**-11, and what it takes off the squared error."""
    m = np.array(c.magnitudes, np.int64)[level]
    num = (a * m).sum(axis=1)
    s = (num << 11) // (m * m).sum(axis=1)
    return s, s * num


def _least_squares(a: I64, c: Code) -> I64:
    """Scale [n] of the magnitudes a [n, block]: the best of the starts, refined once."""
    best = np.zeros(len(a), np.int64)
    s = np.zeros(len(a), np.int64)
    for start in c.starts:
        si, gain = _fit(a, _levels(a, a.max(axis=1) * start >> 3, c), c)
        s = np.where(gain > best, si, s)
        best = np.maximum(best, gain)
    return _fit(a, _levels(a, s, c), c)[0]


def _norm(a: I64, c: Code) -> I64:
    """Scale [n] of the magnitudes a [n, block] that the centroids of a unit Gaussian ask for."""
    scale: I64 = np.floor(np.sqrt((a * a).sum(axis=1).astype(np.float64)) * c.norm).astype(np.int64)
    return scale


def _inner(a: I64, level: I64, c: Code) -> I64:
    """Scale [n] with which the inner product of a block with what is decoded from it is that with itself."""
    m = np.array(c.magnitudes, np.int64)[level]
    scale: I64 = ((a * a).sum(axis=1) << 11) // np.maximum((a * m).sum(axis=1), 1)
    return scale


def _stored(s: I64, e: I64) -> npt.NDArray[np.float16]:
    """The scale [n] as it is stored; the exponent e [n] is that of the largest magnitude."""
    exact = np.ldexp(s.astype(np.float32), (e - 18).astype(np.int32))
    d: npt.NDArray[np.float16] = np.minimum(exact, LARGEST_FP16).astype(np.float16)
    return d


def _encode(x: F32, c: Code, scale: Scale) -> tuple[npt.NDArray[np.float16], U8]:
    """Scales [n] and indices [n, block] of x [n, block]."""
    w = x.view(np.uint32).astype(np.int64)
    mag = w & 0x7FFFFFFF
    nan = mag > BITS_INF
    mag = np.where(nan, 0, np.minimum(mag, BITS_MAX))
    negative = (w >> 31).astype(bool) & ~nan
    largest = mag.max(axis=1)
    zero = largest < BITS_MIN
    e = np.where(zero, 0, (largest >> 23) - 127)
    a = np.ldexp(mag.astype(np.uint32).view(np.float32), (14 - e)[:, None].astype(np.int32)).astype(np.int64)

    s = _norm(a, c) if scale == "norm" else _least_squares(a, c)
    d = _stored(s, e)
    s = np.ldexp(d.astype(np.float32), (18 - e).astype(np.int32)).astype(np.int64)
    zero |= s == 0
    level = _levels(a, s, c)
    if scale == "inner":
        d = _stored(_inner(a, level, c), e)
        zero |= d == 0
    index = level + len(c.magnitudes)
    index = np.where(negative, ~index, index) & (2**c.bits - 1)
    return np.where(zero, np.float16(0), d), np.where(zero[:, None], 0, index).astype(np.uint8)


def quantize(x: npt.ArrayLike, bits: int, *, scale: Scale = "inner", block: int = 128) -> U8:
    """Encode float32 [..., n] into uint8 [..., n/block * bytes]. ValueError if ``block``, 128 or 64, does not
    divide n.

    ``scale`` is how the scale is found, see above. Any bit pattern is allowed; see
    above for what NaN, infinities and huge values become.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"no scale {scale!r}; there are {', '.join(get_args(Scale))}")
    c = code(bits, block)
    values = np.ascontiguousarray(x, np.float32)
    if values.ndim == 0 or values.shape[-1] % c.block:
        raise ValueError(f"the last dimension must be a multiple of {c.block}: {values.shape}")
    flat = values.reshape(-1, c.block)
    out = np.empty((len(flat), c.bytes), np.uint8)
    for i in range(0, len(flat), CHUNK):
        out[i : i + CHUNK] = pack(*_encode(flat[i : i + CHUNK], c, scale), bits)
    return out.reshape(*values.shape[:-1], values.shape[-1] // c.block * c.bytes)


def dequantize(blocks: npt.ArrayLike, bits: int, *, block: int = 128) -> F32:
    """Decode uint8 [..., n/block * bytes] into float32 [..., n]. ValueError for another size, bits or
    blocks."""
    c = code(bits, block)
    data = np.ascontiguousarray(blocks, np.uint8)
    if data.ndim == 0 or data.shape[-1] % c.bytes:
        raise ValueError(f"the last dimension must be a multiple of {c.bytes}: {data.shape}")
    scale, index = unpack(data.reshape(-1, c.bytes), bits, block)
    step = scale.astype(np.float32) * np.float32(1 / 128)
    values: F32 = step[:, None] * np.array(c.centroids, np.float32)[index]
    return values.reshape(*data.shape[:-1], data.shape[-1] // c.bytes * c.block)

"""The codes in mx: the same bytes as those of ``ggufrq.codec``, which explains them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from ggufrq.codec.pack import low_plane
from ggufrq.codec.quant import BITS_INF, BITS_MAX, BITS_MIN, LARGEST_FP16
from ggufrq.codec.tables import Code, code


def _power(exponent: mx.array) -> mx.array:
    """2**exponent as float32, exact; int32 from -126 to 127."""
    return mx.view((exponent + 127) << 23, mx.float32)


@dataclass(frozen=True)
class Codec:
    """The code of 2 to 5 ``bits`` with blocks of 128 or 64 values."""

    bits: int
    block: int

    @cached_property
    def code(self) -> Code:
        """Its numbers."""
        return code(self.bits, self.block)

    def bytes(self, dim: int) -> int:
        """Bytes that ``dim`` values take."""
        return dim // self.block * self.code.bytes

    def encode(self, x: mx.array) -> mx.array:
        """Values [..., n] of any type of floats as blocks, uint8 [..., bytes of n]; ``block`` divides n."""
        c = self.code
        w = mx.view(x.astype(mx.float32).reshape(*x.shape[:-1], -1, self.block), mx.uint32)
        mag = w & 0x7FFFFFFF
        nan = mag > BITS_INF
        mag = mx.where(nan, 0, mx.minimum(mag, BITS_MAX)).astype(mx.uint32)
        negative = (w >> 31).astype(mx.bool_) & ~nan
        largest = mag.max(axis=-1, keepdims=True)
        zero = largest < BITS_MIN
        e = mx.where(zero, 0, (largest >> 23).astype(mx.int32) - 127)
        a = (mx.view(mag, mx.float32) * _power(14 - e)).astype(mx.int32)

        d = self._stored(self._least_squares(a), e)
        s = (d.astype(mx.float32) * _power(18 - e)).astype(mx.int64)
        zero = zero | (s == 0)
        level = self._levels(a, s)
        wide = a.astype(mx.int64)
        products = (a * self._magnitudes(level)).sum(axis=-1, keepdims=True).astype(mx.int64)
        d = self._stored(((wide * wide).sum(axis=-1, keepdims=True) << 11) // mx.maximum(products, 1), e)
        zero = zero | (d == 0)
        index = level + len(c.magnitudes)
        index = mx.where(zero, 0, mx.where(negative, 2**c.bits - 1 - index, index)).astype(mx.uint8)
        blocks = self._pack(mx.where(zero, 0, d).astype(mx.float16), index)
        return blocks.reshape(*x.shape[:-1], -1)

    def decode(self, blocks: mx.array) -> mx.array:
        """The values of ``blocks`` [..., bytes] as float32 [..., n]."""
        c = self.code
        parts = blocks.reshape(*blocks.shape[:-1], -1, c.bytes)
        step = mx.view(parts[..., :2], mx.float16).astype(mx.float32) * (1 / 128)
        values = step * mx.array(c.centroids, mx.float32)[self._unpack(parts)]
        return values.reshape(*blocks.shape[:-1], -1)

    def _levels(self, a: mx.array, s: mx.array) -> mx.array:
        """Level of each magnitude under the scale s, in units of 2**-11 of a per centroid unit."""
        level = mx.zeros_like(a)
        for mid2 in self.code.mid2:
            level = level + (a > mx.minimum(s * mid2 >> 12, 32767).astype(mx.int32))
        return level

    def _magnitudes(self, level: mx.array) -> mx.array:
        return mx.array(self.code.magnitudes, mx.int32)[level]

    def _fit(self, a: mx.array, level: mx.array) -> tuple[mx.array, mx.array]:
        """Least-squares scale in units of 2**-11, and what it takes off the squared error."""
        m = self._magnitudes(level)
        num = (a * m).sum(axis=-1, keepdims=True).astype(mx.int64)
        s = (num << 11) // (m * m).sum(axis=-1, keepdims=True).astype(mx.int64)
        return s, s * num

    def _least_squares(self, a: mx.array) -> mx.array:
        """The best of the starts, refined once."""
        largest = a.max(axis=-1, keepdims=True).astype(mx.int64)
        best = mx.zeros_like(largest)
        s = mx.zeros_like(largest)
        for start in self.code.starts:
            si, gain = self._fit(a, self._levels(a, largest * start >> 3))
            s = mx.where(gain > best, si, s)
            best = mx.maximum(best, gain)
        return self._fit(a, self._levels(a, s))[0]

    def _stored(self, s: mx.array, e: mx.array) -> mx.array:
        """The scale as it is stored; the exponent e is that of the largest magnitude."""
        exact = s.astype(mx.float32) * _power(e - 18)
        return mx.minimum(exact, float(LARGEST_FP16)).astype(mx.float16)

    def _pack(self, scale: mx.array, index: mx.array) -> mx.array:
        """Blocks [..., bytes] of scales [..., 1] and indices [..., block]."""

        def plane(bits: mx.array, count: int, width: int) -> mx.array:
            """``count`` values of ``width`` bits in each byte, the first one lowest."""
            shifts = mx.array([width * i for i in range(count)], mx.uint8)[:, None]
            parts = bits.reshape(*bits.shape[:-1], count, self.block // count)
            return (parts << shifts).sum(axis=-2).astype(mx.uint8)

        low = low_plane(self.bits)
        planes = [mx.view(scale, mx.uint8), plane(index & (2**low - 1), 8 // low, low)]
        if self.bits > low:
            planes.append(plane(index >> low, 8, 1))
        return mx.concatenate(planes, axis=-1)

    def _unpack(self, blocks: mx.array) -> mx.array:
        """The indices [..., block] of blocks [..., bytes]."""

        def plane(first: int, count: int, width: int) -> mx.array:
            shifts = mx.array([width * i for i in range(count)], mx.uint8)[:, None]
            size = self.block // count
            parts = (blocks[..., None, first : first + size] >> shifts) & (2**width - 1)
            return parts.reshape(*blocks.shape[:-1], self.block)

        low = low_plane(self.bits)
        index = plane(2, 8 // low, low)
        if self.bits > low:
            index = index | (plane(2 + self.block * low // 8, 8, 1) << low)
        return index

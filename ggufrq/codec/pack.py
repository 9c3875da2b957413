"""Bit planes of a block: indices to bytes and back.

A block of n = 128 values (64 for the siblings) is a little-endian fp16 scale followed by planes. At 2 and 3
bits a low plane of n/4 bytes: byte j holds the low two bits of the indices of elements j, j + n/4, j + n/2,
j + 3n/4, from its lowest bits up. At 4 and 5 bits it has n/2 bytes: byte j holds the low four bits of element
j in its low and of element j + n/2 in its high nibble. At 3 and 5 bits then a high plane of n/8 bytes: bit b
of byte j is the highest bit of the index of element j + b*n/8.
"""

import numpy as np
import numpy.typing as npt

from ggufrq.codec.tables import code

U8 = npt.NDArray[np.uint8]


def _shifts(count: int, width: int) -> U8:
    """Where ``count`` values of ``width`` bits lie in a byte, [count, 1]."""
    return np.arange(0, count * width, width, dtype=np.uint8)[:, None]


def low_plane(bits: int) -> int:
    """Bits of an index in the low plane; an odd number of bits has one more in the high plane."""
    return 2 if bits < 4 else 4


def pack(scale: npt.NDArray[np.float16], index: U8, bits: int) -> U8:
    """Scale [n] and index [n, 128 or 64] below 2**bits as blocks [n, bytes]. ValueError for other bits or
    blocks."""
    n, block = index.shape
    out = np.empty((n, code(bits, block).bytes), np.uint8)
    out[:, :2] = scale.astype("<f2").reshape(n, 1).view(np.uint8)
    low = low_plane(bits)
    end = 2 + block * low // 8
    parts = (index & (2**low - 1)).reshape(n, 8 // low, -1)
    out[:, 2:end] = np.bitwise_or.reduce(parts << _shifts(8 // low, low), axis=1)
    if bits > low:
        high = (index >> low).reshape(n, 8, block // 8)
        out[:, end:] = np.bitwise_or.reduce(high << _shifts(8, 1), axis=1)
    return out


def unpack(blocks: U8, bits: int, block: int = 128) -> tuple[npt.NDArray[np.float16], U8]:
    """Inverse of pack: [n, bytes] -> scale [n] and index [n, block]. ValueError for other bits or blocks."""
    n = blocks.shape[0]
    size = code(bits, block).bytes
    if blocks.shape[1:] != (size,):
        raise ValueError(f"a block of {bits} bits has {size} bytes, not {blocks.shape[1:]}")
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float16).reshape(n)
    low = low_plane(bits)
    end = 2 + block * low // 8
    index: U8 = (blocks[:, None, 2:end] >> _shifts(8 // low, low) & np.uint8(2**low - 1)).reshape(n, block)
    if bits > low:
        index |= (blocks[:, None, end:] >> _shifts(8, 1) & 1).reshape(n, block) << low
    return scale, index

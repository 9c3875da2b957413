"""Bit planes of a block: indices to bytes and back.

A block of n = 128 values (64 for the siblings) is a little-endian fp16 scale followed by planes. At 2 and 3
bits a low plane of n/4 bytes: byte j holds the low two bits of the indices of elements j, j + n/4, j + n/2,
j + 3n/4, from its lowest bits up. At 3 bits then a high plane of n/8 bytes: bit b of byte j is bit 2 of the
index of element j + b*n/8. At 4 bits one plane of n/2 bytes: byte j holds element j in its low and element
j + n/2 in its high nibble.
"""

import numpy as np
import numpy.typing as npt

from ggufrq.codec.tables import code

U8 = npt.NDArray[np.uint8]


def pack(scale: npt.NDArray[np.float16], index: U8, bits: int) -> U8:
    """Scale [n] and index [n, 128 or 64] below 2**bits as blocks [n, bytes]. ValueError for other bits or
    blocks."""
    n, block = index.shape
    out = np.empty((n, code(bits, block).bytes), np.uint8)
    out[:, :2] = scale.astype("<f2").reshape(n, 1).view(np.uint8)
    if bits == 4:
        out[:, 2:] = index[:, : block // 2] | index[:, block // 2 :] << 4
        return out
    low = (index & 3).reshape(n, 4, block // 4)
    out[:, 2 : 2 + block // 4] = low[:, 0] | low[:, 1] << 2 | low[:, 2] << 4 | low[:, 3] << 6
    if bits == 3:
        high = (index >> 2).reshape(n, 8, block // 8)
        shifted = high << np.arange(8, dtype=np.uint8)[:, None]
        out[:, 2 + block // 4 :] = np.bitwise_or.reduce(shifted, axis=1)
    return out


def unpack(blocks: U8, bits: int, block: int = 128) -> tuple[npt.NDArray[np.float16], U8]:
    """Inverse of pack: [n, bytes] -> scale [n] and index [n, block]. ValueError for other bits or blocks."""
    n = blocks.shape[0]
    size = code(bits, block).bytes
    if blocks.shape[1:] != (size,):
        raise ValueError(f"a block of {bits} bits has {size} bytes, not {blocks.shape[1:]}")
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float16).reshape(n)
    if bits == 4:
        qs = blocks[:, 2:]
        return scale, np.concatenate([qs & 15, qs >> 4], axis=1)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = 2 + block // 4
    index: U8 = (blocks[:, None, 2:high] >> shift & np.uint8(3)).reshape(n, block)
    if bits == 3:
        bit = np.arange(8, dtype=np.uint8)[:, None]
        index |= (blocks[:, None, high:] >> bit & 1).reshape(n, block) << 2
    return scale, index

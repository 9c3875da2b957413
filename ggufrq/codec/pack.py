"""Bit planes of a block: indices to bytes and back.

A block of 128 values is a little-endian fp16 scale followed by planes. At 2 and 3 bits a low plane of 32
bytes: byte j holds the low two bits of the indices of elements j, j+32, j+64, j+96, from its lowest bits
up. At 3 bits then a high plane of 16 bytes: bit b of byte j is bit 2 of the index of element j + 16*b. At 4
bits one plane of 64 bytes: byte j holds element j in its low and element j + 64 in its high nibble.
"""

import numpy as np
import numpy.typing as npt

from ggufrq.codec.tables import code

U8 = npt.NDArray[np.uint8]


def pack(scale: npt.NDArray[np.float16], index: U8, bits: int) -> U8:
    """Scale [n] and index [n, 128] below 2**bits as blocks [n, 34 | 50 | 66]. ValueError for other bits."""
    n = index.shape[0]
    out = np.empty((n, code(bits).bytes), np.uint8)
    out[:, :2] = scale.astype("<f2").reshape(n, 1).view(np.uint8)
    if bits == 4:
        out[:, 2:] = index[:, :64] | index[:, 64:] << 4
        return out
    low = (index & 3).reshape(n, 4, 32)
    out[:, 2:34] = low[:, 0] | low[:, 1] << 2 | low[:, 2] << 4 | low[:, 3] << 6
    if bits == 3:
        high = (index >> 2).reshape(n, 8, 16)
        out[:, 34:] = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return out


def unpack(blocks: U8, bits: int) -> tuple[npt.NDArray[np.float16], U8]:
    """Inverse of pack: [n, bytes] -> scale [n] and index [n, 128]. ValueError for other bits."""
    n = blocks.shape[0]
    if blocks.shape[1:] != (code(bits).bytes,):
        raise ValueError(f"a block of {bits} bits has {code(bits).bytes} bytes, not {blocks.shape[1:]}")
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float16).reshape(n)
    if bits == 4:
        qs = blocks[:, 2:]
        return scale, np.concatenate([qs & 15, qs >> 4], axis=1)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    index: U8 = (blocks[:, None, 2:34] >> shift & np.uint8(3)).reshape(n, 128)
    if bits == 3:
        bit = np.arange(8, dtype=np.uint8)[:, None]
        index |= (blocks[:, None, 34:] >> bit & 1).reshape(n, 128) << 2
    return scale, index

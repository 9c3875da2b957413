"""A trellis code of three bits per value: each value comes from a window of L bits that moves on by three.

The encoder finds the best path of a block by Viterbi's algorithm; there are 2**(L - 3) states with 8 branches
each. The reproduction values of the 2**L windows are trained on Gaussian blocks: paths and means in turn, as
Lloyd's method. The path starts at zero, so that a block takes 3 bits per value and its scale, no more. After
Marcellin and Fischer, Trellis coded quantization (IEEE Trans. Commun. 38, 1990); moving windows of bits as
trellis in Tseng et al., QTIP (arXiv 2406.11235).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from ggufrq.codec.derive import lloyd_max
from kvlab.scale import fitted

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
BITS = 3
_CHUNK = 512


def paths(x: F32, book: F32) -> I64:
    """Windows [n, b] of the best path for x [n, b] under the reproduction values ``book`` [2**L]."""
    n, length = x.shape
    states = len(book) >> BITS
    window = np.arange(len(book)).reshape(1 << BITS, states)  # by the bits that drop out, by the new state
    before = window >> BITS
    cost = np.full((n, states), np.float32(1e30))
    cost[:, 0] = 0
    back = np.empty((length, n, states), np.uint8)
    for t in range(length):
        found = cost[:, before[0]] + (x[:, t, None] - book[window[0]]) ** 2
        choice = np.zeros((n, states), np.uint8)
        for h in range(1, 1 << BITS):
            other = cost[:, before[h]] + (x[:, t, None] - book[window[h]]) ** 2
            better = other < found
            choice[better] = h
            np.minimum(found, other, out=found)
        back[t], cost = choice, found
    state = cost.argmin(axis=1)
    rows = np.arange(n)
    out = np.empty((n, length), np.int64)
    for t in reversed(range(length)):
        out[:, t] = window[back[t, rows, state], state]
        state = out[:, t] >> BITS
    return out


@cache
def codebook(width: int) -> F32:
    """Reproduction values of the windows of ``width`` bits for a unit Gaussian, float32 [2**width]."""
    rng = np.random.default_rng(width)
    # begin with the scalar code of all windows, dealt out so that the branches of a state differ
    levels = np.array(lloyd_max(4 if width < 8 else 8))
    points = np.sort(np.concatenate([-levels, levels]))
    count = 1 << width
    values = np.repeat(points, -(-count // len(points)))[:count] + 0.05 * rng.standard_normal(count)
    spread = np.arange(count) * 0x9E3779B1 % (1 << 32)
    book = np.sort(values)[np.argsort(np.argsort(spread))].astype(np.float32)
    x = rng.standard_normal((max(256, count // 2), 128)).astype(np.float32)
    for _ in range(12):
        chosen = paths(x, book).ravel()
        number = np.bincount(chosen, minlength=count)
        mean = np.bincount(chosen, x.ravel(), count) / np.maximum(number, 1)
        book = np.where(number > 4, mean, book).astype(np.float32)
    book.flags.writeable = False
    return book


def trellis(x: F32, width: int, inner: bool = False) -> F32:
    """What the code with windows of ``width`` bits makes of x [n, b]."""
    book = codebook(width)
    out = np.empty_like(x)
    for i in range(0, len(x), _CHUNK):
        part = x[i : i + _CHUNK]
        sigma = np.sqrt((part * part).mean(axis=1, keepdims=True)) + np.float32(1e-12)
        points = book[paths(part / sigma, book)]
        out[i : i + _CHUNK] = fitted(part, points, inner)
    return out

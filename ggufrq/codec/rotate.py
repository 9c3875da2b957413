"""The rotations: orthogonal, symmetric, their own inverse, block-diagonal in steps of 128 values.

Families (the block matrix B): planar, 2-D reflections [[c, s], [s, -c]]; iso, 4-D blocks x -> p*x*q with
pure unit quaternions p and q; rotor, half-turns 2*n*nT - I of 3-D blocks, the last two values pass through.
Modes: none, the identity; block, B; hadamard, the orthonormal Walsh-Hadamard matrix H of 128 in natural
order, for every family the same; full, B*H*B.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ggufrq.codec.tables import load, rotation_blocks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Family = Literal["planar", "iso", "rotor"]
Mode = Literal["none", "block", "hadamard", "full"]


def _block_matrix(family: Family) -> F64:
    n = load()["block"]
    blocks = rotation_blocks(family).astype(np.float64)
    if family == "planar":
        c, s = blocks.T
        blocks = np.stack([c, s, s, -c], -1).reshape(-1, 2, 2)
    out = np.eye(n)
    for i, b in enumerate(blocks):
        k = len(b)
        out[i * k : (i + 1) * k, i * k : (i + 1) * k] = b
    return out


def _hadamard_signs(n: int) -> F64:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def _full(family: Family) -> F64:
    """Sum over the blocks of B*H*B in a fixed order, row by row: each product of two float32 is exact."""
    n = load()["block"]
    b = _block_matrix(family)
    h = _hadamard_signs(n)
    k = {"planar": 2, "iso": 4, "rotor": 3}[family]
    first = np.minimum(np.arange(n) // k * k, n)
    tail = np.arange(n) >= n // k * k
    out = np.zeros((n, n))
    rows = np.arange(n)
    for p in range(k):
        for q in range(k):
            i = np.where(tail, rows, first + p)
            j = np.where(tail, rows, first + q)
            used = ~(tail[:, None] & (p > 0) | tail[None, :] & (q > 0))
            out += used * h[np.ix_(i, j)] * (b[rows, i][:, None] * b[j, rows][None, :])
    upper: F64 = np.triu(out)  # mirrored: symmetric to the last bit
    full: F64 = upper + np.triu(out, 1).T
    return full


def _check(family: str, mode: str, n: int) -> None:
    if family not in get_args(Family):
        raise ValueError(f"no rotation family {family!r}; there are {', '.join(get_args(Family))}")
    if mode not in get_args(Mode):
        raise ValueError(f"no rotation mode {mode!r}; there are {', '.join(get_args(Mode))}")
    if n <= 0 or n % load()["block"]:
        raise ValueError(f"a rotation needs a positive multiple of {load()['block']} values, not {n}")


def rotation_matrix(family: Family, mode: Mode, n: int = 128) -> F32:
    """The rotation as float32 [n, n], rounded once from double. ValueError if 128 does not divide n."""
    _check(family, mode, n)
    size = load()["block"]
    if mode == "none":
        unit = np.eye(size)
    elif mode == "block":
        unit = _block_matrix(family)
    else:
        signs = _hadamard_signs(size) if mode == "hadamard" else _full(family)
        unit = signs * (1 / np.sqrt(np.float64(size)))
    out = np.zeros((n, n), np.float32)
    for o in range(0, n, size):
        out[o : o + size, o : o + size] = unit
    return out


def rotate(x: npt.ArrayLike, family: Family, mode: Mode) -> F32:
    """Rotate float32 [..., n] along its last axis; twice is x again. ValueError if 128 does not divide n."""
    values = np.asarray(x, np.float32)
    _check(family, mode, values.shape[-1] if values.ndim else 0)
    size = load()["block"]
    matrix = rotation_matrix(family, mode, size).astype(np.float64)
    out = values.reshape(-1, size).astype(np.float64) @ matrix
    return out.astype(np.float32).reshape(values.shape)

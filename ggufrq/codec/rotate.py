"""The rotations of 64, 128 or 256 values: orthogonal, symmetric, their own inverse.

Families (the block matrix B): planar, 2-D reflections [[c, s], [s, -c]]; iso, 4-D blocks x -> p*x*q with
pure unit quaternions p and q; rotor, half-turns 2*n*nT - I of 3-D blocks, the last two values pass through.
Modes: none, the identity; block, B; hadamard, the orthonormal Walsh-Hadamard matrix H in natural
order, for every family the same; full, B*H*B. B of 256 values is that of 128, twice; B of 64 values is made
of the first blocks of that of 128 (of rotor 21, the last value passes through).
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ggufrq.codec.tables import load, rotation_blocks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Family = Literal["planar", "iso", "rotor"]
SIZES = (64, 128, 256)  # values that are rotated together
Mode = Literal["none", "block", "hadamard", "full"]


def _block_matrix(family: Family, n: int) -> F64:
    """B for n values: that of 128, repeated, or as much of it as 64 values hold."""
    blocks = rotation_blocks(family).astype(np.float64)
    if family == "planar":
        c, s = blocks.T
        blocks = np.stack([c, s, s, -c], -1).reshape(-1, 2, 2)
    out = np.eye(n)
    k = blocks.shape[1]
    size = min(n, load()["block"])
    for o in range(0, n, size):
        for i, b in enumerate(blocks[: size // k]):
            at = slice(o + i * k, o + (i + 1) * k)
            out[at, at] = b
    return out


def _hadamard_signs(n: int) -> F64:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def _full(family: Family, n: int) -> F64:
    """Sum over the blocks of B*H*B in a fixed order, row by row: each product of two float32 is exact."""
    size = min(n, load()["block"])
    b = _block_matrix(family, n)
    h = _hadamard_signs(n)
    k = {"planar": 2, "iso": 4, "rotor": 3}[family]
    rows = np.arange(n)
    inside = rows % size
    first = rows - inside + inside // k * k
    tail = inside >= size // k * k
    out = np.zeros((n, n))
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
    if n not in SIZES:
        raise ValueError(f"a rotation is of 64, 128 or 256 values, not {n}")


def rotation_matrix(family: Family, mode: Mode, n: int = 128) -> F32:
    """The rotation of n values (64, 128 or 256) as float32 [n, n], rounded once from double. ValueError for
    another n."""
    _check(family, mode, n)
    if mode == "none":
        unit = np.eye(n)
    elif mode == "block":
        unit = _block_matrix(family, n)
    else:
        signs = _hadamard_signs(n) if mode == "hadamard" else _full(family, n)
        unit = signs * (1 / np.sqrt(np.float64(n)))
    return unit.astype(np.float32)


def head_rotation(family: Family, dim: int) -> F32:
    """The full rotation of a head of ``dim`` values, float32 [dim, dim]: over 256 values where they divide a
    head, else over 128 or 64. ValueError when 64 does not divide it."""
    size = next((n for n in sorted(SIZES, reverse=True) if dim % n == 0), None)
    if size is None:
        raise ValueError(
            f"heads of {dim} values cannot be kept in types of ggufrq: they are no multiple of 64"
        )
    return np.kron(np.eye(dim // size, dtype=np.float32), rotation_matrix(family, "full", size))


def rotate(x: npt.ArrayLike, family: Family, mode: Mode, n: int = 128) -> F32:
    """Rotate each n values (64, 128 or 256) of float32 [..., m] along the last axis; twice is x again.
    ValueError for another n, or if n does not divide m."""
    values = np.asarray(x, np.float32)
    _check(family, mode, n)
    if values.ndim == 0 or values.shape[-1] == 0 or values.shape[-1] % n:
        raise ValueError(f"the last dimension must be a multiple of {n}: {values.shape}")
    out = values.reshape(-1, n).astype(np.float64) @ rotation_matrix(family, mode, n).astype(np.float64)
    return out.astype(np.float32).reshape(values.shape)

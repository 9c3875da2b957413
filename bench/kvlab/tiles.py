"""KVarN, to compare with: tiles of 128 tokens of one head whose tokens and channels are scaled to like
spreads before they are rounded.

After Müller et al., KVarN: variance-normalized KV-cache quantization, arXiv 2606.03458, and what its authors
publish for vLLM (github.com/huawei-csl/KVarN): Hadamard along the head; the standard deviations of tokens and
of channels divided out in turn, 16 rounds, as bounded logarithms, of which those stay whose spreads differ
least; then the range of each channel (K) or of each token (V) in even steps. A tile stores its indices, two
fp16 for each channel of K or token of V (step and least value) and one for the other side.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ggufrq.codec.rotate import rotation_matrix

F32 = npt.NDArray[np.float32]
TILE = 128  # tokens
ROUNDS = 16
#: Bounds of a standard deviation that is divided out, and of the logarithm of all of them.
SPREADS, LOGARITHMS = (1e-3, 1e3), (-0.3, 10.0)


def bits_per_value(bits: int, dim: int, side: Literal["k", "v"]) -> float:
    """With the scales."""
    return bits + (32 / TILE + 16 / dim if side == "k" else 32 / dim + 16 / TILE)


def kvarn(x: F32, bits: int, side: Literal["k", "v"]) -> F32:
    """What it makes of K or V [heads, tokens, dim]; tokens behind the last full tile stay as they are."""
    heads, tokens, dim = x.shape
    whole = tokens // TILE * TILE
    r = rotation_matrix("iso", "hadamard", dim)
    tiles = (x[:, :whole] @ r).reshape(-1, TILE, dim)
    tiles = tiles.swapaxes(1, 2) if side == "k" else tiles  # rows are what gets a range: channels or tokens
    decoded = _coded(np.ascontiguousarray(tiles), bits)
    decoded = decoded.swapaxes(1, 2) if side == "k" else decoded
    back = decoded.reshape(heads, whole, dim) @ r
    return np.asarray(np.concatenate([back, x[:, whole:]], axis=1), np.float32)


def balance(tiles: F32) -> tuple[F32, F32]:
    """Scales of rows [n, rows, 1] and columns [n, 1, columns] of ``tiles`` [n, rows, columns]."""
    rows, columns = np.zeros_like(tiles[:, :, :1]), np.zeros_like(tiles[:, :1])
    kept_rows, kept_columns = np.ones_like(rows), np.ones_like(columns)
    now, least = tiles, _difference(tiles)
    for _ in range(ROUNDS):
        columns = _added(columns, now, 1)
        rows = _added(rows, tiles * np.exp(-rows - columns), 2)
        now = tiles * np.exp(-rows - columns)
        difference = _difference(now)
        better = (difference <= least)[:, None, None]
        kept_rows = np.where(better, np.exp(rows), kept_rows)
        kept_columns = np.where(better, np.exp(columns), kept_columns)
        least = np.minimum(difference, least)
    return kept_rows, kept_columns


def _added(logarithms: F32, now: F32, axis: int) -> F32:
    """With the standard deviations that are left along ``axis``."""
    spread = now.std(axis=axis, ddof=1, keepdims=True).clip(*SPREADS)
    return np.asarray((logarithms + np.log(spread)).clip(*LOGARITHMS), np.float32)


def _difference(tiles: F32) -> F32:
    """How far standard deviations of rows and columns are apart, as ratios [n]."""
    ratios = []
    for axis in (1, 2):
        spread = tiles.std(axis=axis, ddof=1)
        ratios.append(spread.max(axis=1) / np.maximum(spread.min(axis=1), 1e-8))
    return np.asarray(ratios[0] + ratios[1], np.float32)


def _coded(tiles: F32, bits: int) -> F32:
    rows, columns = balance(tiles)
    even = tiles / rows / columns
    low, high = even.min(axis=2, keepdims=True), even.max(axis=2, keepdims=True)
    step = np.maximum((high - low) / (2**bits - 1), 1e-10)
    index = np.rint((even - low) / step).clip(0, 2**bits - 1)
    return np.asarray((index * _half(rows * step) + _half(rows * low)) * _half(columns), np.float32)


def _half(x: F32) -> F32:
    return x.clip(-65504, 65504).astype(np.float16).astype(np.float32)

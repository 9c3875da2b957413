"""Choices that no code of blocks can make by itself: learned transforms, and tokens kept in f16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvlab.models import Change, Lab
from kvlab.schemes import Scheme, Statistics

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def sinks(k: Scheme, v: Scheme, count: int) -> Change:
    """The schemes, but the first ``count`` tokens exact."""

    def change(layer: int, side: str, x: F32) -> F32:
        out = (k if side == "k" else v).apply(x)
        out[:, :count] = x[:, :count]
        return out

    return change


def root(a: F64) -> F64:
    """Square root of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(a)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def best_transform(of_x: F64, of_y: F64) -> tuple[F64, float]:
    """The symmetric T [d, d] for which rounding x.T and multiplying with y.T^-1 gives the least error of x.y,
    when rounding adds white noise in proportion to the mean square of x.T, and the factor that it gains.

    Minimizes tr(of_x M) tr(of_y M^-1) with M = T.T; of_x and of_y are second moments. The minimum is where
    M of_x M = of_y.
    """
    d = len(of_x)
    of_x = of_x + np.eye(d) * 1e-3 * np.trace(of_x) / d
    of_y = of_y + np.eye(d) * 1e-3 * np.trace(of_y) / d
    half = root(of_x)
    inverse = np.linalg.inv(half)
    middle = root(half @ of_y @ half)
    gain = np.trace(of_x) * np.trace(of_y) / np.trace(middle) ** 2
    return root(inverse @ middle @ inverse), float(gain)


def learned(lab: Lab, calibration: Lab, scheme: Scheme, sides: str) -> tuple[Change, dict[str, float]]:
    """Transforms per layer and head from Q and K, and from V and the output projection, of the first window
    of ``calibration``, before a scheme; for ``sides`` k, v or kv. Also the mean gain foretold by side."""
    made: dict[tuple[int, str], tuple[F32, F32]] = {}
    gains: dict[str, list[float]] = {side: [] for side in sides}
    for layer, c in calibration.captured(0).items():
        shared = len(c.q) // len(c.k)
        dim = c.k.shape[-1]
        output: Any = lab.model.model.layers[layer].self_attn.o_proj.weight.detach().numpy()
        for side in sides:
            forward, back = [], []
            for i in range(len(c.k)):
                heads = slice(i * shared, (i + 1) * shared)
                if side == "k":
                    q = c.q[heads].reshape(-1, dim).astype(np.float64)
                    x, y = Statistics.of(c.k[i : i + 1]).covariance[0].astype(np.float64), q.T @ q / len(q)
                else:
                    w = output.reshape(len(output), -1, dim)[:, heads].reshape(-1, dim).astype(np.float64)
                    x, y = c.v[i].T.astype(np.float64) @ c.v[i] / len(c.v[i]), w.T @ w
                t, gain = best_transform(x, y)
                gains[side].append(gain)
                forward.append(t)
                back.append(np.linalg.inv(t))
            made[layer, side] = (np.array(forward, np.float32), np.array(back, np.float32))

    def change(layer: int, side: str, x: F32) -> F32:
        if side not in sides:
            return scheme.apply(x)
        t, inverse = made[layer, side]
        return np.asarray(scheme.apply(np.ascontiguousarray(x @ t)) @ inverse, np.float32)

    return change, {side: float(np.mean(g)) for side, g in gains.items()}

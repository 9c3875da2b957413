"""What a changed K or V does to the attention of one head, with everything else exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Relative squared errors of K and V; with K changed alone the divergence of the attention weights in
    nats and the relative squared error of the output; with V changed alone that of the output."""

    k_mse: float
    v_mse: float
    k_kl: float
    k_out: float
    v_out: float


def relative(x: F32, y: F32) -> float:
    """Squared error of y over the squared length of x."""
    return float(((x - y).astype(np.float64) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


def errors(q: F32, k: F32, v: F32, k_changed: F32, v_changed: F32) -> Errors:
    """Of causal attention, over the second half of the queries. All [tokens, dim], q times the scale."""
    half = len(q) // 2
    log_p = _log_weights(q, k)[half:]
    p = np.exp(log_p)
    log_c = _log_weights(q, k_changed)[half:]
    out = p @ v
    seen = np.where(p > 0, p * (log_p - log_c), 0).sum(axis=1)
    return Errors(
        relative(k, k_changed),
        relative(v, v_changed),
        float(np.nanmean(seen)),
        relative(out, np.exp(log_c) @ v),
        relative(out, p @ v_changed),
    )


def _log_weights(q: F32, k: F32) -> F64:
    logits = q.astype(np.float64) @ k.T.astype(np.float64)
    logits[np.triu(np.ones(logits.shape, bool), 1)] = -1e30
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))

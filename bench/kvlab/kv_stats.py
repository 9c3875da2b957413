"""Synthetic Q, K and V of one attention head with the statistics that are published for known models.

Each set is named and seeded: the same arguments give the same arrays. What is published, and where:

- Keys have few channels of large magnitude that stay the same over tokens, values have none: KIVI
  (arXiv 2402.02750). The channels are distinct before RoPE and smeared over pairs after it: KVQuant (arXiv
  2401.18079, Llama 1 to 3 and Mistral).
- These channels are those that RoPE turns slowly, in Llama, Qwen and Gemma; V has none: "Massive Values in
  Self-Attention Modules" (arXiv 2502.01563).
- Few tokens, the attention sinks among them, have keys of small norm: "Accurate KV Cache Quantization with
  Outlier Tokens Tracing" (arXiv 2505.10938).
- Qwen2.5-7B has a bias on K of norm 605 and 921 in its first and last layer and of about 22 in the median
  one, and breaks at three bits (perplexity 7.5 -> 10 000): github.com/ggml-org/llama.cpp, issue 21385.
  Qwen3 has no bias, but RMS normalization of Q and K with a weight per channel (Qwen3 technical report, arXiv
  2505.09388).
- Gemma: heads of 256, Q and K normalized; about 56 of 256 channels of K active in Gemma 4:
  github.com/quantumaikr/quant.cpp (commit 70727370b7da).

Not published, and so our choice: how much larger the large channels are (8 times), the spread of the others
(log-normal), the spread of token norms, the norm of K without its bias (22 per layer of four heads), how
peaked attention is (deviation of the logits 2.5), and that Q is the content of one earlier token and noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_LATENT = 48  # dimensions of the content of a token
_LOGITS = 2.5  # deviation of the logits of a query


@dataclass(frozen=True)
class KvStats:
    """Statistics of one head. ``outliers`` RoPE pairs are ``gain`` times as large as the others; the bias
    before RoPE, in ``biased`` pairs, has ``bias`` times the norm of the rest of K; ``active`` channels carry
    K, the rest a tenth; ``channels`` and ``tokens`` are deviations of logarithms; ``sink`` the norm of the
    first token's K and V against the others."""

    head_dim: int
    theta: float
    outliers: int = 0
    gain: float = 1.0
    bias: float = 0.0
    biased: int = 0
    active: int | None = None
    channels: float = 0.0
    tokens: float = 0.0
    normed: bool = False
    v_channels: float = 0.0
    v_tokens: float = 0.0
    sink: float = 1.0


#: The sets by name.
SETS: dict[str, KvStats] = {
    "gaussian": KvStats(128, 1e4),
    "llama3": KvStats(
        128, 5e5, outliers=3, gain=8, channels=0.5, tokens=0.15, v_channels=0.3, v_tokens=0.25, sink=0.3
    ),
    "qwen2.5": KvStats(
        128, 1e6, 2, 4, bias=605 / 22, biased=4, channels=0.5, tokens=0.15, v_channels=0.3, v_tokens=0.25
    ),
    "qwen2.5-middle": KvStats(
        128, 1e6, 2, 4, bias=1.0, biased=4, channels=0.5, tokens=0.15, v_channels=0.3, v_tokens=0.25
    ),
    "qwen3": KvStats(128, 1e6, 3, 6, channels=0.6, normed=True, v_channels=0.3, v_tokens=0.25, sink=0.3),
    "gemma": KvStats(
        256, 1e6, 2, 5, active=56, channels=0.4, normed=True, v_channels=0.3, v_tokens=0.1, sink=1.0
    ),
}


@dataclass(frozen=True)
class KvSample:
    """Q, K (both after RoPE, Q times the scale of attention) and V of one head, each float32
    [tokens, head_dim]."""

    q: F32
    k: F32
    v: F32


def generate(name: str, tokens: int = 1024, head_dim: int | None = None, seed: int = 0) -> KvSample:
    """A sample of the set ``name``; ``head_dim`` even, the set's own by default. Raises ValueError."""
    if name not in SETS:
        raise ValueError(f"no set {name!r}; there are {', '.join(SETS)}")
    stats = SETS[name]
    dim = stats.head_dim if head_dim is None else head_dim
    if dim <= 0 or dim % 2 or tokens < 2:
        raise ValueError(f"{dim} values and {tokens} tokens: an even head_dim and two tokens at least")
    rng = np.random.default_rng([seed, list(SETS).index(name), dim])
    content = rng.standard_normal((tokens, _LATENT))
    scales = _scales(stats, dim, rng)
    project = rng.standard_normal((_LATENT, dim)) / math.sqrt(_LATENT)
    # half of K is content that a query can ask for, half is noise
    k = (content @ project + rng.standard_normal((tokens, dim))) / math.sqrt(2)
    asked = (rng.random(tokens) * np.arange(tokens)).astype(np.int64)
    q = (content[asked] @ project + rng.standard_normal((tokens, dim))) / math.sqrt(2)
    if stats.normed:
        k, q = (x / np.sqrt((x**2).mean(axis=1, keepdims=True)) for x in (k, q))
    k, q = k * scales, q * scales
    k *= np.exp(stats.tokens * rng.standard_normal((tokens, 1)))
    k[0] *= stats.sink
    k += _bias(stats, dim, float(np.sqrt((k**2).sum(axis=1).mean())), rng)
    k, q = _rope(k, stats.theta), _rope(q, stats.theta)
    v = rng.standard_normal((tokens, dim)) * np.exp(stats.v_channels * rng.standard_normal(dim))
    v *= np.exp(stats.v_tokens * rng.standard_normal((tokens, 1)))
    v[0] *= stats.sink
    # a constant in K adds the same to all logits of a query, so it does not count
    spread = (q @ (k - k.mean(axis=0)).T).std(axis=1).mean()
    q *= _LOGITS / spread
    return KvSample(*(x.astype(np.float32) for x in (q, k, v)))


def _slow(count: int, dim: int) -> npt.NDArray[np.int64]:
    """Channels of the ``count`` pairs that RoPE turns slowest; channel i is paired with i + dim / 2."""
    first = np.arange(dim // 2 - count, dim // 2)
    return np.concatenate([first, first + dim // 2])


def _scales(stats: KvStats, dim: int, rng: np.random.Generator) -> F64:
    """Deviation of each channel of K before RoPE."""
    scales = np.exp(stats.channels * rng.standard_normal(dim))
    if stats.active is not None:
        scales[rng.permutation(dim)[min(stats.active, dim) :]] *= 0.1
    scales[_slow(stats.outliers, dim)] = stats.gain
    return np.asarray(scales, np.float64)


def _bias(stats: KvStats, dim: int, norm: float, rng: np.random.Generator) -> F64:
    bias = np.zeros(dim)
    if stats.biased:
        where = _slow(stats.biased, dim)
        bias[where] = rng.standard_normal(len(where))
        bias *= stats.bias * norm / np.linalg.norm(bias)
    return bias


def _rope(x: F64, theta: float) -> F64:
    """Rotary embedding of x [tokens, dim] at positions 0, 1, …"""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    c, s = np.cos(angle), np.sin(angle)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * c - b * s, a * s + b * c], axis=1)

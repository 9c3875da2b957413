"""Folding for caches: keys in the metric of their queries as far as weights can hold it, for any runtime.

A factor on a channel of K cancels against its inverse on Q; it must be the same on the two channels that RoPE
turns together. Where Q and K are normalized by head it goes into the weights of these norms, so that all
heads of the layer share it; else into the rows of both projections and their biases. This is what a diagonal
profile would be (``ggufrq.profile``): a code makes errors that follow tr(A Σk A), and they cost
tr(Σq A⁻²), Σ being the second moments of K and Q, so that A⁴ = Σq / Σk makes the product least. The mean of K
counts as a part of it, since no runtime takes it out.

The moments are foretold from the weights alone. What RoPE turns keeps the power of each pair of channels, so
that they hold at all positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ggufrq.base.errors import ModelError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.ggufs.header import TensorInfo
from ggufrq.make.fold.changes import F64, Change
from ggufrq.make.fold.facts import Architecture, Heads, architecture_of, heads
from ggufrq.make.fold.folding import Folding, Found
from ggufrq.make.fold.weights import Weights
from ggufrq.profile.solve import RIDGE
from ggufrq.profile.weights import moments_from_weights
from ggufrq.profile.whole import Whole


def parts(architecture: Architecture, tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """What is folded in a model of this architecture. Raises ModelError when it has no attention."""
    if not any(tensor.name.endswith(".attn_k.weight") for tensor in tensors):
        raise ModelError(
            f"--fold kv finds nothing to fold in this model ({architecture.name})", remedy="leave out --fold"
        )
    return ("keys",)


def find(weights: Weights, model: Path, *, listener: Listener = SILENT) -> Folding:
    """Factors of K and Q for every layer with attention. ``listener`` is told of the layers.

    Raises ModelError when the model is not known.
    """
    architecture = architecture_of(weights.header.values, model.name)
    whole = Whole.of(model, 1)  # the powers of pairs are the same at every position
    folding = Folding()
    listener.expect(len(whole.readers))
    for il in whole.readers:
        shape = heads(weights.header, il)
        k, q = moments_from_weights(whole, il)
        shared = f"blk.{il}.attn_k_norm.weight" in weights.places
        partner = rope_partner(shape, architecture.rope)
        factors, gain = pair_factors(_powers(k.second), _powers(q), partner, shared=shared)
        folding.found.append(Found(f"blk.{il}.keys", gain, "metric of the queries"))
        folding.add(key_changes(weights, il, shape, factors))
        listener.advance()
    return folding


def rope_partner(shape: Heads, rope: str) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """For each channel of a head of K the one that RoPE turns together with it; itself where it turns
    none."""
    partner = np.arange(shape.k_dim)
    turned = partner[: shape.rotated]
    half = shape.rotated // 2
    partner[: shape.rotated] = turned ^ 1 if rope == "norm" else (turned + half) % shape.rotated
    return partner


def pair_factors(
    k: F64, q: F64, partner: np.ndarray[tuple[int], np.dtype[np.intp]], *, shared: bool
) -> tuple[F64, float]:
    """Factors of K [KV heads, d], of geometric mean 1 in each head, from the mean squares of K and Q
    [KV heads, d]; ``shared``: the same for all heads. And by how much they make the product of the two powers
    smaller, on average over the heads (at least 1)."""

    def tied(power: F64) -> F64:
        """The same on both channels of a pair, and on all heads that share factors; none is empty."""
        both = (power + power[:, partner]) / 2
        if shared:
            both = np.broadcast_to(both.mean(axis=0), both.shape)
        mean = both.mean(axis=1, keepdims=True)
        return np.asarray(both + RIDGE * np.where(mean > 0, mean, 1.0))

    k, q = tied(k), tied(q)
    gain = k.sum(axis=1) * q.sum(axis=1) / np.square(np.sqrt(k * q).sum(axis=1))
    logs = np.log(q / k) / 4
    return np.asarray(np.exp(logs - logs.mean(axis=1, keepdims=True))), float(gain.mean())


def key_changes(weights: Weights, layer: int, shape: Heads, factors: F64) -> dict[str, Change]:
    """The changes that multiply K by ``factors`` [KV heads, d] and divide Q by them: those of the norms of
    both, where there are any, which take the factors of the first head for all."""
    prefix = f"blk.{layer}."
    if f"{prefix}attn_k_norm.weight" in weights.places:
        one = factors[:1]
        return {
            f"{prefix}attn_k_norm.weight": Change(columns=one),
            f"{prefix}attn_q_norm.weight": Change(columns=1 / one),
        }
    changes = {}
    by_query = np.repeat(factors, shape.share, axis=0)
    for name, side in (("attn_k", factors.reshape(1, -1)), ("attn_q", 1 / by_query.reshape(1, -1))):
        changes[f"{prefix}{name}.weight"] = Change(rows=side)
        if f"{prefix}{name}.bias" in weights.places:
            changes[f"{prefix}{name}.bias"] = Change(columns=side)
    return changes


def _powers(second: F64) -> F64:
    """Mean squares of the channels, from second moments [heads, d, d]."""
    return np.asarray(np.diagonal(second, axis1=1, axis2=2))

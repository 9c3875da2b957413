"""Folding for caches: K and V that quantize better under any runtime, by what the weights can be given.

A factor on a channel of K cancels against its inverse on Q; it must be the same on the two channels that
RoPE turns together. Where Q and K are normalized by head it goes into the weights of these norms, so that all
heads of the layer share it. V may be turned by any orthogonal matrix per head, whose inverse the output
projection takes back; not where a gate multiplies what attention gives, channel by channel: there V is only
scaled.

Chosen by layer, on K and V of a text, for q4_0: the smallest error of attention's logits (K) and of what the
output projection gives (V), with and without the Hadamard rotation that llama.cpp puts before a quantized
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ggufrq.base.errors import ModelError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.build.project import Build
from ggufrq.codec import rotation_matrix
from ggufrq.codec.rotate import SIZES
from ggufrq.drive.kv_capture import captured
from ggufrq.ggufs.header import TensorInfo
from ggufrq.make.fold.changes import F32, F64, Change
from ggufrq.make.fold.codes import Codes
from ggufrq.make.fold.facts import Architecture, Heads, Pair, architecture_of, heads, pairs
from ggufrq.make.fold.folding import Folding, Found, scaled
from ggufrq.make.fold.weights import Weights

#: The text that K and V are taken of, and how many of its tokens each layer is judged on.
N_CTX, CHUNKS, TOKENS = 1024, 4, 512
KIND = "q4_0"
#: Exponents that are tried: of the channel's own size (inverse), and of what reads it.
OWN = (0.0, 0.25, 0.5, 0.75, 1.0)
READER = (0.0, 0.25, 0.5, 0.75)
LIMIT = 8.0
_VALUES = "values"


def parts(architecture: Architecture, tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """What is folded in a model of this architecture. Raises ModelError when it has no such layer."""
    found = _layers(architecture, tensors)
    if not found:
        raise ModelError(
            f"--fold kv finds nothing to fold in this model ({architecture.name})", remedy="leave out --fold"
        )
    return "keys", "values" if architecture.gated else "value-rotations"


def find(
    weights: Weights,
    model: Path,
    text: Path,
    build: Build,
    *,
    listener: Listener = SILENT,
) -> Folding:
    """Factors of K and Q, and rotations or factors of V, for every layer with attention. ``listener`` is
    told of the layers.

    Raises ModelError when the model is not known or keeps K and V in a way that cannot be read, or nothing
    was found that helps; ToolError when llama-server fails.
    """
    architecture = architecture_of(weights.header.values, model.name)
    codes = Codes(build)
    layers = _layers(architecture, weights.tensors)
    samples = _capture(model, text, build)
    folding = Folding()
    listener.expect(len(layers))
    for pair in layers:
        if pair.layer in samples:
            k, v = samples[pair.layer]
            shape = heads(weights.header, pair.layer)
            _keys(folding, weights, architecture, pair.layer, shape, k, codes)
            _values(folding, weights, architecture, pair, shape, v, codes)
        listener.advance()
    if not folding.changes:
        raise ModelError(
            "--fold kv finds nothing to fold: K and V of this model quantize as well as they are",
            remedy="leave out --fold",
        )
    return folding


def rope_partner(shape: Heads, rope: str) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """For each channel of a head of K the one that RoPE turns together with it; itself where it turns
    none."""
    partner = np.arange(shape.k_dim)
    turned = partner[: shape.rotated]
    half = shape.rotated // 2
    partner[: shape.rotated] = turned ^ 1 if rope == "norm" else (turned + half) % shape.rotated
    return partner


def _layers(architecture: Architecture, tensors: Iterable[TensorInfo]) -> list[Pair]:
    return [pair for pair in pairs(architecture, tensors) if pair.rule.name == _VALUES]


def _capture(model: Path, text: Path, build: Build) -> dict[int, tuple[F32, F32]]:
    """K and V of some tokens of the text by layer, each [tokens, KV heads, d]."""
    found: dict[int, list[tuple[F32, F32]]] = {}
    for state in captured(model, text, build, n_ctx=N_CTX, chunks=CHUNKS):
        step = max(1, len(state.tokens) * CHUNKS // TOKENS)
        for layer, kept in state.layers.items():
            # the first token is an attention sink whose K is unlike all others
            some = (kept.k[1::step].astype(np.float32), kept.v[1::step].astype(np.float32))
            found.setdefault(layer, []).append(some)
    return {
        layer: (np.concatenate([k for k, _ in some]), np.concatenate([v for _, v in some]))
        for layer, some in found.items()
    }


def _keys(
    folding: Folding,
    weights: Weights,
    architecture: Architecture,
    layer: int,
    shape: Heads,
    k: F32,
    codes: Codes,
) -> None:
    """Scale the channels of K of one layer, and those of Q by the inverse."""
    prefix = f"blk.{layer}."
    normed = f"{prefix}attn_k_norm.weight" in weights.places
    partner = rope_partner(shape, architecture.rope)

    def tied(power: F64) -> F64:
        """Root mean squares, the same on both channels of a pair, and on all heads where they share it."""
        both = (power + power[:, partner]) / 2
        if normed:
            both = np.broadcast_to(both.mean(axis=0), both.shape)
        return np.asarray(np.sqrt(np.maximum(both, 1e-12)))

    own = tied(np.square(k.astype(np.float64)).mean(axis=0))
    reader = tied(_query_power(weights, architecture, prefix, shape))
    turn = hadamard(shape.k_dim & -shape.k_dim, shape.k_dim)

    def error(factors: F64) -> float:
        """Of the logits: each channel's error, weighed by what Q has there."""
        return _both(
            k, factors, None, turn, codes, lambda e: float((np.square(e) * reader**2).sum(-1).mean())
        )

    factors, found = _best(own, reader, error, f"{prefix}keys")
    folding.found.append(found)
    if found.gain > 1:
        folding.add(key_changes(weights, layer, shape, factors))


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


def value_changes(weights: Weights, pair: Pair, rotation: F64) -> dict[str, Change]:
    """The changes that turn V of every head by ``rotation`` [d, d], and the output projection's columns."""
    changes = {pair.source: Change(turn_rows=rotation), pair.readers[0]: Change(turn_columns=rotation)}
    bias = pair.source.removesuffix("weight") + "bias"
    if bias in weights.places:
        changes[bias] = Change(turn_columns=rotation)
    return changes


def _query_power(weights: Weights, architecture: Architecture, prefix: str, shape: Heads) -> F64:
    """Mean square of each channel of Q, [KV heads, d], mean over the query heads that share one; up to a
    factor.

    From the weights alone: inputs of the projection are what attn_norm makes of normalized values, and taken
    for uncorrelated.
    """
    gain = np.square(weights.whole(f"{prefix}attn_norm.weight").astype(np.float64)).ravel()
    power = np.square(weights.whole(f"{prefix}attn_q.weight").astype(np.float64)) @ gain
    if f"{prefix}attn_q.bias" in weights.places:
        power += np.square(weights.whole(f"{prefix}attn_q.bias").astype(np.float64)).ravel()
    by_head = power.reshape(shape.queries, -1)[:, : shape.k_dim]  # a gate comes behind the query of each head
    if architecture.qk_norm:
        norm = weights.whole(f"{prefix}attn_q_norm.weight").astype(np.float64).ravel()
        by_head = by_head / by_head.mean(axis=1, keepdims=True) * np.square(norm)
    return np.asarray(by_head.reshape(shape.kv, shape.share, shape.k_dim).mean(axis=1))


def _values(
    folding: Folding,
    weights: Weights,
    architecture: Architecture,
    pair: Pair,
    shape: Heads,
    v: F32,
    codes: Codes,
) -> None:
    """Turn V of one layer by head, or scale it where a gate follows."""
    gram = _readers_of_v(weights, pair.readers[0], shape)
    turn = hadamard(64, shape.v_dim)

    def error(factors: F64 | None, rotation: F64 | None) -> float:
        return _both(
            v,
            factors,
            rotation,
            turn,
            codes,
            lambda e: float(np.einsum("thd,hde,the->", e, gram, e, optimize=True)),
        )

    name = f"blk.{pair.layer}.values"
    if architecture.gated:
        own = np.sqrt(np.square(v.astype(np.float64)).mean(axis=0) + 1e-12)
        reader = np.sqrt(np.diagonal(gram, axis1=1, axis2=2) + 1e-12)
        factors, found = _best(own, reader, lambda f: error(f, None), name)
        folding.found.append(found)
        if found.gain > 1:
            folding.add(scaled(pair, 1 / factors.reshape(1, -1), weights, shape))
        return
    rotation = rotation_of(shape.v_dim)
    before, after = error(None, None), error(None, rotation)
    folding.found.append(Found(name, before / after, "turned" if after < before else "as it is"))
    if after < before:
        folding.add(value_changes(weights, pair, rotation))


def rotation_of(d: int) -> F64:
    """An orthogonal matrix [d, d] that spreads every channel over all others: the project's own where it has
    one of this size, else the cosine transform with random signs. It must not be Hadamard's: llama.cpp puts
    that on top, and twice it is nothing."""
    if d in SIZES:
        matrix = rotation_matrix("iso", "full", d).astype(np.float64)
    else:
        signs = np.random.default_rng(1).choice((-1.0, 1.0), d)
        i = np.arange(d)
        matrix = np.sqrt(2 / d) * np.cos(np.pi / d * np.outer(i, i + 0.5)) * signs
        matrix[0] /= np.sqrt(2)
    return matrix


def _readers_of_v(weights: Weights, output: str, shape: Heads) -> F64:
    """How the output projection weighs errors of V: W^T W [KV heads, d, d], summed over the query heads."""
    columns = weights.whole(output).astype(np.float64).reshape(-1, shape.kv, shape.share, shape.v_dim)
    return np.asarray(np.einsum("nhsd,nhse->hde", columns, columns, optimize=True))


def _best(own: F64, reader: F64, error: Callable[[F64], float], name: str) -> tuple[F64, Found]:
    """The factors with the least error among the powers that are tried."""
    tried = [(a, b, _factors(own, reader, a, b)) for a in OWN for b in READER]
    errors = [error(factors) for _, _, factors in tried]
    best = min(range(len(tried)), key=lambda i: errors[i])
    a, b, factors = tried[best]
    return factors, Found(name, errors[0] / errors[best], f"own^-{a:g} reader^{b:g}")


def _factors(own: F64, reader: F64, a: float, b: float) -> F64:
    logs = b * np.log(reader) - a * np.log(own)
    logs -= logs.mean(axis=-1, keepdims=True)
    return np.asarray(np.exp(np.clip(logs, -np.log(LIMIT), np.log(LIMIT))))


def _both(
    values: F32,
    factors: F64 | None,
    rotation: F64 | None,
    hadamard: F64 | None,
    codes: Codes,
    measure: Callable[[F64], float],
) -> float:
    """The error ``measure`` of values [tokens, heads, d] that are scaled or turned and quantized, brought
    back: the geometric mean over a runtime that stores them so, and one that turns them once more."""
    scale = np.ones(1) if factors is None else factors
    changed = values * scale if rotation is None else values.astype(np.float64) @ rotation.T
    errors = []
    for more in (None, hadamard) if hadamard is not None else (None,):
        stored = changed if more is None else changed @ more
        flat = stored.reshape(len(stored), -1).astype(np.float32)
        decoded = codes.decoded(KIND, flat).astype(np.float64).reshape(stored.shape)
        back = decoded if more is None else decoded @ more.T
        back = back / scale if rotation is None else back @ rotation
        errors.append(measure(back - values))
    return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-300)))))


def hadamard(size: int, d: int) -> F64 | None:
    """What llama.cpp turns each d values by before it stores them: Hadamard's matrix of ``size``, repeated;
    None where it does not (d is no multiple of 64)."""
    if d % 64:
        return None
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(d // size), matrix / np.sqrt(size))

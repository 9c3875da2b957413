"""Where a layer's Q and K come from: tensors, rows, norms, and which layers' queries read which layer's K."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.memory_shape import MemoryShape
from ggufrq.profile.facts import Facts
from ggufrq.profile.moments import Input, Moments, normalize, project
from ggufrq.profile.rope import Rope
from ggufrq.profile.tensors import Tensors

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """Q or K of a layer: ``heads`` of ``dim`` values, the rows of ``tensor`` from ``first`` on, ``stride``
    rows from one head to the next. ``letter`` is q or k."""

    letter: str
    block: int
    heads: int
    dim: int
    tensor: str
    first: int
    stride: int


def reads(shape: MemoryShape, facts: Facts) -> dict[int, list[int]]:
    """For each layer with K of its own the layers whose queries read it, itself first.

    Later layers of Gemma 3n and 4 read the K of the last layer of their kind that has one (``layer_reuse_cb``
    in src/llama-model.cpp).
    """
    readers = {il: [il] for il, layer in enumerate(shape.layers) if layer.k}
    if facts.architecture in ("gemma3n", "gemma4") and readers:
        own = max(readers) + 1
        for il in range(own, len(shape.layers)):
            readers[own - (2 if sees_window(shape, facts, il) else 1)].append(il)
    return readers


def sees_window(shape: MemoryShape, facts: Facts, il: int) -> bool:
    """Whether the layer sees a window only; also for one without K of its own."""
    if shape.layers[il].k:
        return shape.layers[il].window
    pattern = facts.get("attention.sliding_window_pattern", 5)
    return bool(pattern[il]) if isinstance(pattern, tuple) else il % pattern != pattern - 1


def sides(tensors: Tensors, facts: Facts, shape: MemoryShape, il: int, source: int) -> tuple[Side, Side]:
    """Q of layer ``il`` and K of layer ``source``, which it reads. Raises ModelError when a tensor is
    missing."""
    dim = shape.layers[source].head_k
    kv_heads = shape.layers[source].k // dim
    blocks = int(facts.number("block_count", len(shape.layers)))
    heads = facts.get("attention.head_count", 0)
    block, k_block = il % blocks, source % blocks  # layers of a model that runs through them again
    q_heads = int(heads[block]) if isinstance(heads, tuple) else int(heads)
    gate = 2 if facts.listed("gated_query") else 1
    q = Side("q", block, q_heads, dim, f"blk.{block}.attn_q", 0, gate * dim)
    k = Side("k", k_block, kv_heads, dim, f"blk.{k_block}.attn_k", 0, dim)
    if f"{q.tensor}.weight" not in tensors:
        q = Side("q", block, q_heads, dim, f"blk.{block}.attn_qkv", 0, dim)
    if f"{k.tensor}.weight" not in tensors:
        k_heads = heads[k_block] if isinstance(heads, tuple) else heads
        k = Side("k", k_block, kv_heads, dim, f"blk.{k_block}.attn_qkv", int(k_heads) * dim, dim)
    for side in (q, k):
        rows, end = tensors.shape(f"{side.tensor}.weight")[0], side.first + side.heads * side.stride
        if rows < end or (rows != end and side.tensor.endswith(f"_{side.letter}")):
            raise ModelError(
                f"{side.tensor} of {tensors.path.name} has {rows} rows, not {side.heads} heads of {dim}, "
                "so no profile can be made from its weights",
                remedy="run it without a profile: --kv-profile none",
            )
    if q.heads % k.heads:
        raise ModelError(
            f"{tensors.path.name} has {q.heads} heads of queries for {k.heads} of K in layer {il}",
            remedy="run it without a profile: --kv-profile none",
        )
    return q, k


def layer_input(tensors: Tensors, facts: Facts, block: int) -> Input:
    """The norm that Q and K of a layer read; inputs are white as they are where there is none."""
    centered = facts.get("attention.layer_norm_epsilon") is not None
    centered = centered and facts.get("attention.layer_norm_rms_epsilon") is None
    falcon = facts.architecture == "falcon"  # attention has a norm of its own in the larger ones
    for where in (f"blk.{block}.attn_norm_2", f"blk.{block}.attn_norm")[0 if falcon else 1 :]:
        weight = tensors.vector(f"{where}.weight")
        if weight is not None:
            return Input(weight, tensors.vector(f"{where}.bias"), centered)
    return Input()


def side_moments(
    tensors: Tensors, facts: Facts, side: Side, source: Input, rope: Rope | None, n_ctx: int
) -> Moments:
    """Moments of all heads as they are kept or meet K: behind bias, QK-norm and RoPE, averaged over the
    positions."""
    bias = _bias(tensors, side)
    scale = tensors.vector(f"{side.tensor}.scale")
    means, seconds = np.empty((side.heads, side.dim)), np.empty((side.heads, side.dim, side.dim))
    for head in range(side.heads):
        first = side.first + head * side.stride
        rows = tensors.rows(f"{side.tensor}.weight", first, side.dim)
        if scale is not None and scale.size == 1:
            rows = rows * np.float32(scale.item())
        part = None if bias is None else bias[first : first + side.dim]
        means[head], seconds[head] = project(rows, source, part)
    moments = Moments(means, seconds)
    rule = facts.rule("qk_norm")
    if not rule.get("after"):
        moments = _normalized(tensors, facts, side, moments, rope)
    if rope is not None:
        moments = Moments(rope.mean(moments.mean, n_ctx), rope.second_moment(moments.second, n_ctx))
    return _normalized(tensors, facts, side, moments, rope) if rule.get("after") else moments


def _bias(tensors: Tensors, side: Side) -> F64 | None:
    """The bias of the rows of ``side.tensor``; where Q, K and V are one tensor, theirs may still be three."""
    found = tensors.vector(f"{side.tensor}.bias")
    if found is None and side.tensor.endswith("attn_qkv"):
        found = tensors.vector(f"blk.{side.block}.attn_{side.letter}.bias")
        if found is not None:
            found = np.concatenate([np.zeros(side.first), found])
    return found


def _normalized(tensors: Tensors, facts: Facts, side: Side, moments: Moments, rope: Rope | None) -> Moments:
    rule = facts.rule("qk_norm")
    name = f"blk.{side.block}.attn_{side.letter}_norm"
    weight, bias = tensors.vector(f"{name}.weight"), tensors.vector(f"{name}.bias")
    plain = rope is not None and facts.number("expert_count", 0) in rule.get("plain", ())
    if weight is None and not plain:
        return moments
    whole = weight is not None and weight.ndim == 1 and weight.size == side.heads * side.dim != side.dim
    if whole and weight is not None:
        weight = weight.reshape(side.heads, side.dim)
        bias = None if bias is None else bias.reshape(side.heads, side.dim)
    return normalize(moments, weight, bias, whole=whole, centered=bool(rule.get("layer_norm")))

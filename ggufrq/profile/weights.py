"""A profile from the weights alone: no text, no forward pass, seconds for a model of 8B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggufrq.errors import ModelError, UsageError
from ggufrq.memory.model import memory_shape
from ggufrq.profile.angles import layer_rope
from ggufrq.profile.facts import Facts
from ggufrq.profile.file import LayerProfile, Profile
from ggufrq.profile.layers import layer_input, reads, sees_window, side_moments, sides
from ggufrq.profile.moments import grouped
from ggufrq.profile.solve import RIDGE, solve
from ggufrq.profile.tensors import Tensors

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Positions that moments are averaged over unless told otherwise: the context that the model was trained for,
#: but not more than most people run.
LONGEST = 32768


def profile_from_weights(
    model: Path,
    n_ctx: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    ridge: float = RIDGE,
) -> Profile:
    """The profile of the GGUF ``model``, of any type of weights, averaged over positions 0 … ``n_ctx`` - 1.

    ``progress`` is told how many layers are done, and of how many. One head of a layer is in memory at a
    time.

    Raises ModelError when the model keeps no K, keeps it compressed (MLA), is of an architecture that is not
    known, or is damaged; UsageError for a context without positions.
    """
    tensors = Tensors(model)
    facts = Facts(tensors.headers[0].values)
    _refuse_mla(tensors, facts)
    shape = memory_shape(tensors.headers)
    readers = reads(shape, facts)
    if not readers:
        raise ModelError(f"{model.name} keeps no K and V, so there is nothing to make a profile for")
    n_ctx = min(shape.native or LONGEST, LONGEST) if n_ctx is None else n_ctx
    if n_ctx < 1:
        raise UsageError(f"a profile for {n_ctx} positions makes no sense", remedy="at least 1")
    windows = any(layer.window for layer in shape.cached)
    sinks = any(".attn_sinks" in tensor.name for header in tensors.headers for tensor in header.tensors)
    exact = facts.mean_is_exact and not sinks
    layers: dict[int, LayerProfile] = {}
    for done, (il, users) in enumerate(readers.items()):
        q: list[F64] = []
        for user in users:
            q_side, k_side = sides(tensors, facts, shape, user, il)
            rope = layer_rope(
                tensors,
                facts,
                user,
                dim=q_side.dim,
                window=sees_window(shape, facts, user),
                windows=windows,
                n_ctx=n_ctx,
            )
            source = layer_input(tensors, facts, q_side.block)
            moments = side_moments(tensors, facts, q_side, source, rope, n_ctx)
            q.append(grouped(moments, k_side.heads))
            if user == il:
                k = side_moments(tensors, facts, k_side, source, rope, n_ctx)
        layers[il] = _layer(k.mean, k.covariance if exact else k.second, np.mean(q, axis=0), exact, ridge)
        if progress is not None:
            progress(done + 1, len(readers))
    return Profile(tensors.fingerprint(), "weights", n_ctx, layers)


def _layer(mean: F64, k: F64, q: F64, exact: bool, ridge: float) -> LayerProfile:
    metric = solve(k, q, ridge)
    kept = mean.astype(np.float32) if exact and mean.any() else None
    return LayerProfile(
        metric.forward.astype(np.float32), metric.inverse.astype(np.float32), kept, metric.gain
    )


def _refuse_mla(tensors: Tensors, facts: Facts) -> None:
    if facts.get("attention.kv_lora_rank") or "blk.0.attn_kv_a_mqa.weight" in tensors:
        raise ModelError(
            f"{tensors.path.name} keeps K compressed (MLA), for which no profile is made yet",
            remedy="run it without a profile: --kv-profile none",
        )

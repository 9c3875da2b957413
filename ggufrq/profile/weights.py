"""A profile from the weights alone: no text, no forward pass, seconds for a model of 8B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.profile.file import LayerProfile, Profile
from ggufrq.profile.layers import layer_input, side_moments, sides
from ggufrq.profile.moments import F64, Moments, grouped
from ggufrq.profile.solve import RIDGE
from ggufrq.profile.whole import Whole


def profile_from_weights(
    model: Path,
    n_ctx: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    ridge: float = RIDGE,
) -> Profile:
    """The profile of the GGUF ``model``, of any type of weights, averaged over positions 0 … ``n_ctx`` - 1.

    ``progress`` is told how many layers are done, and of how many. On each core one layer is worked on, of
    which the weights of one head are in memory at a time.

    Raises ModelError when the model keeps no K, keeps it compressed (MLA), is of an architecture that is not
    known, or is damaged; UsageError for a context without positions.
    """
    whole = Whole.of(model, n_ctx, ridge)
    layers: dict[int, LayerProfile] = {}
    for il, layer in whole.by_layer(lambda il: layer_from_weights(whole, il)):
        layers[il] = layer
        if progress is not None:
            progress(len(layers), len(whole.readers))
    return Profile(fingerprint(model), "weights", whole.n_ctx, layers)


def layer_from_weights(whole: Whole, il: int) -> LayerProfile:
    """The profile of layer ``il``. Raises ModelError."""
    return whole.solved(*moments_from_weights(whole, il))


def moments_from_weights(whole: Whole, il: int) -> tuple[Moments, F64]:
    """Moments of K of layer ``il``, and second moments [kv_heads, dim, dim] of the queries that share each
    head, as attention reads them, averaged over the positions. Raises ModelError."""
    k = _moments(whole, il, il, "k")
    q = [grouped(_moments(whole, user, il, "q"), len(k.mean)) for user in whole.readers[il]]
    return k, np.mean(q, axis=0)


def _moments(whole: Whole, user: int, il: int, letter: str) -> Moments:
    """Moments of K of layer ``il``, or of the queries of layer ``user`` that meet it."""
    side = sides(whole.tensors, whole.facts, whole.shape, user, il)["qk".index(letter)]
    source = layer_input(whole.tensors, whole.facts, side.block)
    rope = whole.rope(user, side.dim)
    return side_moments(whole.tensors, whole.facts, side, source, rope, whole.n_ctx)

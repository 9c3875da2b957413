"""A profile from the weights alone: no text, no forward pass, seconds for a model of 8B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.machine import cores
from ggufrq.ggufs.memory_shape import MemoryShape, memory_shape
from ggufrq.profile.angles import layer_rope
from ggufrq.profile.facts import Facts
from ggufrq.profile.file import LayerProfile, Profile
from ggufrq.profile.layers import layer_input, reads, sees_window, side_moments, sides
from ggufrq.profile.moments import Moments, grouped
from ggufrq.profile.solve import RIDGE, solve
from ggufrq.profile.tensors import Tensors

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

    ``progress`` is told how many layers are done, and of how many. On each core one layer is worked on, of
    which the weights of one head are in memory at a time.

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
    whole = _Model(tensors, facts, shape, n_ctx, ridge)
    layers: dict[int, LayerProfile] = {}
    # threads of BLAS wait for each other in loops: on a busy machine, or in a container with fewer cores than
    # they see, they take ten times as long for matrices of this size
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(cores(), len(readers))) as pool:
        for il, layer in zip(readers, pool.map(whole.layer, readers, readers.values()), strict=True):
            layers[il] = layer
            if progress is not None:
                progress(len(layers), len(readers))
    return Profile(tensors.fingerprint(), "weights", n_ctx, layers)


@dataclass(frozen=True)
class _Model:
    """What all layers share."""

    tensors: Tensors
    facts: Facts
    shape: MemoryShape
    n_ctx: int
    ridge: float

    @cached_property
    def windows(self) -> bool:
        """Whether some layer sees a window only."""
        return any(layer.window for layer in self.shape.cached)

    @cached_property
    def exact(self) -> bool:
        """Whether a mean can be taken out of K without changing what attention gives."""
        names = (tensor.name for header in self.tensors.headers for tensor in header.tensors)
        return self.facts.mean_is_exact and not any(".attn_sinks" in name for name in names)

    def layer(self, il: int, users: Sequence[int]) -> LayerProfile:
        """The profile of layer ``il``, whose K the queries of ``users`` read."""
        k = self._moments(il, il, "k")
        q = np.mean([grouped(self._moments(user, il, "q"), len(k.mean)) for user in users], axis=0)
        metric = solve(k.covariance if self.exact else k.second, q, self.ridge)
        mean = k.mean.astype(np.float32) if self.exact and k.mean.any() else None
        return LayerProfile(
            metric.forward.astype(np.float32), metric.inverse.astype(np.float32), mean, metric.gain
        )

    def _moments(self, user: int, il: int, letter: str) -> Moments:
        """Moments of K of layer ``il``, or of the queries of layer ``user`` that meet it."""
        side = sides(self.tensors, self.facts, self.shape, user, il)["qk".index(letter)]
        window = sees_window(self.shape, self.facts, user)
        rope = layer_rope(
            self.tensors,
            self.facts,
            user,
            dim=side.dim,
            window=window,
            windows=self.windows,
            n_ctx=self.n_ctx,
        )
        source = layer_input(self.tensors, self.facts, side.block)
        return side_moments(self.tensors, self.facts, side, source, rope, self.n_ctx)


def _refuse_mla(tensors: Tensors, facts: Facts) -> None:
    if facts.get("attention.kv_lora_rank") or "blk.0.attn_kv_a_mqa.weight" in tensors:
        raise ModelError(
            f"{tensors.path.name} keeps K compressed (MLA), for which no profile is made yet",
            remedy="run it without a profile: --kv-profile none",
        )

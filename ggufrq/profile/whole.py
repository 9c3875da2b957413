"""What all layers of a profile share: the model, over which positions is averaged, and how moments become a
layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.machine import cores
from ggufrq.ggufs.memory_shape import MemoryShape, is_named, memory_shape
from ggufrq.profile.angles import layer_rope
from ggufrq.profile.facts import Facts
from ggufrq.profile.file import LayerProfile
from ggufrq.profile.layers import reads, sees_window
from ggufrq.profile.moments import Moments
from ggufrq.profile.rope import Rope
from ggufrq.profile.solve import RIDGE, solve
from ggufrq.profile.tensors import Tensors

F64 = npt.NDArray[np.float64]

#: Positions that moments are averaged over unless told otherwise: the context that the model was trained for,
#: but not more than most people run.
LONGEST = 32768


@dataclass(frozen=True)
class Whole:
    """A model, the positions 0 … ``n_ctx`` - 1, and the ridge of the solution."""

    tensors: Tensors
    facts: Facts
    shape: MemoryShape
    n_ctx: int
    ridge: float = RIDGE

    @classmethod
    def of(cls, model: Path, n_ctx: int | None = None, ridge: float = RIDGE) -> Whole:
        """The GGUF ``model``; without ``n_ctx`` its own context, ``LONGEST`` at most.

        Raises ModelError when it keeps no K, keeps it compressed (MLA), or is damaged; UsageError for a
        context without positions.
        """
        tensors = Tensors(model)
        facts = Facts(tensors.headers[0].values)
        _refuse_others(tensors, facts)
        shape = memory_shape(tensors.headers)
        n_ctx = min(shape.native or LONGEST, LONGEST) if n_ctx is None else n_ctx
        if n_ctx < 1:
            raise UsageError(f"a profile for {n_ctx} positions makes no sense", remedy="at least 1")
        whole = cls(tensors, facts, shape, n_ctx, ridge)
        if not whole.readers:
            raise ModelError(f"{model.name} keeps no K and V, so there is nothing to make a profile for")
        return whole

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """For each layer with K of its own the layers whose queries read it."""
        return reads(self.shape, self.facts)

    @cached_property
    def windows(self) -> bool:
        """Whether some layer sees a window only."""
        return any(layer.window for layer in self.shape.cached)

    @cached_property
    def exact(self) -> bool:
        """Whether a mean can be taken out of K without changing what attention gives."""
        return self.facts.mean_is_exact(self.tensors.names)

    def rope(self, il: int, dim: int) -> Rope | None:
        """RoPE of heads of ``dim`` values in layer ``il``. Raises ModelError as ``layer_rope``."""
        window = sees_window(self.shape, self.facts, il)
        return layer_rope(
            self.tensors, self.facts, il, dim=dim, window=window, windows=self.windows, n_ctx=self.n_ctx
        )

    def require_known(self) -> None:
        """Raises ModelError for an architecture of unknown RoPE, before anything takes time."""
        self.rope(next(iter(self.readers)), 2)

    def solved(self, k: Moments, q: F64) -> LayerProfile:
        """The profile of a layer with these moments of K and second moments of the queries [kv_heads, dim,
        dim], both as attention reads them, averaged over the positions."""
        metric = solve(k.covariance if self.exact else k.second, q, self.ridge)
        mean = k.mean.astype(np.float32) if self.exact and k.mean.any() else None
        return LayerProfile(
            metric.forward.astype(np.float32), metric.inverse.astype(np.float32), mean, metric.gain
        )

    def by_layer(self, layer: Callable[[int], LayerProfile]) -> Iterator[tuple[int, LayerProfile]]:
        """``layer`` of each layer with K, one on each core."""
        # threads of BLAS wait for each other in loops: on a busy machine, or in a container with fewer cores
        # than they see, they take ten times as long for matrices of this size
        workers = min(cores(), len(self.readers))
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
            yield from zip(self.readers, pool.map(layer, self.readers), strict=True)


def _refuse_others(tensors: Tensors, facts: Facts) -> None:
    if facts.get("attention.kv_lora_rank") or "blk.0.attn_kv_a_mqa.weight" in tensors:
        raise ModelError(
            f"{tensors.path.name} keeps K compressed (MLA), for which no profile is made: V is read from "
            "the same values, which a matrix that suits the keys would make coarser",
            remedy="run it without a profile: --kv-profile none",
        )
    if is_named(facts.architecture, "turned"):
        raise ModelError(
            f"the graph of {tensors.path.name} turns K by itself (MSA), for which no profile is made",
            remedy="run it without a profile: --kv-profile none",
        )

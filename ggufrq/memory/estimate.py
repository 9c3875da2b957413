"""What a model takes with a cache type and a context, and the largest context that a memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ggufrq.base.errors import ToolError
from ggufrq.cache.kv import KvPlan
from ggufrq.ggufs.heads import Heads
from ggufrq.ggufs.memory_shape import MemoryShape
from ggufrq.ggufs.placement import Placement, fitting
from ggufrq.memory import compute
from ggufrq.memory.cells import (
    CELLS,
    ContextSettings,
    exact_bytes,
    held_plan,
    index_bytes,
    kv_bytes,
    output_bytes,
    profile_bytes,
    state_bytes,
)
from ggufrq.memory.compute import Buffers

_logger = logging.getLogger(__name__)

BuffersOf = Callable[[KvPlan, ContextSettings], Buffers]


@dataclass(frozen=True)
class Estimate:
    """Bytes that a model takes with a cache of these types and a context of so many tokens, or ``why_not``.

    ``exact_tokens`` are the newest and first ones in f16, ``index`` the cache of an indexer of sparse
    attention. ``compute`` and ``output`` are where the logits of one token of each sequence are asked for
    (llama-server, llama-cli); ``batch_extra`` comes on top where those of whole batches are
    (llama-completion, -perplexity).
    """

    kv: str
    ctx: int
    weights: int
    k: int = 0
    v: int = 0
    index: int = 0
    exact_tokens: int = 0
    profile: int = 0
    state: int = 0
    compute: int = 0
    output: int = 0
    batch_extra: int = 0
    exact: bool = True
    why_not: str | None = None

    @property
    def total(self) -> int:
        """All of it, without ``batch_extra``."""
        return self.weights + self.cache + self.state + self.compute + self.output

    @property
    def cache(self) -> int:
        """K and V and what is kept beside them."""
        return self.k + self.v + self.index + self.exact_tokens + self.profile


@dataclass(frozen=True)
class Fit:
    """The largest context for a cache type: what it takes, or None when not even the smallest fits;
    ``native`` when the model's own context is what limits it."""

    kv: str
    estimate: Estimate | None
    native: bool = False
    why_not: str | None = None


@dataclass(frozen=True)
class Memory:
    """Estimates for a model. ``dry`` says what llama.cpp computes in, where there is a build; what it cannot
    say, and all without it, is estimated. ``gpu`` as for ``Heads.why_not``."""

    shape: MemoryShape
    weights: int
    dry: BuffersOf | None = None
    gpu: bool = False

    def estimate(self, plan: KvPlan, settings: ContextSettings) -> Estimate:
        """What the model takes."""
        plan = held_plan(self.shape, plan)
        why = Heads.of(self.shape).why_not(plan, gpu=self.gpu)
        if why is not None:
            return Estimate(plan.title, settings.ctx, self.weights, why_not=why)
        k, v = kv_bytes(self.shape, plan, settings)
        buffers = self._buffers(plan, settings)
        return Estimate(
            kv=plan.title,
            ctx=settings.ctx,
            weights=self.weights,
            k=k,
            v=v,
            index=index_bytes(self.shape, plan, settings),
            exact_tokens=exact_bytes(self.shape, plan, settings),
            profile=profile_bytes(self.shape, plan),
            state=state_bytes(self.shape, settings),
            compute=buffers.served,
            output=output_bytes(self.shape, settings),
            batch_extra=buffers.batch - buffers.served,
            exact=buffers.exact,
        )

    def fit(self, plan: KvPlan, budget: int, parallel: int = 1) -> Fit:
        """The largest context for these types within ``budget`` bytes, no longer than the model's own."""
        step = CELLS * parallel
        most = max(1, self.shape.native * parallel // step)
        smallest = self.estimate(plan, ContextSettings(step, parallel))
        if smallest.why_not is not None or smallest.total > budget:
            return Fit(plan.title, None, why_not=smallest.why_not)
        best, low, high = smallest, 1, most
        while low < high:
            middle = (low + high + 1) // 2
            found = self.estimate(plan, ContextSettings(step * middle, parallel))
            if found.total <= budget:
                best, low = found, middle
            else:
                high = middle - 1
        return Fit(plan.title, best, native=low == most)

    def place(
        self, plan: KvPlan, settings: ContextSettings, sizes: Mapping[str, int], vram: int, ram: int | None
    ) -> tuple[Estimate, Placement | None]:
        """What the model takes, and how its weights (bytes by name of the tensor) are to be placed so that
        all else is in ``vram`` bytes with as much of the model as there is room for, and what is left in
        ``ram``; no placement where there is no room."""
        found = self.estimate(plan, settings)
        if found.why_not is not None:
            return found, None
        return found, fitting(sizes, vram - (found.total - found.weights), ram)

    def _buffers(self, plan: KvPlan, settings: ContextSettings) -> Buffers:
        if self.dry is not None:
            try:
                return self.dry(plan, settings)
            except ToolError as error:
                _logger.debug("estimated, because %s", error.message)
        return compute.estimate(self.shape, plan, settings)

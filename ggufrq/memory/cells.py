"""The caches of a context as llama.cpp lays them out: cells, bytes, recurrent state.

Follows ``llama_context`` (padding of the context), ``llama_kv_cache_iswa`` (cells of a window) and
``llama_memory_recurrent`` in llama.cpp's src, with flash attention on.
"""

from __future__ import annotations

from dataclasses import dataclass

from ggufrq.cache.kv import KvPlan, Sought, filled_up, kv_type
from ggufrq.ggufs.header import pad
from ggufrq.ggufs.heads import Heads
from ggufrq.ggufs.memory_shape import MemoryShape

#: Contexts, and caches of windows, are padded to multiples of so many cells.
CELLS = 256
#: Tokens of a batch and of the part that is computed at a time, llama.cpp's own choice.
BATCH, UBATCH = 2048, 512
_F16, _F32 = 2, 4


@dataclass(frozen=True)
class ContextSettings:
    """A context of ``ctx`` tokens for ``parallel`` sequences together, as ``-c`` and ``-np`` of
    llama-server."""

    ctx: int
    parallel: int = 1

    @property
    def cells(self) -> int:
        """Cells for each sequence."""
        return pad(pad(self.ctx, CELLS) // self.parallel, CELLS)

    @property
    def tokens(self) -> int:
        """Tokens that are computed at a time, at most."""
        return min(self.ctx, BATCH, UBATCH)

    def window_cells(self, window: int) -> int:
        """Cells for each sequence where layers see so many tokens only."""
        return pad(min(self.cells, window + self.tokens), CELLS)


def kv_bytes(shape: MemoryShape, plan: KvPlan, settings: ContextSettings) -> tuple[int, int]:
    """Bytes of K and of V in all caches. ``Heads.why_not`` must have nothing against the
    plan."""
    k = v = 0
    for layer, (k_row, v_row) in zip(shape.cached, plan.layer_bytes(shape), strict=True):
        cells = settings.window_cells(shape.window) if layer.window else settings.cells
        k += k_row * cells * settings.parallel
        v += v_row * cells * settings.parallel
    return k, v


def index_bytes(shape: MemoryShape, plan: KvPlan, settings: ContextSettings) -> int:
    """Bytes of the cache of an indexer: its keys, in f16 where those of the model are in a type of ours, and
    what llama.cpp lays out for V with them. All layers alike, by the base types."""
    key = kv_type("f16") if plan.base.k.ours else plan.base.k
    row = sum(
        key.bytes_for(layer.index) + plan.base.v.row_bytes(layer.index_v, layer.index_v, filled=False)
        for layer in shape.cached
        if layer.index
    )
    return row * settings.cells * settings.parallel


def exact_bytes(shape: MemoryShape, plan: KvPlan, settings: ContextSettings) -> int:
    """Bytes of the newest and first tokens in f16, over all caches."""
    total = 0
    for layer in shape.cached:
        cells = settings.window_cells(shape.window) if layer.window else settings.cells
        rows = plan.exact_rows(cells, settings.parallel, settings.parallel)
        k = kv_type("f16").row_bytes(layer.k, layer.head_k, filled=plan.k_ours)
        total += rows * (k + kv_type("f16").row_bytes(layer.v, layer.head_v, filled=plan.v_ours))
    return total


def profile_bytes(shape: MemoryShape, plan: KvPlan) -> int:
    """Bytes of a profile: for each head of K a matrix for K and one for the queries, in f16 where K is
    quantized, and at most a mean."""
    if plan.profile is None:
        return 0
    pairs = plan.resolve(len(shape.cached))
    return sum(
        layer.k // layer.head_k * head * (2 * head * (_F32 if pair.k.block == 1 else _F16) + _F32)
        for layer, pair in zip(shape.cached, pairs, strict=True)
        if (head := filled_up(layer.head_k))
    )


def state_bytes(shape: MemoryShape, settings: ContextSettings) -> int:
    """Bytes of the recurrent state, which is kept in 32 bits whatever the cache type is."""
    return shape.state * _F32 * settings.parallel


def output_bytes(shape: MemoryShape, settings: ContextSettings) -> int:
    """Bytes of the buffer for logits, one token of each sequence."""
    return shape.vocabulary * _F32 * settings.parallel


def held_plan(shape: MemoryShape, plan: KvPlan) -> KvPlan:
    """The plan without what nobody asked for and llama.cpp leaves out: tokens in f16 where an indexer chooses
    the keys, and a profile that would be found where V is read from K (MLA) or the graph turns K itself."""
    if plan.optional and any(layer.index for layer in shape.layers):
        plan = plan.with_exact(0)
    heads = Heads.of(shape)
    none = isinstance(plan.profile, Sought) and (heads.mla or heads.turned)
    return plan.with_profile(None) if none else plan

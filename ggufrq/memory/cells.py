"""The caches of a context as llama.cpp lays them out: cells, bytes, recurrent state, and what cannot be.

Follows ``llama_context`` (padding of the context), ``llama_kv_cache_iswa`` (cells of a window) and
``llama_memory_recurrent`` in llama.cpp's src, with flash attention on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggufrq.base.errors import UsageError
from ggufrq.cache.kv import KvPair, KvPlan, KvType, parse_kv
from ggufrq.ggufs.header import pad
from ggufrq.ggufs.memory_shape import Layer, MemoryShape

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
    """Bytes of K and of V in all caches. ``why_not`` must have nothing against the plan."""
    k = v = 0
    for layer, (k_row, v_row) in zip(shape.cached, plan.layer_bytes(shape), strict=True):
        cells = settings.window_cells(shape.window) if layer.window else settings.cells
        k += k_row * cells * settings.parallel
        v += v_row * cells * settings.parallel
    return k, v


def exact_bytes(shape: MemoryShape, plan: KvPlan, settings: ContextSettings) -> int:
    """Bytes of the newest and first tokens in f16, over all caches."""
    total = 0
    for layer in shape.cached:
        cells = settings.window_cells(shape.window) if layer.window else settings.cells
        rows = plan.exact_rows(cells, settings.parallel, settings.parallel)
        total += 2 * rows * (layer.k + layer.v)
    return total


def profile_bytes(shape: MemoryShape, plan: KvPlan) -> int:
    """Bytes of a profile: for each head of K a matrix for K and one for the queries, in f16 where K is
    quantized, and at most a mean."""
    if plan.profile is None or shape.mla:
        return 0
    pairs = plan.resolve(len(shape.cached))
    return sum(
        layer.k * (2 * layer.head_k * (_F32 if pair.k.block == 1 else _F16) + _F32)
        for layer, pair in zip(shape.cached, pairs, strict=True)
    )


def state_bytes(shape: MemoryShape, settings: ContextSettings) -> int:
    """Bytes of the recurrent state, which is kept in 32 bits whatever the cache type is."""
    return shape.state * _F32 * settings.parallel


def output_bytes(shape: MemoryShape, settings: ContextSettings) -> int:
    """Bytes of the buffer for logits, one token of each sequence."""
    return shape.vocabulary * _F32 * settings.parallel


def why_not(shape: MemoryShape, plan: KvPlan, *, narrow: bool = True) -> str | None:
    """Why llama.cpp does not keep the model's cache in these types: a sentence, or None when it does.
    ``narrow``: it has blocks of 64 for heads that 128 does not divide (``Build.holds_narrow``)."""
    try:
        pairs = plan.resolve(len(shape.cached)) if shape.cached else ()
    except UsageError as error:
        return error.message
    if shape.mla and plan.layered:
        return "K and V are one here (MLA): layers cannot have types of their own"
    if shape.mla and plan.base.k != plan.base.v:
        return "K and V are one here (MLA): they cannot have different types"
    narrow = narrow and not shape.mla
    for layer, pair in zip(shape.cached, pairs, strict=True):
        for side, kind, head in (("K", pair.k, layer.head_k), ("V", pair.v, layer.head_v)):
            if head % (kind.for_heads(head) if narrow else kind).block:
                blocks = f"64 or {kind.block}" if kind.ours and narrow else f"{kind.block}"
                where = " on a GPU" if kind.ours and not narrow and not shape.mla else ""
                why = f"{kind.name} takes blocks of {blocks} values{where}, which heads of {side} with {head}"
                return f"{why} do not fill; {_instead(shape.cached)} can be used"
    return None


def _instead(layers: Sequence[Layer]) -> str:
    """The smallest usual types that any of the layers can keep."""

    def fits(kind: KvType) -> bool:
        return not any(layer.head_k % kind.block or layer.head_v % kind.block for layer in layers)

    found: list[KvPair] = [pair for pair in map(parse_kv, ("q8_0", "q4_0")) if fits(pair.k)]
    return " or ".join(pair.name for pair in found) or "f16"

"""The caches of a context as llama.cpp lays them out: cells, bytes, recurrent state, and what cannot be.

Follows ``llama_context`` (padding of the context), ``llama_kv_cache_iswa`` (cells of a window) and
``llama_memory_recurrent`` in llama.cpp's src, with flash attention on.
"""

from __future__ import annotations

from dataclasses import dataclass

from ggufrq.base.errors import UsageError
from ggufrq.cache.kv import KvPair, KvPlan, KvType, Sought, filled_up, kv_type, parse_kv
from ggufrq.ggufs.header import pad
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
        k = kv_type("f16").row_bytes(layer.k, layer.head_k, filled=plan.k_ours)
        total += rows * (k + kv_type("f16").row_bytes(layer.v, layer.head_v, filled=plan.v_ours))
    return total


def profile_bytes(shape: MemoryShape, plan: KvPlan) -> int:
    """Bytes of a profile: for each head of K a matrix for K and one for the queries, in f16 where K is
    quantized, and at most a mean."""
    if plan.profile is None or shape.mla:
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
    """The plan without what nobody asked for and llama.cpp leaves out where V is read from K (MLA): a profile
    that would be found, and tokens in f16."""
    if not shape.mla:
        return plan
    plan = plan.with_exact(0) if plan.optional else plan
    return plan.with_profile(None) if isinstance(plan.profile, Sought) else plan


def why_not(shape: MemoryShape, plan: KvPlan, *, gpu: bool = False) -> str | None:
    """Why llama.cpp does not keep the model's cache in these types: a sentence, or None when it does.
    ``gpu``: on one without five bits (``Build.lacks_five_bits``); which heads each has is told at load."""
    try:
        pairs = plan.resolve(len(shape.cached)) if shape.cached else ()
    except UsageError as error:
        return error.message
    if shape.mla and plan.layered:
        return "K and V are one here (MLA): layers cannot have types of their own"
    if shape.mla and plan.base.k != plan.base.v:
        return "K and V are one here (MLA): they cannot have different types"
    for layer, pair in zip(shape.cached, pairs, strict=True):
        for side, kind, head in (("K", pair.k, layer.head_k), ("V", pair.v, layer.head_v)):
            if gpu and kind.on_cpu_alone:
                return f"{kind.name} is for the CPU alone; {_instead(shape, kind)} can be used"
            if not kind.holds(head, fill=not shape.mla):
                why = _why_head(kind, side, head, fill=not shape.mla)
                return f"{why}; {_instead(shape, kind)} can be used"
    return None


def _why_head(kind: KvType, side: str, head: int, *, fill: bool) -> str:
    """Why heads of so many values are not kept in a type."""
    whole = filled_up(head)
    if kind.ours and fill and whole != head:
        bits = f"{kind.for_heads(head).bits:.2f} bits a value"
        return f"{kind.name} takes {bits} in heads of {side} with {head}, which are filled up to {whole}"
    blocks = f"64 or {kind.block}" if kind.ours else f"{kind.block}"
    return f"{kind.name} takes blocks of {blocks} values, which heads of {side} with {head} do not fill"


def _instead(shape: MemoryShape, kind: KvType) -> str:
    """The smallest usual types that any of the layers can keep, and the widest of the same family as
    ``kind``."""
    family = [f"{kind.name[:-1]}{bits}" for bits in range(int(kind.name[-1]) - 1, 1, -1)] if kind.ours else []

    def fits(pair: KvPair) -> bool:
        heads = {head for layer in shape.cached for head in (layer.head_k, layer.head_v)}
        return all(pair.k.holds(head, fill=not shape.mla) for head in heads)

    usual = [pair.name for pair in map(parse_kv, ("q8_0", "q4_0")) if fits(pair)] or ["f16"]
    return " or ".join([*usual, *[pair.name for pair in map(parse_kv, family) if fits(pair)][:1]])

"""Which cache types the K and V of a model can be kept in, layer by layer: the one place that says so before
llama.cpp does (src/llama-rq-check.cpp), in what works instead, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ggufrq.base.errors import UsageError
from ggufrq.cache.kv import KvPair, KvPlan, KvType, filled_up, parse_kv
from ggufrq.ggufs.memory_shape import Layer, MemoryShape, is_mla, is_named, layers_of, unread

#: Named where another type cannot be used; f16 where these cannot either.
_USUAL = ("q8_0", "q4_0")


@dataclass(frozen=True)
class Heads:
    """What decides it: the layers that keep K and V, and the kind of attention. ``mla``: V is read from K;
    ``turned``: the graph turns Q, K and V by itself; ``plain``: there is no flash attention; ``unread``: why
    the graph cannot read types of ours."""

    layers: tuple[Layer, ...]
    mla: bool
    turned: bool
    plain: bool
    unread: str | None

    @classmethod
    def of(cls, shape: MemoryShape) -> Heads:
        """Those of a model whose memory is known."""
        return _heads(shape.architecture, shape.cached, mla=shape.mla)

    @classmethod
    def of_metadata(cls, values: Mapping[str, Any]) -> Heads:
        """Those of the model with this metadata. Raises ModelError when it does not tell."""
        cached = tuple(layer for layer in layers_of(values) if layer.caches)
        return _heads(str(values["general.architecture"]), cached, mla=is_mla(values))

    def holds_exact(self, *, gpu: bool = False) -> bool:
        """Whether tokens can be kept in f16 beside the types (src/llama-rq-recent.cpp): not where an indexer
        chooses the keys, and on a GPU not where V is read from K."""
        return not any(layer.index for layer in self.layers) and not (self.mla and gpu)

    def why_not(self, plan: KvPlan, *, gpu: bool = False) -> str | None:
        """Why llama.cpp does not keep the cache in these types: a sentence that names what can be used, or
        None when it does. ``gpu``: on one without five bits (``Build.lacks_five_bits``); which heads
        each has is told at load."""
        try:
            pairs = plan.resolve(len(self.layers)) if self.layers else ()
        except UsageError as error:
            return error.message
        one = "K and V are one here (MLA)" if self.mla else "the graph turns all layers alike (MSA)"
        if plan.layered and (self.mla or self.turned):
            return f"{one}: layers cannot have types of their own"
        if self.mla and plan.base.k != plan.base.v:
            return f"{one}: they cannot have different types"
        why = self._why_not_at_all(plan)
        if why is not None:
            return f"{why}; {self._instead(plan.base.k, gpu=gpu)} can be used"
        for layer, pair in zip(self.layers, pairs, strict=True):
            for side, kind, head in (("K", pair.k, layer.head_k), ("V", pair.v, layer.head_v)):
                why = self._why_not_here(kind, side, head, gpu=gpu)
                if why is not None:
                    return f"{why}; {self._instead(kind, gpu=gpu)} can be used"
        return None

    def _why_not_at_all(self, plan: KvPlan) -> str | None:
        """Why no layer is kept so, whatever its heads."""
        if plan.rotated and self.unread is not None:
            return f"the graph of this model {self.unread}, so that types of ours cannot be read"
        if self.plain and any(pair.v.block > 1 for pair in plan.pairs):
            return "this model has no flash attention, without which V cannot be quantized"
        return None

    def _why_not_here(self, kind: KvType, side: str, head: int, *, gpu: bool) -> str | None:
        """Why heads of so many values are not kept in a type."""
        if gpu and kind.on_cpu_alone:
            return f"{kind.name} is for the CPU alone"
        if kind.holds(head, fill=self._fills):
            return None
        whole = filled_up(head)
        if kind.ours and self._fills and whole != head:
            bits = f"{kind.for_heads(head).bits:.2f} bits a value"
            return f"{kind.name} takes {bits} in heads of {side} with {head}, which are filled up to {whole}"
        blocks = f"64 or {kind.block}" if kind.ours else f"{kind.block}"
        return f"{kind.name} takes blocks of {blocks} values, which heads of {side} with {head} do not fill"

    @property
    def _fills(self) -> bool:
        return not (self.mla or self.turned)

    def _instead(self, kind: KvType, *, gpu: bool) -> str:
        """Usual types that all layers can be kept in, and the widest of the same family as ``kind``."""
        family = [f"{kind.name[:-1]}{n}" for n in range(int(kind.name[-1]) - 1, 1, -1)] if kind.ours else []
        usual = [name for name in _USUAL if self._can(name, gpu=gpu)] or ["f16"]
        return " or ".join([*usual, *[name for name in family if self._can(name, gpu=gpu)][:1]])

    def _can(self, name: str, *, gpu: bool) -> bool:
        pair = parse_kv(name)
        if self._why_not_at_all(KvPlan(pair)) is not None:
            return False
        return all(self._holds(pair, layer, gpu=gpu) for layer in self.layers)

    def _holds(self, pair: KvPair, layer: Layer, *, gpu: bool) -> bool:
        sides = (("K", pair.k, layer.head_k), ("V", pair.v, layer.head_v))
        return all(self._why_not_here(kind, side, head, gpu=gpu) is None for side, kind, head in sides)


def _heads(architecture: str, layers: tuple[Layer, ...], *, mla: bool) -> Heads:
    turned, plain = (is_named(architecture, rule) for rule in ("turned", "plain_attention"))
    return Heads(layers, mla, turned, plain, unread(architecture))

"""What a fold does to a model: changes by tensor, made of factors for the channels between two sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ggufrq.make.fold.changes import F64, Change
from ggufrq.make.fold.facts import Heads, Pair
from ggufrq.make.fold.weights import Weights


@dataclass(frozen=True)
class Found:
    """What was found for one pair, layer or head: a name, by how much the error is expected to shrink (1: not
    at all), and the setting that does it."""

    name: str
    gain: float
    setting: str


@dataclass
class Folding:
    """Changes by tensor, and what was found."""

    changes: dict[str, Change] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)

    def add(self, changes: Mapping[str, Change]) -> None:
        """Put more changes on top of those that are there."""
        for name, change in changes.items():
            self.changes[name] = self.changes[name].then(change) if name in self.changes else change


def scaled(pair: Pair, factors: F64, weights: Weights, heads: Heads | None = None) -> dict[str, Change]:
    """The changes that divide what the source of ``pair`` writes by ``factors`` [experts or 1, channels] and
    multiply the columns of its readers. ``heads`` where several query heads share the channels of V."""
    bias = pair.source.removesuffix("weight") + "bias"
    if pair.rule.rows:
        changes = {pair.source: Change(rows=1 / factors)}
    else:
        changes = {pair.source: Change(columns=1 / factors)}
    if bias in weights.places:
        changes[bias] = Change(columns=1 / factors)
    columns = factors if heads is None else per_query_head(factors, heads)
    return changes | {reader: Change(columns=columns) for reader in pair.readers}


def per_query_head(factors: F64, heads: Heads) -> F64:
    """Factors of the channels of V, [1, KV heads * d], for the query heads that read them."""
    by_head = factors.reshape(heads.kv, heads.v_dim)
    return np.asarray(np.repeat(by_head, heads.share, axis=0).reshape(1, -1))


def per_kv_head(values: F64, heads: Heads) -> F64:
    """Mean over the query heads that share a KV head of values by channel, [1, query heads * d]."""
    return np.asarray(values.reshape(heads.kv, heads.share, heads.v_dim).mean(axis=1).reshape(1, -1))

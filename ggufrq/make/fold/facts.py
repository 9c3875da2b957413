"""Which tensors of a model can be scaled against each other: the facts of its architecture, and the pairs
that they give for its real tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ModelError
from ggufrq.base.toml import tomllib
from ggufrq.ggufs.header import Header, TensorInfo

#: Metadata key by which a file says that it is folded.
KEY = "ggufrq.fold"
_LAYER = re.compile(r"^blk\.(\d+)\.(.+?)(?:\.(weight|bias))?$")


@dataclass(frozen=True)
class PairRule:
    """``source`` writes what exactly ``readers`` read; those in ``optional`` need not be there. ``rows`` is
    empty for a norm, ``plain`` or ``heads`` for a matrix whose rows are scaled."""

    name: str
    source: str
    readers: tuple[str, ...]
    optional: frozenset[str]
    rows: str


@dataclass(frozen=True)
class Architecture:
    """``rope`` tells which channels RoPE turns together (``norm`` or ``neox``); ``also`` are tensors of a
    layer that no pair concerns."""

    name: str
    rope: str
    rules: tuple[PairRule, ...]
    also: frozenset[str]

    @property
    def known(self) -> frozenset[str]:
        """Every tensor that a layer may have."""
        return self.also.union(*({rule.source, *rule.readers} for rule in self.rules))


@dataclass(frozen=True)
class Pair:
    """A pair of one layer: full names of the tensors, ``source`` and those of ``readers`` that are there."""

    rule: PairRule
    layer: int
    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """Attention of one layer: numbers of query and of KV heads, values per head of K and V, and how many of
    K's RoPE turns."""

    queries: int
    kv: int
    k_dim: int
    v_dim: int
    rotated: int

    @property
    def share(self) -> int:
        """Query heads of one KV head; they follow one another."""
        return self.queries // self.kv


@cache
def architectures() -> dict[str, Architecture]:
    """Those of ``architectures.toml`` by name."""
    data = tomllib.loads(Path(__file__).with_name("architectures.toml").read_text(encoding="utf-8"))
    rules = {name: _rule(name, entry) for name, entry in data["pairs"].items()}
    return {
        name: Architecture(
            name,
            entry["rope"],
            tuple(rules[rule] for rule in entry["pairs"]),
            frozenset(entry.get("also", ())),
        )
        for entry in data["architectures"]
        for name in entry["names"]
    }


def architecture_of(values: Mapping[str, Any], model: str) -> Architecture:
    """The facts for a model with this metadata. Raises ModelError when there are none, when the model is
    folded already, or clamps what would be scaled."""
    name = str(values.get("general.architecture", ""))
    found = architectures().get(name)
    if found is None:
        raise ModelError(
            f"{model} cannot be folded: ggufrq does not know what reads what in {name or 'it'}; it knows "
            f"{', '.join(architectures())}",
            remedy="leave out --fold",
        )
    if values.get(KEY):
        raise ModelError(
            f"{model} is folded already ({values[KEY]})",
            remedy="leave out --fold, or start from the original",
        )
    for key, value in values.items():
        if "clamp" in key and any(_numbers(value)):
            raise ModelError(f"{model} cannot be folded: it clamps values ({key})", remedy="leave out --fold")
    return found


def pairs(architecture: Architecture, tensors: Iterable[TensorInfo]) -> list[Pair]:
    """Every pair of the model, layer by layer. Raises ModelError when there is none, or when a layer has a
    tensor that the facts do not know."""
    layers: dict[int, dict[str, str]] = {}
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        if found is None:
            continue
        # the bias of an expert would be a matrix, which no architecture here has
        if found[2] not in architecture.known or (found[3] == "bias" and found[2].endswith("_exps")):
            raise ModelError(
                f"the model cannot be folded: ggufrq does not know what {tensor.name} of {architecture.name} "
                "reads",
                remedy="leave out --fold",
            )
        if found[3] != "bias":
            layers.setdefault(int(found[1]), {})[found[2]] = tensor.name
    made = []
    for layer, names in sorted(layers.items()):
        for rule in architecture.rules:
            readers = tuple(name for name in rule.readers if name in names)
            others = {
                name
                for other in architecture.rules
                if other.source == rule.source
                for name in other.readers
                if name in names
            }
            whole = rule.optional | set(readers) >= set(rule.readers)
            if rule.source in names and whole and others == set(readers):
                made.append(Pair(rule, layer, names[rule.source], tuple(names[name] for name in readers)))
    if not made:
        raise ModelError(
            f"nothing to fold: no pair of tensors of {architecture.name} is in this model",
            remedy="leave out --fold",
        )
    return made


def heads(header: Header, layer: int) -> Heads:
    """Attention of a layer, from the metadata of the model. Raises ModelError when they do not tell."""
    values, name = header.values, header.values.get("general.architecture", "")

    def value(key: str, default: int | None = None) -> int:
        found = values.get(f"{name}.{key}", default)
        found = found[layer] if isinstance(found, tuple) else found
        if not isinstance(found, int) or found < 1:
            raise ModelError(f"the metadata of the model do not say {name}.{key}")
        return found

    queries = value("attention.head_count")
    kv = value("attention.head_count_kv", queries)
    usual = value("embedding_length") // queries
    k_dim = value("attention.key_length", usual)
    v_dim = value("attention.value_length", usual)
    return Heads(queries, kv, k_dim, v_dim, value("rope.dimension_count", k_dim))


def _rule(name: str, entry: Mapping[str, Any]) -> PairRule:
    readers = [str(reader) for reader in entry["to"]]
    return PairRule(
        name,
        entry["from"],
        tuple(reader.rstrip("?") for reader in readers),
        frozenset(reader.rstrip("?") for reader in readers if reader.endswith("?")),
        entry.get("rows", ""),
    )


def _numbers(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)

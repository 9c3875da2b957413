"""Types of the KV cache: their names as people write them, and what a cache of them takes.

The nine types of ours come from ``ggufrq.codec``; those of upstream are listed here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache

from ggufrq import codec
from ggufrq.errors import UsageError

#: Upstream's cache types: values and bytes per block.
_UPSTREAM = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "iq4_nl": (32, 18),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
}


@dataclass(frozen=True)
class KvType:
    """A type that llama.cpp can keep K or V in: blocks of ``block`` values in ``block_bytes`` bytes."""

    name: str
    block: int
    block_bytes: int
    ours: bool = False

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.block_bytes / self.block

    def bytes_for(self, values: int) -> int:
        """Bytes that ``values`` values take. ValueError when they do not fill whole blocks."""
        blocks, rest = divmod(values, self.block)
        if rest:
            raise ValueError(f"{values} values do not fill blocks of {self.block}, which {self.name} needs")
        return blocks * self.block_bytes


@dataclass(frozen=True)
class KvPair:
    """The types of K and V."""

    k: KvType
    v: KvType

    @property
    def name(self) -> str:
        """As it is written on the command line: ``iso3``, or ``iso3/planar4``."""
        return self.k.name if self.k == self.v else f"{self.k.name}/{self.v.name}"

    @property
    def bits(self) -> float:
        """Bits per value when K and V hold equally many."""
        return (self.k.bits + self.v.bits) / 2

    @property
    def ours(self) -> bool:
        """Whether it takes the patched llama.cpp."""
        return self.k.ours or self.v.ours

    def bytes_for(self, k_values: int, v_values: int) -> int:
        """Bytes of a cache that holds that many values of K and of V."""
        return self.k.bytes_for(k_values) + self.v.bytes_for(v_values)


@cache
def kv_types() -> dict[str, KvType]:
    """All types by name, upstream's first."""
    types = {name: KvType(name, block, size) for name, (block, size) in _UPSTREAM.items()}
    types |= {t.name: KvType(t.name, t.block, t.bytes, ours=True) for t in codec.cache_types()}
    return types


def kv_type(name: str) -> KvType:
    """The type with this name, however it is capitalized. Raises UsageError that suggests the nearest
    name."""
    types = kv_types()
    found = types.get(name.strip().lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.strip().lower(), types, n=1, cutoff=0.4)
    raise UsageError(
        f"there is no cache type '{name}'; there are {', '.join(types)}",
        remedy=f"--kv {near[0]}" if near else "--kv iso3",
    )


def parse_kv(text: str) -> KvPair:
    """``iso3`` is K and V in iso3, ``iso3/planar4`` is K in iso3 and V in planar4. Raises UsageError."""
    parts = text.split("/")
    if len(parts) > 2 or not all(part.strip() for part in parts):
        raise UsageError(
            f"'{text}' is not a pair of cache types", remedy="--kv iso3, or K/V apart: --kv iso3/planar4"
        )
    return KvPair(kv_type(parts[0]), kv_type(parts[-1]))

"""Loader of tables.json, THE numbers: centroids, rotations, ids, block sizes."""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Code:
    """A code: `bits` per index, blocks of `block` values in `bytes` bytes.

    `outermost` is the outermost centroid before it was scaled to 127, for a unit Gaussian.
    """

    bits: int
    block: int
    bytes: int
    centroids: tuple[int, ...]
    starts: tuple[int, ...]
    outermost: float

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """The positive centroids, ascending."""
        return self.centroids[len(self.centroids) // 2 :]

    @property
    def mid2(self) -> tuple[int, ...]:
        """Sums of neighbouring positive centroids: twice the decision thresholds."""
        m = self.magnitudes
        return tuple(a + b for a, b in pairwise(m))

    @property
    def norm(self) -> float:
        """What the norm of a block is multiplied by to get a scale, in units of 2**-11 per centroid unit."""
        return 2048 * self.outermost / self.magnitudes[-1] / math.sqrt(self.block)


@dataclass(frozen=True)
class CacheType:
    """A cache type of llama.cpp: a code and the family of its rotation, which is empty for a sibling."""

    name: str
    id: int
    family: str
    bits: int
    block: int
    bytes: int

    @property
    def bits_per_value(self) -> float:
        """Bits that one value takes in the cache, scale included."""
        return 8 * self.bytes / self.block


@cache
def load() -> dict[str, Any]:
    """The parsed tables.json. Do not change the result: it is shared."""
    text = resources.files("ggufrq.codec").joinpath("tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


@cache
def code(bits: int, block: int = 128) -> Code:
    """The code with 2 to 5 bits per index and blocks of 128 or 64 values. ValueError for others."""
    tables = load()
    entry = tables["codes"].get(str(bits))
    if entry is None:
        raise ValueError(f"no code with {bits} bits; there are {', '.join(tables['codes'])}")
    blocks = {tables["block"], *(sibling["block"] for sibling in tables["siblings"])}
    if block not in blocks:
        raise ValueError(f"no code with blocks of {block}; there are {', '.join(map(str, sorted(blocks)))}")
    scale = entry["bytes"] - bits * tables["block"] // 8
    return Code(
        bits,
        block,
        scale + bits * block // 8,
        tuple(entry["centroids"]),
        tuple(entry["starts"]),
        entry["outermost"],
    )


@cache
def cache_types() -> tuple[CacheType, ...]:
    """All cache types that have a name for users, in the order of their ids."""
    tables = load()
    return tuple(
        CacheType(t["name"], t["id"], t["family"], t["bits"], tables["block"], code(t["bits"]).bytes)
        for t in tables["types"]
    )


@cache
def siblings() -> tuple[CacheType, ...]:
    """What a cache keeps heads in that blocks of 128 values do not fill, in the order of their ids: codes of
    64 values. They have no family: the cache rotates by the type that was asked for."""
    return tuple(
        CacheType(s["name"], s["id"], "", s["bits"], s["block"], code(s["bits"], s["block"]).bytes)
        for s in load()["siblings"]
    )


def sibling(bits: int) -> CacheType:
    """The code of 64 values with so many bits."""
    return next(one for one in siblings() if one.bits == bits)


def head_block(dim: int) -> int:
    """Values of a block in heads of ``dim`` values, a multiple of 64: 128 where they divide it, else 64."""
    large = int(load()["block"])
    return large if dim % large == 0 else large // 2


def cache_type(name: str) -> CacheType:
    """The cache type with this name, e.g. "iso3". ValueError if there is none."""
    for t in cache_types():
        if t.name == name:
            return t
    raise ValueError(f"no cache type {name!r}; there are {', '.join(t.name for t in cache_types())}")


@cache
def rotation_blocks(family: str) -> npt.NDArray[np.float32]:
    """Blocks of a family, read-only: planar [64, 2] (cos, sin), iso [32, 4, 4], rotor [42, 3, 3]."""
    shapes = {"planar": (-1, 2), "iso": (-1, 4, 4), "rotor": (-1, 3, 3)}
    if family not in shapes:
        raise ValueError(f"no rotation family {family!r}; there are {', '.join(shapes)}")
    blocks = np.array(load()["rotations"][family], dtype=np.float32).reshape(shapes[family])
    blocks.flags.writeable = False
    return blocks

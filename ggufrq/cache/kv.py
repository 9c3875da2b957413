"""Types of the KV cache: their names as people write them, and what a cache of them takes.

The types of ours come from ``ggufrq.codec``; those of upstream are listed here. Under the name of one of
ours llama.cpp keeps heads that are no multiple of 128 values in a sibling with blocks of 64, and fills heads
that are no multiple of 64 up to one (``KvType.for_heads``).

``iso3`` and ``iso3/planar4`` are pairs: the types of K and V in all layers. A plan is a pair with exceptions:
``iso3/planar4; 0-1,-1:q8_0; 5:iso4/iso3``. Its layers are those that have a KV cache, counted from 0,
negative ones from the end; the last entry that names a layer wins.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Protocol

from ggufrq import codec
from ggufrq.base.errors import UsageError

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
#: Types of ours keep heads in a multiple of so many values.
_FILL = 64


@dataclass(frozen=True)
class KvType:
    """A type that llama.cpp can keep K or V in: blocks of ``block`` values in ``block_bytes`` bytes. One of
    ours is asked for in blocks of 128."""

    name: str
    block: int
    block_bytes: int
    ours: bool = False

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.block_bytes / self.block

    def for_heads(self, head: int) -> KvType:
        """What heads of ``head`` values are kept in under this name. Where they are filled up, a block is a
        head."""
        if not self.ours or head % self.block == 0:
            return self
        narrow, whole = _narrow(self), filled_up(head)
        if head == whole:
            return narrow
        kind = narrow if whole % self.block else self
        return replace(self, block=head, block_bytes=kind.bytes_for(whole))

    @property
    def on_cpu_alone(self) -> bool:
        """Whether no GPU but by Vulkan has kernels for the type, one to be asked for: those of five bits."""
        return self.ours and self.bits >= 5

    def holds(self, head: int, *, fill: bool = True) -> bool:
        """Whether heads of this size can be kept under this name. ``fill``: also filled up, which is done
        where it takes less than q4_0, or than f16 where heads do not fill blocks of q4_0."""
        if not self.ours or head % self.block == 0:
            return head % self.block == 0
        whole = filled_up(head)
        return head == whole or (fill and self.for_heads(head).bits < most_bits(head))

    def row_bytes(self, values: int, head: int, *, filled: bool) -> int:
        """Bytes of a row of ``values`` values in heads of ``head``. ``filled``: all layers have their heads
        filled up, since some are in a type of ours. ValueError as ``bytes_for``."""
        if filled and not self.ours and head:
            values, head = values // head * filled_up(head), filled_up(head)
        return self.for_heads(head).bytes_for(values)

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

    @property
    def quantized(self) -> bool:
        """Whether K or V is in a type that loses something against f16 and has blocks."""
        return self.k.block > 1 or self.v.block > 1

    def bytes_for(self, k_values: int, v_values: int) -> int:
        """Bytes of a cache that holds that many values of K and of V."""
        return self.k.bytes_for(k_values) + self.v.bytes_for(v_values)

    def arguments(self) -> list[str]:
        """Arguments for the tools of llama.cpp."""
        return ["-ctk", self.k.name, "-ctv", self.v.name]


def filled_up(head: int) -> int:
    """Values that a head of ``head`` values takes beside types of ours: the next multiple of 64."""
    return -(-head // _FILL) * _FILL


def most_bits(head: int) -> float:
    """Bits per value that types of ours must stay below in heads that are filled up."""
    block, size = _UPSTREAM["q4_0"]
    return 16.0 if head % block else 8 * size / block


@cache
def kv_types() -> dict[str, KvType]:
    """All types by name, upstream's first."""
    types = {name: KvType(name, block, size) for name, (block, size) in _UPSTREAM.items()}
    types |= {t.name: KvType(t.name, t.block, t.bytes, ours=True) for t in codec.cache_types()}
    return types


@cache
def _narrow(kind: KvType) -> KvType:
    """A type of ours with the blocks of its sibling."""
    sibling = codec.sibling(codec.cache_type(kind.name).bits)
    return replace(kind, block=sibling.block, block_bytes=sibling.bytes)


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


#: What ``--kv-layers``, ``--kv-profile``, ``--kv-recent`` and ``--kv-first`` say, for tools that lack them
#: (llama-bench); the last is the second's name of before, which llama.cpp still reads.
LAYERS_VARIABLE = "LLAMA_RQ_LAYERS"
PROFILE_VARIABLE = "LLAMA_RQ_PROFILE"
RECENT_VARIABLE = "LLAMA_RQ_RECENT"
FIRST_VARIABLE = "LLAMA_RQ_FIRST"
CALIBRATION_VARIABLE = "LLAMA_RQ_CALIB"
#: How many of the newest and of the first tokens llama.cpp keeps in f16 at most.
MAX_EXACT = 4096
#: What ``run`` and ``serve`` keep K and V in unless told otherwise, and how many of the newest and first
#: tokens in f16 beside a type of ours (docs/real-models.md).
DEFAULT_KV = "iso3"
DEFAULT_RECENT = 32
DEFAULT_FIRST = 1


class Sought(Enum):
    """A profile that is yet to be found, see ``drive.profiles``: the file beside the model, or else one made
    from a short text or from its weights; or from its weights in any case."""

    AUTO = "auto"
    WEIGHTS = "weights"


_LAYERS = re.compile(r"(-?\d+)(?:-(-?\d+))?")


class LayerShape(Protocol):
    """Values of K and of V that one token takes, by layers that have a cache, and of a head of them; see
    ``ggufs.kv_shape``."""

    @property
    def k_layers(self) -> tuple[int, ...]:
        """Values of K in each layer."""

    @property
    def v_layers(self) -> tuple[int, ...]:
        """Values of V in each layer."""

    @property
    def k_heads(self) -> tuple[int, ...]:
        """Values of a head of K in each layer; none where all fill blocks of 128."""

    @property
    def v_heads(self) -> tuple[int, ...]:
        """Values of a head of V in each layer; none where all fill blocks of 128."""


@dataclass(frozen=True)
class LayerRange:
    """Layers ``first`` to ``last``, both included; negative numbers count from the end."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """As it is written: ``3`` or ``3-5``."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def indices(self, layers: int) -> range:
        """The layers that are meant where there are so many. Raises UsageError when one is not there."""
        for number in (self.first, self.last):
            if not -layers <= number < layers:
                raise UsageError(
                    f"there is no layer {number}: the model has {layers} with a KV cache, 0 to {layers - 1}",
                    remedy=f"layers from 0 to {layers - 1}, or from the end: -1 to -{layers}",
                )
        first, last = self.first % layers, self.last % layers
        if first > last:
            raise UsageError(
                f"layers {self.name} run backwards: of {layers}, they are {first} to {last}",
                remedy=f"{self.last}-{self.first}",
            )
        return range(first, last + 1)


@dataclass(frozen=True)
class KvPlan:
    """The types of K and V layer by layer: a pair for all, and pairs for some, of which the last one wins;
    the profile that K is kept in, if any (or a file of means, as ``calibrate`` made them before); and how
    many of the newest and of the first tokens of its sequence a query sees in f16, which are ``optional``
    when nobody asked for them: then the cache is kept without them where llama.cpp cannot hold them.

    Raises UsageError for a profile where K has no type of ours, and for tokens in f16 where nothing is
    quantized."""

    base: KvPair
    overrides: tuple[tuple[tuple[LayerRange, ...], KvPair], ...] = ()
    profile: Path | Sought | None = None
    recent: int = 0
    first: int = 0
    optional: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.profile is not None and not self.k_ours:
            raise UsageError(
                f"a profile is for K in a type of ours, and K is in {self.base.k.name}",
                remedy="without --kv-profile, or --kv iso3",
            )
        for option, which, tokens in (("recent", "newest", self.recent), ("first", "first", self.first)):
            if tokens and not self.quantized:
                raise UsageError(
                    f"the {which} tokens are kept in f16 beside a quantized type, "
                    f"and K and V are in {self.name}",
                    remedy=f"without --kv-{option}, or --kv iso3",
                )
            if not 0 <= tokens <= MAX_EXACT:
                raise UsageError(
                    f"{tokens} {which} tokens cannot be kept, {MAX_EXACT:,} at most",
                    remedy=f"--kv-{option} {32 if option == 'recent' else 1}",
                )

    @classmethod
    def of_layers(cls, pairs: Sequence[KvPair]) -> KvPlan:
        """A plan that gives layer ``i`` the pair ``pairs[i]``, in few words: the commonest pair is the
        base."""
        base = Counter(pairs).most_common(1)[0][0]
        overrides = []
        for pair in dict.fromkeys(pair for pair in pairs if pair != base):
            overrides.append((_ranges([i for i, other in enumerate(pairs) if other == pair]), pair))
        return cls(base, tuple(overrides))

    def with_profile(self, profile: Path | Sought | None) -> KvPlan:
        """The same with this profile, or with none."""
        return replace(self, profile=profile)

    def with_exact(self, recent: int, first: int = 0) -> KvPlan:
        """The same with so many of the newest and of the first tokens in f16, too."""
        return replace(self, recent=recent, first=first, optional=False)

    def with_wished(self, recent: int | None, first: int | None) -> KvPlan:
        """The same with so many of them as are asked for; None: as many as usual where K or V is in a type of
        ours, and optional when not even the others are asked for."""
        usual = (DEFAULT_RECENT, DEFAULT_FIRST) if self.rotated else (0, 0)
        newest = usual[0] if recent is None else recent
        oldest = usual[1] if first is None else first
        optional = not recent and not first and newest + oldest > 0
        return replace(self, recent=newest, first=oldest, optional=optional)

    def as_usual(self) -> KvPlan:
        """The same as ``run`` and ``serve`` keep it unless told otherwise."""
        plan = self.with_profile(Sought.AUTO) if self.k_ours else self
        return plan.with_wished(None, None)

    @property
    def name(self) -> str:
        """As it is written after ``--kv``: ``iso3; 0-1,-1:q8_0``. The same for every spelling."""
        return "; ".join([self.base.name, *self._entries()])

    @property
    def marks(self) -> tuple[str, ...]:
        """What is on beside the types, as cases are written: ``+profile``, ``+first1``, ``+recent32``."""
        exact = [f"+{name}{n}" for name, n in (("first", self.first), ("recent", self.recent)) if n]
        return (*(["+profile"] if self.profile is not None else []), *exact)

    @property
    def title(self) -> str:
        """All that is on: ``iso3 +profile +recent32; 0:q8_0``."""
        return " ".join([self.base.name, *self.marks]) + self.name[len(self.base.name) :]

    @property
    def file(self) -> Path | None:
        """The file of the profile, None without. It must have been found (``drive.profiles``)."""
        assert not isinstance(self.profile, Sought), "a profile that has not been looked for"
        return self.profile

    @property
    def layered(self) -> bool:
        """Whether some layers are named apart."""
        return bool(self.overrides)

    @property
    def pairs(self) -> tuple[KvPair, ...]:
        """The base pair and those of the exceptions."""
        return (self.base, *(pair for _, pair in self.overrides))

    @property
    def ours(self) -> bool:
        """Whether it takes the patched llama.cpp: for a type of ours, layers apart, or tokens in f16."""
        return self.layered or self.base.ours or self.recent + self.first > 0

    @property
    def rotated(self) -> bool:
        """Whether K or V is in a type of ours in some layer: then tokens are kept in f16 by default."""
        return any(pair.ours for pair in self.pairs)

    @property
    def quantized(self) -> bool:
        """Whether K or V is quantized in some layer: only then tokens can be kept in f16 beside it."""
        return any(pair.quantized for pair in self.pairs)

    @property
    def k_ours(self) -> bool:
        """Whether K is in a type of ours in some layer: only then it can have a profile."""
        return any(pair.k.ours for pair in self.pairs)

    @property
    def v_ours(self) -> bool:
        """Whether V is in a type of ours in some layer."""
        return any(pair.v.ours for pair in self.pairs)

    def resolve(self, layers: int) -> tuple[KvPair, ...]:
        """The pair of each of so many layers with a cache. Raises UsageError when it names one that is not
        there."""
        pairs = [self.base] * layers
        for ranges, pair in self.overrides:
            for part in ranges:
                for index in part.indices(layers):
                    pairs[index] = pair
        return tuple(pairs)

    def layer_bytes(self, shape: LayerShape) -> list[tuple[int, int]]:
        """Exact bytes of K and of V of one token, by layers. ValueError when a row of a layer does not fill
        whole blocks of its type; UsageError as ``resolve``."""
        pairs = self.resolve(len(shape.k_layers))
        heads = shape.k_heads or (0,) * len(pairs), shape.v_heads or (0,) * len(pairs)
        return [
            (
                pair.k.row_bytes(k, k_head, filled=self.k_ours),
                pair.v.row_bytes(v, v_head, filled=self.v_ours),
            )
            for pair, k, v, k_head, v_head in zip(pairs, shape.k_layers, shape.v_layers, *heads, strict=True)
        ]

    def bytes_for(self, shape: LayerShape, tokens: int) -> int:
        """Exact bytes of a cache for so many tokens, without ``recent_bytes``. Raises as ``layer_bytes``."""
        return tokens * sum(k + v for k, v in self.layer_bytes(shape))

    def exact_rows(self, cells: int, sequences: int = 1, streams: int = 1) -> int:
        """Rows in f16 for the newest and first tokens of so many sequences, in a cache of ``cells`` tokens in
        each of ``streams`` streams: a row for each, and one more for each stream."""
        tokens = self.recent + self.first
        return streams * (min(cells, tokens * sequences // streams) + 1) if tokens else 0

    def recent_bytes(self, shape: LayerShape, cells: int, sequences: int = 1, streams: int = 1) -> int:
        """Bytes that ``exact_rows`` take."""
        rows = self.exact_rows(cells, sequences, streams)
        f16, pairs = kv_type("f16"), len(shape.k_layers)
        heads = shape.k_heads or (0,) * pairs, shape.v_heads or (0,) * pairs
        return rows * sum(
            f16.row_bytes(k, k_head, filled=self.k_ours) + f16.row_bytes(v, v_head, filled=self.v_ours)
            for k, v, k_head, v_head in zip(shape.k_layers, shape.v_layers, *heads, strict=True)
        )

    def bits(self, shape: LayerShape) -> float:
        """Bits per value over all of K and V, without ``recent_bytes``. Raises as ``bytes_for``."""
        return 8 * self.bytes_for(shape, 1) / (sum(shape.k_layers) + sum(shape.v_layers))

    def arguments(self) -> list[str]:
        """Arguments for the tools that read llama.cpp's common options (all but llama-bench)."""
        args = self.base.arguments()
        if self.layered:
            args += ["--kv-layers", self._spec()]
        if self.file is not None:
            args += ["--kv-profile", str(self.file)]
        if self.first:
            args += ["--kv-first", str(self.first)]
        return [*args, "--kv-recent", str(self.recent)] if self.recent else args

    def environment(self) -> dict[str, str | None]:
        """Variables that say to any tool what ``arguments`` says beside the types of the base; None unsets
        one that the user may have set."""
        return {
            LAYERS_VARIABLE: self._spec() if self.layered else None,
            PROFILE_VARIABLE: None if self.file is None else str(self.file),
            CALIBRATION_VARIABLE: None,
            RECENT_VARIABLE: str(self.recent) if self.recent else None,
            FIRST_VARIABLE: str(self.first) if self.first else None,
        }

    def _entries(self) -> list[str]:
        return [f"{','.join(part.name for part in ranges)}:{pair.name}" for ranges, pair in self.overrides]

    def _spec(self) -> str:
        return ";".join(self._entries())


def profile_word(profile: Path | Sought | None) -> str:
    """As ``--kv-profile`` takes it."""
    return profile.value if isinstance(profile, Sought) else str(profile or "none")


def exact_words(recent: int, first: int) -> str:
    """Which tokens are in f16, in words: ``the first token and the newest 32``; empty where none is."""
    found = []
    if first:
        found.append("the first token" if first == 1 else f"the first {first:,} tokens")
    if recent:
        found.append(f"the newest {recent:,}" if first else f"the newest {recent:,} tokens")
    return " and ".join(found)


def parse_plan(text: str) -> KvPlan:
    """``iso3; 0-1,-1:q8_0`` is K and V in iso3 but for the first two layers and the last.

    Raises UsageError.
    """
    first, *entries = text.split(";")
    if ":" in first:
        raise UsageError(
            f"'{first.strip()}' names layers, but the types of all others must come first",
            remedy=f'--kv "iso3; {first.strip()}"',
        )
    return KvPlan(parse_kv(first), tuple(_parse_entry(entry) for entry in entries))


def _parse_entry(text: str) -> tuple[tuple[LayerRange, ...], KvPair]:
    layers, colon, pair = text.partition(":")
    if not colon or not layers.strip() or not pair.strip():
        raise UsageError(
            f"'{text.strip()}' is not LAYERS:TYPE",
            remedy='--kv "iso3; 0-1,-1:q8_0", or K/V apart: "iso3; 0:q8_0/iso4"',
        )
    ranges = []
    for part in layers.split(","):
        found = _LAYERS.fullmatch(part.strip())
        if found is None:
            raise UsageError(
                f"'{part.strip()}' is no layer and no range of layers",
                remedy='numbers from 0, as in "0-1,5", or from the end: "-1"',
            )
        first = int(found[1])
        last = first if found[2] is None else int(found[2])
        if first > last and (first < 0) == (last < 0):
            raise UsageError(f"layers {part.strip()} run backwards", remedy=f"{last}-{first}")
        ranges.append(LayerRange(first, last))
    return tuple(ranges), parse_kv(pair)


def _ranges(indices: Sequence[int]) -> tuple[LayerRange, ...]:
    """Ascending layer numbers as few ranges."""
    found: list[LayerRange] = []
    for index in indices:
        if found and found[-1].last == index - 1:
            found[-1] = LayerRange(found[-1].first, index)
        else:
            found.append(LayerRange(index, index))
    return tuple(found)

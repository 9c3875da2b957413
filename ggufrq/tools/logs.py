"""What llama.cpp's library says about a context in its log (INFO, so with ``-lv 4``), and its errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ggufrq.base.errors import ToolError
from ggufrq.base.proc import Completed, failure_message, how_it_ended
from ggufrq.cache.kv import KvPair, KvType, kv_types

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_MIB = 1 << 20
#: Sizes are printed with two decimals, from a float.
_PRINTED = 0.00501

_CACHE = re.compile(
    r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers, +(\d+)/(\d+) seqs\), "
    r"K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB"
)
#: What goes before the cache of an indexer, which is none of K and V.
_INDEXER = re.compile(r"creating (?:indexer|DSV4 lightning-indexer) KV cache")
_FILLED = re.compile(r"llama_rq: heads of [KV] of \d+ values are filled up to \d+")
_RECURRENT = re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers")
_ROTATION = re.compile(r"llama_rq: ([KV]) (\w+), rotation = (\w+), mode = (\w+)(?:, n = (\d+))?")
_LAYERS = re.compile(r"llama_rq: ([KV]) layers: (.*)")
_PROFILE = re.compile(
    r"llama_rq: (?:profile (.*): from (\w+), (\d+) positions, [1-9]\d* layers|calibration (.*): \d+ layers)"
)
_NOT_HELD = re.compile(r"llama_rq: the newest \d+ and first \d+ tokens are not held in f16: (.*)")
_RECENT = re.compile(r"llama_rq: the newest (\d+)(?: and first (\d+))? tokens in f16: \d+ rows, (\d+) bytes")
_SCALE = re.compile(r"llama_rq: scale = (\w+)")
_UPSTREAM_ROTATION = re.compile(r"llama_kv_cache: attn_rot_([kv]) = 1")
_CONTEXT = "constructing llama_context"
#: What goes before the context of a draft: the file of its model, or a head of the model itself.
_DRAFT = re.compile(r"loading draft model '(?P<file>[^']*)'|creating MTP draft context")
#: What a server says when all models are there.
_LOADED = "load_model: initializing, n_slots"
#: What a draft is called that is no model of its own.
MTP = "the head for further tokens"

_LEVEL = re.compile(r"^\d+\.\d+\.\d+\.\d+ ([IWED]) ?")
#: What the patch says of a type that heads do not fill, and of a device that has no kernels for them.
_OF_HEADS = re.compile(
    r"cannot hold this model's|do not work with this model|has no attention kernel for|cannot store rows of"
)
_MODULE = re.compile(r"^(?:cmn|srv|slot|spec) +")
_FUNCTION = re.compile(r"^[\w~]+(?:\(\))? ?:(?: +(?=\S))")
_ERROR = re.compile(r"\s*(?:error\b|Error:|ERROR:|\w+: error:|terminate called|GGML_ASSERT)")
#: The last words of a program that gives up begin with the place in its source. The thread that prints the
#: log may have begun a line by then, whose message comes after them.
_ABORT = re.compile(r"^(?:\d+\.\d+\.\d+\.\d+ (?:[IWED] )?)?\S+\.(?:c|cpp|cu|cuh|h|m|mm):\d+: (?=.*\w)")
_WHAT = re.compile(r"\s*what\(\): +")
#: What assertions are about, in words.
_WORDS = {
    "id_to_token.size() == token_to_id.size()": "two tokens of the model's vocabulary are equal",
    "nread <= state_size": "the saved state ends too early",
}
#: Errors that only say that an earlier one happened, or tell less of it than what comes later.
_FOLLOWING = (
    "send failed (bytes_sent=",
    "recv failed (bytes_recv=",
    "failed to load model",
    "failed to create context",
    "failed to create_context",
    "encountered an error while trying to fit",
    "exiting due to",
    "exited with code",
    "unable to load model",
    "server start failed",
    "the server exited before",
    "terminate called after",
)


class Incomplete(ToolError):
    """A program ended well but its last lines are missing.

    llama.cpp's programs print through a queue that is not emptied when they end, so that on a busy
    machine the end of what they say can be lost. The same run once more tells it all.
    """


@dataclass(frozen=True)
class KvCache:
    """One KV cache of a context: ``cells`` tokens in each of ``streams`` streams, sizes in MiB as printed."""

    cells: int
    layers: int
    sequences: int
    streams: int
    mib: float
    type_k: str
    type_v: str
    k_mib: float
    v_mib: float
    k_narrow: bool = False  # a type of ours in blocks of 64, for heads that are no multiple of 128
    v_narrow: bool = False

    @property
    def tokens(self) -> int:
        """Tokens it holds, over all streams."""
        return self.cells * self.streams

    @property
    def k_bytes(self) -> int | None:
        """Exact bytes of K, see ``exact_bytes``."""
        return exact_bytes(self.k_mib, self.tokens, self.type_k, narrow=self.k_narrow)

    @property
    def v_bytes(self) -> int | None:
        """Exact bytes of V, see ``exact_bytes``."""
        return exact_bytes(self.v_mib, self.tokens, self.type_v, narrow=self.v_narrow)

    @property
    def k_kind(self) -> KvType | None:
        """The type of K, None when it is unknown."""
        return _kind(self.type_k, narrow=self.k_narrow)

    @property
    def v_kind(self) -> KvType | None:
        """The type of V, None when it is unknown."""
        return _kind(self.type_v, narrow=self.v_narrow)


@dataclass(frozen=True)
class Rotation:
    """How one side of the cache (K or V) is rotated by the patched llama.cpp."""

    type: str
    family: str
    mode: str
    values: int = 128  # that are rotated together


#: What a profile may be made from, as logs and its file name it, in words.
PROFILE_SOURCES = {
    "weights": "from the weights",
    "text": "from a text",
    "tokens": "from random tokens",
    "means": "with means alone",
}


@dataclass(frozen=True)
class Metric:
    """The profile that K is kept by: its file, what it was made from (``means`` for a file of means alone),
    and over how many positions."""

    file: str
    source: str
    positions: int = 0


@dataclass(frozen=True)
class Context:
    """What the log tells of a context: its caches, the recurrent state in MiB, our rotations by side (K, V),
    and whether upstream's own Hadamard rotation is on.

    ``layers`` has the types of K and of V by layers with a cache, and is empty when all are alike;
    ``profile`` is the one of K in all caches; ``scale`` how our codes find their scale when it is not by
    least squares; ``recent`` and ``first`` how many of the newest and of the first tokens are kept in f16
    beside, ``recent_bytes`` what these take over all caches, and ``not_held`` why they are not kept;
    ``filled`` that heads are filled up. The cache of an indexer is none of ``caches``: ``index_mib`` is what
    it takes.
    """

    caches: tuple[KvCache, ...]
    recurrent_mib: float
    rotations: dict[str, Rotation]
    upstream_rotates_k: bool = False
    upstream_rotates_v: bool = False
    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    profile: Metric | None = None
    scale: str | None = None
    recent: int = 0
    first: int = 0
    recent_bytes: int = 0
    not_held: str | None = None
    filled: bool = False
    index_mib: float = 0.0

    @property
    def k_types(self) -> set[str]:
        """Types of K over all caches."""
        return {cache.type_k for cache in self.caches}

    @property
    def v_types(self) -> set[str]:
        """Types of V over all caches."""
        return {cache.type_v for cache in self.caches}

    @property
    def tokens(self) -> int:
        """Tokens that the largest cache holds."""
        return max((cache.tokens for cache in self.caches), default=0)

    @property
    def kv_bytes(self) -> int | None:
        """Exact bytes of K and V in all caches, without ``recent_bytes``; None when the printed figures do
        not determine them, as where layers have types of their own."""
        if self.layers:
            return None
        total = 0
        for cache in self.caches:
            k, v = cache.k_bytes, cache.v_bytes
            if k is None or v is None:
                return None
            total += k + v
        return total

    @property
    def kv_mib(self) -> float:
        """MiB of K and V as printed, rounded to two decimals per cache."""
        return sum(cache.mib for cache in self.caches)

    @property
    def kv_values(self) -> int | None:
        """Values of K and V in all caches, from their exact bytes; None when these are not known."""
        if self.layers or self.filled:
            return None
        total = 0
        for cache in self.caches:
            for size, kind in ((cache.k_bytes, cache.k_kind), (cache.v_bytes, cache.v_kind)):
                if size is None or kind is None:
                    return None
                total += size // kind.block_bytes * kind.block
        return total


def _kind(name: str, *, narrow: bool) -> KvType | None:
    kind = kv_types().get(name)
    return kind.for_heads(64) if kind is not None and narrow else kind


def exact_bytes(mib: float, tokens: int, type_name: str, *, narrow: bool = False) -> int | None:
    """Exact size of K or V whose size was printed with two decimals.

    A row (one token of one layer) is a whole number of blocks, and of 32 values at least, so that the size is
    a multiple of ``tokens`` times that. None when the type is unknown, the printed figure fits no such
    multiple, or more than one.
    """
    kind = _kind(type_name, narrow=narrow)
    if kind is None or tokens <= 0:
        return None
    unit = tokens * max(kind.block_bytes, 32 * kind.block_bytes // kind.block)
    size = round(mib * _MIB / unit) * unit
    if abs(size / _MIB - mib) > _PRINTED or unit / _MIB <= 2 * _PRINTED:
        return None
    return size


def parse_context(text: str) -> Context | None:
    """The last context of the model itself that the log tells of, or None when it names no cache (then
    ``-lv 4`` was missing)."""
    every = [part for draft, part in _contexts(text) if draft is None]
    return _parse_context(every[-1]) if every else None


def parse_draft(text: str) -> tuple[str, Context] | None:
    """The file name of the draft's model (or ``MTP``) and its last context, None without one."""
    every = [(draft, part) for draft, part in _contexts(text) if draft is not None]
    found = _parse_context(every[-1][1]) if every else None
    return (every[-1][0], found) if found is not None else None


def failed_draft(text: str) -> str | None:
    """The draft that a server gave up at while it loaded it, by its log."""
    found = list(_DRAFT.finditer(text))
    part = text[found[-1].start() :] if found else ""
    return _draft_name(found[-1]) if error_lines(part.partition(_LOADED)[0]) and _LOADED not in part else None


def _draft_name(found: re.Match[str]) -> str:
    return Path(found["file"]).name if found["file"] else MTP


def _contexts(text: str) -> list[tuple[str | None, str]]:
    """The parts of a log that tell of a context each, with the name of the draft that it is of, if it is."""
    starts = [found.start() for found in re.finditer(re.escape(_CONTEXT), text)]
    if not starts:
        return [(None, text)]
    parts: list[tuple[str | None, str]] = []
    before = 0
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        drafts = list(_DRAFT.finditer(text, before, start))
        parts.append((_draft_name(drafts[-1]) if drafts else None, text[start:end]))
        before = start
    return parts


def _parse_context(part: str) -> Context | None:
    part, *rests = _INDEXER.split(part)
    index = [found for rest in rests if (found := _CACHE.search(rest)) is not None]
    part += "".join(_CACHE.sub("", rest, count=1) for rest in rests)
    rotations = {m[1]: Rotation(m[2], m[3], m[4], int(m[5] or 128)) for m in _ROTATION.finditer(part)}
    narrow = {side for side, rotation in rotations.items() if rotation.values % 128}
    caches = tuple(
        KvCache(
            cells=int(m[2]),
            layers=int(m[3]),
            sequences=int(m[4]),
            streams=int(m[5]),
            mib=float(m[1]),
            type_k=m[6],
            k_mib=float(m[7]),
            type_v=m[8],
            v_mib=float(m[9]),
            k_narrow="K" in narrow,
            v_narrow="V" in narrow,
        )
        for m in _CACHE.finditer(part)
    )
    recurrent = sum(float(m[1]) for m in _RECURRENT.finditer(part))
    if not caches and not recurrent:
        return None
    with_layers = sum(cache.layers > 0 for cache in caches)  # else it is only there beside another one
    upstream = set(_UPSTREAM_ROTATION.findall(part))
    exact = [(int(newest), int(first or 0), int(size)) for newest, first, size in _RECENT.findall(part)]
    held = 0 < len(exact) == with_layers
    return Context(
        caches,
        recurrent,
        rotations,
        "k" in upstream,
        "v" in upstream,
        layers=_layers(part),
        profile=_profile(part, with_layers),
        scale=_last_group(_SCALE, part),
        recent=min((newest for newest, _, _ in exact), default=0) if held else 0,
        first=min((first for _, first, _ in exact), default=0) if held else 0,
        recent_bytes=sum(size for _, _, size in exact),
        not_held=None if held else _last_group(_NOT_HELD, part),
        filled=_FILLED.search(part) is not None,
        index_mib=sum(float(found[1]) for found in index),
    )


def _layers(text: str) -> dict[str, tuple[str, ...]]:
    """Types by side and layer. A model with two caches tells each of them in a line of its own."""
    found: dict[str, dict[int, str]] = {}
    for side, listed in _LAYERS.findall(text):
        for entry in listed.split(","):
            number, _, name = entry.strip().partition(" ")
            if number.isdigit():
                found.setdefault(side, {})[int(number)] = name
    return {side: tuple(types[i] for i in sorted(types)) for side, types in found.items()}


def _profile(text: str, caches: int) -> Metric | None:
    """The profile that every cache with layers tells of; None when one does not, or tells of another."""
    found = [
        Metric(path or means, source or "means", int(positions or 0))
        for path, source, positions, means in _PROFILE.findall(text)
    ]
    return found[0] if len(found) == caches and len(set(found)) == 1 else None


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    every = pattern.findall(text)
    return every[-1] if every else None


def is_printed(size: int, context: Context) -> bool:
    """Whether ``size`` bytes of K and V, over all caches, would be printed as in the log of the context."""
    return abs(size / _MIB - context.kv_mib) <= _PRINTED * len(context.caches)


def uses(context: Context, pair: KvPair) -> bool:
    """Whether every cache of the context really has the pair's types, in all layers."""
    return not context.layers and context.k_types == {pair.k.name} and context.v_types == {pair.v.name}


def error_lines(text: str) -> list[str]:
    """Sentences of the errors in a log, without times and function names, the causes before what followed."""
    causes: dict[str, None] = {}
    followed: dict[str, None] = {}
    for line in text.splitlines():
        level = _LEVEL.match(line) if _ABORT.match(line) is None else None
        if level is not None and level[1] != "E":
            continue
        body = line[level.end() :] if level is not None else line
        if level is None and not any(form.match(body) for form in (_ERROR, _ABORT, _WHAT)):
            continue
        body = _in_words(_WHAT.sub("", _ABORT.sub("", body)))
        sentence = _FUNCTION.sub("", _MODULE.sub("", body)).strip()
        sentence = re.sub(r"^(?:task id = \d+, )?(?:error|Error|ERROR)(?: loading model)?: ", "", sentence)
        sentence = sentence.removeprefix("failed to initialize the context: ")
        if sentence:
            (followed if any(words in sentence for words in _FOLLOWING) else causes)[sentence] = None
    return [*causes, *followed]


def _in_words(line: str) -> str:
    """An assertion with what it is about before it, where that is known."""
    words = next((words for assertion, words in _WORDS.items() if assertion in line), None)
    return f"{words} ({line.strip()})" if words is not None else line


def ended(done: Completed) -> str:
    """One message for a program that failed: the reason that its log gives, or its last lines."""
    lines = error_lines(done.stderr)
    return f"{how_it_ended(done)}: {lines[0]}" if lines else failure_message(done)


#: How programs say that a text is too short for them.
_SHORT_TEXT = re.compile(r"you need at least \d+ tokens|No prompt provided|less than one chunk of \d+")


def is_of_heads(message: str) -> bool:
    """Whether a reason is that a cache type, or a device with it, does not take heads of the model's size."""
    return _OF_HEADS.search(message) is not None


def failure(text: str, what: str) -> ToolError:
    """The error for a program that gave no result: the reason from its log, or that its end is missing."""
    lines = error_lines(text)
    if not lines:
        return Incomplete(f"{what}, and its log does not say why")
    return ToolError(f"{what}: {lines[0]}", remedy=remedy_of(lines[0]))


def remedy_of(reason: str) -> str | None:
    """What mends it that a program fails for this reason, where that is the text."""
    return "a longer text, or a shorter context" if _SHORT_TEXT.search(reason) else None


def retried(attempt: Callable[[], Result], attempts: int = 5) -> Result:
    """The result of ``attempt``, made again when it raises Incomplete, ``attempts`` times at most."""
    for _ in range(attempts - 1):
        try:
            return attempt()
        except Incomplete as error:
            _logger.debug("once more: %s", error.message)
    return attempt()


def explain(text: str, otherwise: str) -> str:
    """The sentence of a log that explains a failure, or ``otherwise`` when it has none."""
    lines = error_lines(text)
    return lines[0] if lines else otherwise

"""Whether llama.cpp kept a cache as it was asked for: types, bytes and rotations, from the log of a run."""

from __future__ import annotations

from pathlib import Path

from ggufrq.base.errors import ToolError
from ggufrq.cache.cases import Case
from ggufrq.drive import cache_log
from ggufrq.ggufs.kv_shape import KvShape
from ggufrq.tools.logs import Context

_MIB = 1 << 20
#: The log prints sizes with two decimals, one per cache.
_ROUNDING = 0.00501


class CacheError(ToolError):
    """The cache was not kept as it was asked for: in other types, of another size, or rotated otherwise."""


def check_context(
    case: Case,
    context: Context,
    model: Path,
    shape: KvShape | None,
    tokens: int | None,
) -> int | None:
    """Exact bytes of a cache of ``tokens`` tokens (None: as many as the log says), or None when the shape of
    the model's cache is not known and the log's figures do not tell.

    Raises CacheError when K or V were kept in other types than the case says, in more or fewer bytes than
    they must take, or were not scaled or rotated as the case says.
    """
    if not cache_log.as_asked(context, case.plan):
        raise CacheError(f"llama.cpp did not keep the cache in {case.name}, but {cache_log.found(context)}")
    if context.scale != case.scale:
        how = f"with {context.scale}" if context.scale else "as usual"
        raise CacheError(f"llama.cpp scaled blocks {how}, although {case.name} was asked for")
    tokens = context.tokens if tokens is None else tokens
    if context.tokens != tokens:
        raise CacheError(f"llama.cpp reports a cache of {context.tokens} tokens instead of {tokens}")
    size = cache_log.cache_bytes(context, case.plan, model)
    if shape is not None:
        plan, cache = case.plan, context.caches[0]
        expected = plan.bytes_for(shape, tokens) if plan.layered else shape.bytes_for(plan.base, tokens)
        printed = abs(expected / _MIB - context.kv_mib) <= _ROUNDING * len(context.caches)
        recent = plan.recent_bytes(shape, cache.cells, cache.sequences, cache.streams)
        if context.recent_bytes != recent:
            raise CacheError(
                f"the newest tokens of {case.name} take {recent} bytes; "
                f"llama.cpp reports {context.recent_bytes}"
            )
        expected += recent
        if size != expected and not (size is None and printed):  # small sizes are printed too coarsely
            reported = f"{size} bytes" if size is not None else f"{context.kv_mib} MiB"
            raise CacheError(
                f"a {case.name} cache of {tokens} tokens takes {expected} bytes; llama.cpp reports {reported}"
            )
        size = expected
    _check_rotations(case, context)
    return size


def _check_rotations(case: Case, context: Context) -> None:
    """The rotation of a side is that of the first type of ours on it, base types first."""
    modes = (case.mode or "/").split("/")
    for side, mode in (("K", modes[0]), ("V", modes[-1])):
        kinds = [pair.k if side == "K" else pair.v for pair in case.plan.pairs]
        ours = next((kind.name for kind in kinds if kind.ours), None)
        rotation = context.rotations.get(side)
        upstream = context.upstream_rotates_k if side == "K" else context.upstream_rotates_v
        if ours is None and mode == "none" and upstream:
            raise CacheError(f"llama.cpp rotated {side} although {case.name} asks for no rotation")
        if ours is None:
            continue
        if rotation is None or rotation.type != ours or (mode and rotation.mode != mode):
            raise CacheError(f"llama.cpp did not rotate {side} as {case.name} asks for: {rotation}")


def mode_of(context: Context) -> str:
    """How K and V were rotated, from the log: ``full``, or ``full/block`` when they differ."""
    sides = []
    for side, upstream in (("K", context.upstream_rotates_k), ("V", context.upstream_rotates_v)):
        rotation = context.rotations.get(side)
        sides.append(rotation.mode if rotation else "hadamard" if upstream else "none")
    return sides[0] if sides[0] == sides[1] else "/".join(sides)

"""Whether llama.cpp kept a cache as it was asked to, and what it took, by its own log and to the byte."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ggufrq.base import log, texts
from ggufrq.base.errors import ModelError, ToolError
from ggufrq.cache.cases import Case
from ggufrq.cache.kv import KvPlan, exact_words, kv_types, parse_plan
from ggufrq.ggufs.files import model_header
from ggufrq.ggufs.heads import Heads
from ggufrq.ggufs.kv_shape import KvShape, find_kv_shape
from ggufrq.tools.logs import Context, is_printed, uses


class CacheError(ToolError):
    """The cache was not kept as it was asked for: in other types, of another size, or rotated otherwise."""


def as_asked(context: Context, plan: KvPlan) -> bool:
    """Whether every layer has the types that ``plan`` gives it, K the profile that it names, and as many of
    the newest and of the first tokens are in f16."""
    if (context.recent, context.first) != (plan.recent, plan.first):
        return False
    if (context.profile and context.profile.file) != (plan.file and texts.as_read(str(plan.file))):
        return False
    if not plan.layered:
        return not context.layers and uses(context, plan.base)
    if not context.layers:
        return False
    pairs = plan.resolve(sum(cache.layers for cache in context.caches))
    return context.layers == {"K": tuple(p.k.name for p in pairs), "V": tuple(p.v.name for p in pairs)}


def as_kept(context: Context, plan: KvPlan) -> KvPlan:
    """The plan without the newest and first tokens in f16 where nobody asked for them and llama.cpp does not
    hold them, which is said."""
    kept = _without_optional(context, plan)
    if kept is not plan:
        log.say(f"{exact_words(plan.recent, plan.first)} are not kept in f16: {context.not_held}")
    return kept


def _without_optional(context: Context, plan: KvPlan) -> KvPlan:
    return plan if not plan.optional or context.not_held is None else plan.with_exact(0)


def held_cases(cases: Iterable[Case], model: Path) -> list[Case]:
    """The cases, each once, as they are kept beside the cache of this GGUF ``model``: without newest and
    first tokens that nobody asked for where it cannot hold them, which is said."""
    kept = list(cases)
    if not any(case.plan.optional for case in kept) or _holds_exact(model):
        return kept
    log.say("no tokens are kept in f16, which this model's kind of attention does not attend to")
    plain = (
        replace(case, plan=case.plan.with_exact(0) if case.plan.optional else case.plan) for case in kept
    )
    return list(dict.fromkeys(plain))


def _holds_exact(model: Path) -> bool:
    """Whether tokens can be kept in f16 beside the model's cache, by its header; True where that does not
    tell."""
    try:
        return Heads.of_metadata(model_header(model).values).holds_exact
    except ModelError:
        return True


def found(context: Context) -> str:
    """In which types the cache was kept, by which profile and what in f16, in words."""
    sides = []
    for side, types in (("K", context.k_types), ("V", context.v_types)):
        layers = context.layers.get(side)
        sides.append(f"{side} in {', '.join(layers) + ' by layers' if layers else ', '.join(sorted(types))}")
    said = [" and ".join(sides)]
    said += [] if context.profile is None else [f"by the profile {context.profile.file}"]
    exact = exact_words(context.recent, context.first)
    said += [f"{exact} in f16"] if exact else []
    if context.not_held is not None and _quantized(context):
        said += [f"no tokens in f16: {context.not_held}"]
    return ", ".join(said)


def _quantized(context: Context) -> bool:
    """Whether any layer is quantized, beside which alone tokens in f16 make a difference."""
    names = context.k_types.union(context.v_types, *context.layers.values())
    return any(name in names for name, kind in kv_types().items() if kind.block > 1)


def cache_bytes(context: Context, plan: KvPlan, model: Path) -> int | None:
    """Exact bytes of K and V, with the newest and first tokens in f16, None where they cannot be told: from
    the shape of the model's cache where the log does not tell, as where layers have types of their own."""
    size = context.kv_bytes
    shape = find_kv_shape(model) if size is None else None
    if shape is not None:
        size = plan.bytes_for(shape, context.tokens)
        size = size if is_printed(size, context) else None
    return None if size is None else size + context.recent_bytes


def bits(context: Context) -> float | None:
    """Bits per value where all layers are alike, None where the log does not tell: half and half, or those of
    K where there is no V (MLA)."""
    if context.layers or context.filled or not context.caches:
        return None
    k, v = context.caches[0].k_kind, context.caches[0].v_kind
    if k is None or v is None:
        return None
    return k.bits if not context.caches[0].v_mib else (k.bits + v.bits) / 2


def f16_bytes(context: Context, model: Path) -> int | None:
    """What the same cache takes in f16, None where it cannot be told."""
    if context.kv_values is not None:
        return 2 * context.kv_values
    shape = find_kv_shape(model)
    return None if shape is None else parse_plan("f16").bytes_for(shape, context.tokens)


def check_context(
    case: Case,
    context: Context,
    model: Path,
    shape: KvShape | None,
    tokens: int | None,
) -> int | None:
    """Exact bytes of a cache of ``tokens`` tokens (None: as many as the log says), or None when the shape of
    the model's cache is not known and the log's figures do not tell.

    Raises CacheError when K or V were kept in other types than the case says, by another profile, in more or
    fewer bytes than they must take, or were not scaled or rotated as the case says.
    """
    plan = case.plan
    if not as_asked(context, plan):
        raise CacheError(
            f"llama.cpp did not keep the cache in {case.name}, but {found(context)}",
            remedy="--kv-recent 0 --kv-first 0" if context.not_held else None,
        )
    if context.scale != case.scale:
        how = f"with {context.scale}" if context.scale else "as usual"
        raise CacheError(f"llama.cpp scaled blocks {how}, although {case.name} was asked for")
    tokens = context.tokens if tokens is None else tokens
    if context.tokens != tokens:
        raise CacheError(f"llama.cpp reports a cache of {context.tokens} tokens instead of {tokens}")
    size = cache_bytes(context, plan, model) if shape is None else _checked(case, context, shape)
    _check_rotations(case, context)
    return size


def _checked(case: Case, context: Context, shape: KvShape) -> int:
    """The bytes that the cache must take, which the log must confirm as far as its figures go."""
    plan, cache = case.plan, context.caches[0]
    recent = plan.recent_bytes(shape, cache.cells, cache.sequences, cache.streams)
    if context.recent_bytes != recent:
        raise CacheError(
            f"the tokens in f16 of {case.name} take {recent} bytes; llama.cpp reports {context.recent_bytes}"
        )
    # where blocks of 64 and of 128 stand side by side, the log does not tell how many of each
    mixed = any(len({head % 128 == 0 for head in heads}) > 1 for heads in (shape.k_heads, shape.v_heads))
    expected, told = plan.bytes_for(shape, context.tokens), None if mixed else context.kv_bytes
    # small sizes are printed too coarsely to tell the exact one
    if not is_printed(expected, context) if told is None else told != expected:
        reported = f"{context.kv_mib} MiB" if told is None else f"{told} bytes"
        raise CacheError(
            f"a {case.name} cache of {context.tokens} tokens takes {expected} bytes; "
            f"llama.cpp reports {reported}"
        )
    return expected + recent


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

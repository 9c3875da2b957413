"""Whether llama.cpp kept a cache as it was asked to, and what it took, by its own log and to the byte."""

from __future__ import annotations

from pathlib import Path

from ggufrq.base.errors import ModelError
from ggufrq.cache.kv import Kv, as_plan
from ggufrq.ggufs.kv_shape import KvShape, kv_shape
from ggufrq.tools.logs import Context, uses

_MIB = 1 << 20
#: The log prints sizes with two decimals, one per cache.
_ROUNDING = 0.00501


def as_asked(context: Context, kv: Kv) -> bool:
    """Whether every layer has the types that ``kv`` gives it, K the calibration that it names, and as many of
    the newest tokens are in f16."""
    plan = as_plan(kv)
    if context.recent != plan.recent:
        return False
    if (context.calibration is not None) != (plan.calib is not None):
        return False
    if not plan.layered:
        return not context.layers and uses(context, plan.base)
    pairs = plan.resolve(sum(cache.layers for cache in context.caches))
    return context.layers == {"K": tuple(p.k.name for p in pairs), "V": tuple(p.v.name for p in pairs)}


def found(context: Context) -> str:
    """In which types the cache was kept, in words."""
    sides = []
    for side, types in (("K", context.k_types), ("V", context.v_types)):
        layers = context.layers.get(side)
        sides.append(f"{side} in {', '.join(layers) + ' by layers' if layers else ', '.join(sorted(types))}")
    calibrated = "" if context.calibration is None else f", calibrated by {context.calibration}"
    recent = "" if context.recent == 0 else f", the newest {context.recent} tokens in f16"
    return " and ".join(sides) + calibrated + recent


def cache_bytes(context: Context, kv: Kv, model: Path) -> int | None:
    """Exact bytes of K and V, with the newest tokens in f16, None where they cannot be told.

    With layers apart they are computed from the model's own rows; see ``layered_bytes``.
    """
    plan = as_plan(kv)
    shape = _shape(model) if plan.layered else None
    size = context.kv_bytes if shape is None else layered_bytes(context, kv, shape)
    return None if size is None else size + context.recent_bytes


def layered_bytes(context: Context, kv: Kv, shape: KvShape) -> int | None:
    """Exact bytes of K and V for a model of this shape, None when the sizes that the log prints are
    others."""
    size = as_plan(kv).bytes_for(shape, context.tokens)
    return size if abs(size / _MIB - context.kv_mib) <= _ROUNDING * len(context.caches) else None


def f16_bytes(context: Context, kv: Kv, model: Path) -> int | None:
    """What the same cache takes in f16, None where it cannot be told."""
    if not as_plan(kv).layered:
        return None if context.kv_values is None else 2 * context.kv_values
    shape = _shape(model)
    return None if shape is None else 2 * (shape.k_values + shape.v_values) * context.tokens


def _shape(model: Path) -> KvShape | None:
    try:
        return kv_shape(model)
    except ModelError:  # a model whose cache is not simply its K and V projections
        return None

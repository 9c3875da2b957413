"""The prompt cache of a model: ours for the layers that have K and V, what the model says for others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import mlx_lm.models.base as base
import mlx_lm.models.cache as lm

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.mlx.attention import register
from ggufrq.mlx.cache import IsoQuantCache, PlanarQuantCache, QuantizedCache, RotorQuantCache
from ggufrq.mlx.models import SOURCE
from ggufrq.models.profiles import layer_profiles
from ggufrq.profile import LayerProfile, Profile

CLASSES: dict[str, type[QuantizedCache]] = {
    "planar": PlanarQuantCache,
    "iso": IsoQuantCache,
    "rotor": RotorQuantCache,
}


def make_cache(
    model: Any,
    bits: int = 3,
    v_bits: int | None = None,
    *,
    family: Literal["planar", "iso", "rotor"] = "iso",
    recent: int = 32,
    first: int = 1,
    max_kv_size: int | None = None,
    profile: str | Path | Profile | Literal["weights"] | None = None,
    metal: bool = False,
) -> list[Any]:
    """A prompt cache for ``model``, one of mlx-lm: as the model makes it, with ours for K and V.

    ``bits`` (2 to 5) is the code of K, and of V unless ``v_bits`` is another one; the newest ``recent``
    tokens of each query and the ``first`` of the sequence are seen as they were. ``max_kv_size`` is for
    models that do not say what caches they have, as in mlx-lm: so many tokens are seen, the first four of a
    sequence always. ``profile`` is the file that lies beside the model's GGUF (``NAME-kv.gguf``), or
    "weights" to make one, for models that ``ggufrq.mlx.load`` has loaded. With ``metal`` tokens that come one
    at a time go through a Metal kernel that no Mac has run yet.

    Raises UsageError when an argument makes no sense, ModelError when the model reads K and V by an attention
    of its own, which knows no quantized ones, and when a profile is damaged or of another model.
    """
    if family not in CLASSES:
        raise UsageError(f"family is {family!r}, and there are {', '.join(CLASSES)}")
    _check(model)
    cls = CLASSES[family]

    metrics = _metrics(model, profile)
    said: dict[str, Any] = {"recent": recent, "first": first, "metal": metal}

    def ours(one: Any, layer: int) -> Any:
        metric = metrics.get(layer)
        if type(one) is lm.KVCache:
            return cls(bits, v_bits, profile=metric, **said)
        if type(one) is lm.RotatingKVCache:
            window = one.max_size - one.keep
            return cls(bits, v_bits, window=window, keep=one.keep, profile=metric, **said)
        if type(one) is lm.CacheList:
            return lm.CacheList(*(ours(part, layer) for part in one.caches))
        if type(one) is lm.ArraysCache:
            return one
        raise ModelError(
            f"the model has a {type(one).__name__}, in whose place there is no cache of ggufrq",
            remedy="the cache that mlx-lm makes",
        )

    # Not model.make_cache: that is where users put this function.
    makes = getattr(type(model), "make_cache", None)
    if makes is not None:
        usual = makes(model)
    elif max_kv_size is not None:
        usual = [lm.RotatingKVCache(max_size=max_kv_size, keep=4) for _ in model.layers]
    else:
        usual = [lm.KVCache() for _ in model.layers]
    return [ours(one, layer) for layer, one in enumerate(usual)]


def _metrics(
    model: Any, profile: str | Path | Profile | Literal["weights"] | None
) -> dict[int, LayerProfile]:
    """The profile of each layer of a model that has one."""
    if profile is None:
        return {}
    source = getattr(model, SOURCE, "")
    if profile == "weights" and not source:
        raise UsageError(
            "it is not known where the model's weights are",
            remedy="ggufrq.mlx.load in place of mlx_lm.load; or a file, which ggufrq calibrate makes",
        )
    found = layer_profiles(profile, str(model.model_type), len(model.layers), source)
    if not found:
        raise ModelError("the profile has no layer of this model", remedy="the profile of this very model")
    return found


def _check(model: Any) -> None:
    """Raise ModelError unless the model reads K and V by the function of mlx-lm that calls ours."""
    layers = [
        module for module in model.modules() if hasattr(module, "k_proj") or hasattr(module, "qkv_proj")
    ]
    why = None
    if any(hasattr(module, "kv_lora_rank") for module in model.modules()):
        why = "it keeps latents in place of K and V"
    elif any("sinks" in module for module in model.modules()):
        why = "it has attention sinks, which mlx-lm does not take with quantized caches"
    elif getattr(getattr(model, "args", None), "num_kv_shared_layers", 0):
        why = "layers of it read K and V of others without their cache"
    elif not all(_reads(module) for module in layers):
        why = "it has an attention of its own"
    if why is not None:
        raise ModelError(
            f"{model.model_type} cannot read caches of ggufrq: {why}", remedy="the cache that mlx-lm makes"
        )


def _reads(module: Any) -> bool:
    """Whether the file of an attention has mlx-lm's function by its usual name."""
    usual = base.scaled_dot_product_attention
    return getattr(sys.modules[type(module).__module__], "scaled_dot_product_attention", None) is usual


def install() -> None:
    """Make ours known to mlx-lm: to the attention of its models, and to ``load_prompt_cache``, which looks
    for classes in its own module."""
    register()
    for cls in CLASSES.values():
        setattr(lm, cls.__name__, cls)

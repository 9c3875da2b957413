"""What a cache holds, in a file in the form of safetensors: blocks as they are, and how they came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ggufrq.base import paths
from ggufrq.base.errors import ModelError
from ggufrq.codec.tables import code, head_block
from ggufrq.hf import blocks
from ggufrq.hf.fixed import FixedAttentionLayer
from ggufrq.hf.layer import QuantizedAttentionLayer
from ggufrq.hf.side import Settings, State
from ggufrq.profile.file import LayerProfile

VERSION = 1
#: Where the file says how its tensors came about.
KEY = "ggufrq.cache"
#: Layers of attention.
Attention = (QuantizedAttentionLayer, FixedAttentionLayer)
_PARTS = "blocks", "recent", "first"


def save(layers_held: list[Any], kind: dict[str, Any], model: dict[str, Any] | None, path: Path) -> None:
    """Write what the layers of a cache of this kind hold, of a model with these facts where they are known.
    Raises OSError when that fails; nothing half-written is left."""
    tensors: dict[str, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    for i, layer in enumerate(layers_held):
        facts: dict[str, Any] = {"kind": _kind(layer)}
        if isinstance(layer, Attention):
            state = layer.state()
            facts |= {"window": layer.window, "length": 0 if state is None else state.length}
            if state is not None:
                facts["start"] = state.start
                tensors[f"{i}.starts"] = state.rows
                for name, parts in (("k", state.k), ("v", state.v)):
                    tensors |= {f"{i}.{name}.{what}": x for what, x in zip(_PARTS, parts, strict=True)}
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            facts["states"] = layer.number_of_states
            for name, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                tensors |= {f"{i}.{name}.{n}": state for n, state in states.items() if state is not None}
        layers.append(facts)
    head = {"version": VERSION, "settings": kind, "model": model, "layers": layers}
    with paths.atomic_path(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {KEY: json.dumps(head)},
        )


def load(
    layers: list[Any],
    new: Callable[[str, int, int | None], Any],
    kind: dict[str, Any],
    model: dict[str, Any] | None,
    path: Path,
    device: torch.device | str,
) -> list[Any]:
    """Layers that hold what another cache wrote, for those of one of this kind; ``new`` makes a layer of the
    kind, index and window that it is told.

    Raises ModelError when the file is missing or damaged, or of a cache of another kind or another model; the
    layers that there are hold what they held.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            head = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from None
    if not isinstance(head, dict) or head.get("version") != VERSION:
        raise ModelError(
            f"{path} is no saved cache of version {VERSION}", remedy="a file that cache.save() has written"
        )
    _require_alike(head, kind, model, path)
    try:
        here = [(_kind(layer), getattr(layer, "window", None)) for layer in layers]
        there = [(facts["kind"], facts.get("window")) for facts in head["layers"]]
        if here and there and here != there:
            raise ModelError(
                f"{path} is of a cache with other layers", remedy="the same config, or none in both"
            )
        made = []
        for i, facts in enumerate(head["layers"]):
            before = layers[i] if i < len(layers) else None
            if facts["kind"] == "attention":
                layer = new("attention", i, facts["window"])
                if "start" in facts:
                    layer.take(_state(i, facts, tensors, kind))
            elif facts["kind"] == "linear":
                layer = _linear(before or new("linear", i, None), i, facts, tensors)
            else:
                layer = before or new(facts["kind"], i, None)
            if before is not None and hasattr(before, "record_past"):
                layer.record_past = before.record_past
            made.append(layer)
        _require(not tensors, f"it has tensors of no layer: {', '.join(tensors)}")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    return made


def _damaged(path: Path, error: Exception) -> ModelError:
    why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
    return ModelError(
        f"{path} is no saved cache, or is damaged: {why}", remedy="a file that cache.save() has written"
    )


def _require_alike(
    head: dict[str, Any], kind: dict[str, Any], model: dict[str, Any] | None, path: Path
) -> None:
    """Raise ModelError for the file of a cache of another kind, or of another model where both are known."""
    settings, of = head.get("settings"), head.get("model")
    if settings != kind:
        told = _told(settings) if isinstance(settings, dict) else "none that is known"
        raise ModelError(
            f"{path} is of a cache of another kind: {told}, and this one is {_told(kind)}",
            remedy="make the cache with the same arguments",
        )
    if model is not None and isinstance(of, dict) and of != model:
        names = [name for name in model if of.get(name) != model[name]]
        there, here = (_told({name: one.get(name) for name in names}) for one in (of, model))
        raise ModelError(
            f"{path} is of a cache of another model: {there}, and this one is {here}",
            remedy="a file of this very model",
        )


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _state(i: int, facts: dict[str, Any], tensors: dict[str, torch.Tensor], kind: dict[str, Any]) -> State:
    """What an attention layer held, taken out of ``tensors``. Raises ValueError and KeyError when that is not
    as a layer holds it."""
    start, length = facts["start"], facts["length"]
    _require(
        type(start) is type(length) is int and 0 <= start <= length and start % blocks.CHUNK == 0,
        f"layer {i} holds tokens {start} to {length}",
    )
    rows = tensors.pop(f"{i}.starts")
    sides = []
    for name, bits in (("k", kind["bits"]), ("v", kind["v_bits"])):
        held, recent, first = (tensors.pop(f"{i}.{name}.{what}") for what in _PARTS)
        batch, heads, _, dim = first.shape
        made = code(bits, head_block(dim))
        newest = recent.shape[2] if recent.ndim == 4 else 0
        wanted = {
            "blocks": (held, torch.uint8, (batch, heads, length - start, dim // made.block * made.bytes)),
            "recent": (recent, torch.float16, (batch, heads, min(newest, kind["recent"], length), dim)),
            "first": (first, torch.float16, (batch, heads, kind["first"], dim)),
            "starts": (rows, torch.int64, (batch,)),
        }
        for what, (x, dtype, shape) in wanted.items():
            found = (tuple(x.shape), x.dtype)
            _require(
                found == (shape, dtype),
                f"{what} of {name.upper()} of layer {i} are {found} and not {(shape, dtype)}",
            )
        sides.append((held, recent, first))
    (k, v) = sides
    _require(k[1].shape[1:3] == v[1].shape[1:3], f"K and V of layer {i} do not go together")
    _require(bool(((rows >= -1) & (rows <= length)).all()), f"rows of layer {i} begin nowhere")
    return State(start, length, rows, k, v)


def _linear(layer: Any, i: int, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """A linear layer like the one given, with the states that are taken out of ``tensors``."""
    _require(type(facts["states"]) is int, f"layer {i} has {facts['states']} states")
    made = type(layer)(number_of_states=facts["states"])
    for n in range(facts["states"]):
        for name, update in (("conv", made.update_conv_state), ("recurrent", made.update_recurrent_state)):
            state = tensors.pop(f"{i}.{name}.{n}", None)
            if state is not None:
                _require(state.dtype.is_floating_point, f"a state of layer {i} is of {state.dtype}")
                update(state, n)
    return made


def _kind(layer: Any) -> str:
    if isinstance(layer, Attention):
        return "attention"
    return "linear" if isinstance(layer, LinearAttentionCacheLayerMixin) else "none"


def kind_of(settings: Settings, profiles: dict[int, LayerProfile]) -> dict[str, Any]:
    """What must be alike for blocks to mean the same."""
    digest = None
    if profiles:
        whole = hashlib.sha256()
        for il, layer in sorted(profiles.items()):
            whole.update(str(il).encode() + layer.k_map.tobytes())
            whole.update(b"" if layer.k_mean is None else layer.k_mean.tobytes())
        digest = whole.hexdigest()[:16]
    return {**asdict(settings), "profile": digest}


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def facts_of(config: Any) -> dict[str, Any]:
    """What tells the cache of one model from that of another."""
    text = config.get_text_config(decoder=True)
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(text, name, None) for name in (*names, "head_dim", "vocab_size")}

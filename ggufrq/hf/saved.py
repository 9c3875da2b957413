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
from ggufrq.hf.blocks import CHUNK, Blocks
from ggufrq.hf.layer import QuantizedAttentionLayer
from ggufrq.hf.side import Settings
from ggufrq.profile.file import LayerProfile

VERSION = 1
#: Where the file says how its tensors came about.
KEY = "ggufrq.cache"


def save(layers_held: list[Any], kind: dict[str, Any], path: Path) -> None:
    """Write what the layers of a cache of this kind hold. Raises OSError when that fails; nothing
    half-written is left."""
    tensors: dict[str, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    for i, layer in enumerate(layers_held):
        facts: dict[str, Any] = {"kind": _kind(layer)}
        if isinstance(layer, QuantizedAttentionLayer):
            facts |= {"window": layer.window, "length": layer.length}
            if layer.sides is not None and layer.starts is not None:
                facts["start"] = layer.sides[0].blocks.start
                tensors[f"{i}.starts"] = layer.starts.rows
                for name, side in zip("kv", layer.sides, strict=True):
                    parts = [tile for _, tile in side.blocks.tiles(CHUNK)]
                    tensors[f"{i}.{name}.blocks"] = torch.cat(parts, dim=2)
                    tensors[f"{i}.{name}.recent"] = side.recent
                    tensors[f"{i}.{name}.first"] = side.first
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            facts["states"] = layer.number_of_states
            for name, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                tensors |= {f"{i}.{name}.{n}": state for n, state in states.items() if state is not None}
        layers.append(facts)
    head = {"version": VERSION, "settings": kind, "layers": layers}
    with paths.atomic_path(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {KEY: json.dumps(head)},
        )


def load(
    layers: list[Any],
    new: Callable[[str, int], Any],
    kind: dict[str, Any],
    path: Path,
    device: torch.device | str,
) -> None:
    """Take what another cache wrote into the layers of one of this kind, in place of what they hold; ``new``
    makes a layer of the kind and index that it is told, where there is none.

    Raises ModelError when the file is missing or damaged, or of a cache of another kind.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            head = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} is no saved cache, or is damaged: {error}") from None
    if head.get("version") != VERSION:
        raise ModelError(f"{path} is no saved cache of version {VERSION}")
    if head["settings"] != kind:
        raise ModelError(
            f"{path} is of a cache of another kind: {_told(head['settings'])}, and this one is {_told(kind)}",
            remedy="make the cache with the same arguments",
        )
    here = [(_kind(layer), getattr(layer, "window", None)) for layer in layers]
    there = [(facts["kind"], facts.get("window")) for facts in head["layers"]]
    if here and there and here != there:
        raise ModelError(f"{path} is of a cache with other layers", remedy="the same config, or none in both")
    for layer in layers:
        layer.reset()
    for i, facts in enumerate(head["layers"]):
        if i == len(layers):
            layers.append(new(facts["kind"], i))
        layer = layers[i]
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for n in range(facts["states"]):
                if f"{i}.conv.{n}" in tensors:
                    layer.update_conv_state(tensors[f"{i}.conv.{n}"], n)
                if f"{i}.recurrent.{n}" in tensors:
                    layer.update_recurrent_state(tensors[f"{i}.recurrent.{n}"], n)
        elif "start" in facts:
            first = [tensors[f"{i}.{name}.first"] for name in "kv"]
            layer.lazy_initialization(*(x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in first))
            for name, side in zip("kv", layer.sides, strict=True):
                side.blocks = Blocks.of(facts["start"], tensors[f"{i}.{name}.blocks"])
                side.recent, side.first = (tensors[f"{i}.{name}.{what}"] for what in ("recent", "first"))
            layer.length = facts["length"]
            layer.starts.set(tensors[f"{i}.starts"])


def _kind(layer: Any) -> str:
    if isinstance(layer, QuantizedAttentionLayer):
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

"""Files of safetensors for mlx-lm: what they will be to the byte, and writing them a tensor at a time.

mlx's own writer orders tensors by a hash, so that the digits of their places, and with them the size of a
header, are known only behindhand.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ggufrq.base import paths

#: Bytes of tensors in one file, as in mlx-lm.
MOST = 5 << 30
INDEX = "model.safetensors.index.json"
_TYPES = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    **{mx.bool_: "BOOL", mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64"},
    **{mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64"},
}


@dataclass(frozen=True)
class Shard:
    """A file: its name, all before the data, the tensors in their order, and its size in bytes."""

    name: str
    header: bytes
    tensors: tuple[str, ...]
    bytes: int


def shards(arrays: Mapping[str, mx.array], most: int = MOST) -> list[Shard]:
    """The files of these tensors, each with ``most`` bytes of them unless one alone has more."""
    parts: list[list[str]] = []
    size = 0
    for name in sorted(arrays):
        if not parts or size + arrays[name].nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += arrays[name].nbytes
    if len(parts) == 1:
        return [_shard("model.safetensors", parts[0], arrays)]
    return [
        _shard(f"model-{i + 1:05}-of-{len(parts):05}.safetensors", part, arrays)
        for i, part in enumerate(parts)
    ]


def index(found: list[Shard], arrays: Mapping[str, mx.array], weights: int) -> str:
    """The index of these files, as mlx-lm writes it; ``weights`` is what the model had."""
    total = sum(x.nbytes for x in arrays.values())
    places = {name: shard.name for shard in found for name in shard.tensors}
    facts = {"metadata": {"total_size": total, "total_parameters": weights}, "weight_map": places}
    return json.dumps(facts, indent=4)


def write(shard: Shard, arrays: dict[str, mx.array], folder: Path) -> None:
    """Compute and write the tensors of a file, which go from ``arrays``. The file gets its name when it is
    whole."""
    with paths.atomic_path(folder / shard.name) as temporary, temporary.open("wb") as file:
        file.write(shard.header)
        for name in shard.tensors:
            file.write(_data(arrays.pop(name)))


def _shard(name: str, tensors: list[str], arrays: Mapping[str, mx.array]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for one in tensors:
        x = arrays[one]
        start, end = end, end + x.nbytes
        header[one] = {"dtype": _TYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return Shard(name, head, tuple(tensors), len(head) + end)


def _data(x: mx.array) -> bytes:
    if x.size == 0:
        return b""
    flat = mx.view(mx.contiguous(x.reshape(-1)), mx.uint8)
    return np.array(flat).tobytes()

"""An embedded model as a repository on the Hub, its weights in as many shards as asked for."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def repository(folder: Path, count: int, layers: int | None = None) -> dict[str, bytes]:
    """The files of a model's folder by name, with the weights in about ``count`` shards, and of its first
    ``layers`` alone."""
    files = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name
    }
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    if layers is not None:
        files["config.json"] = _cut(files["config.json"], layers)
    names = [n for n in header if n != "__metadata__" and (layers is None or _layer(n) < layers)]
    names.sort(key=lambda name: header[name]["data_offsets"][0])
    sizes = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names}
    share, groups = sum(sizes.values()) / count, [list[str]()]
    for name in names:
        if groups[-1] and sum(sizes[n] for n in groups[-1]) + sizes[name] > share:
            groups.append([])
        groups[-1].append(name)
    where = {}
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        offset, told, data = 0, {}, b""
        for name in group:
            first, last = header[name]["data_offsets"]
            data += raw[start + first : start + last]
            told[name] = {**header[name], "data_offsets": [offset, offset + last - first]}
            offset += last - first
            where[name] = file
        text = json.dumps(told).encode()
        files[file] = struct.pack("<Q", len(text)) + text + data
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": where}).encode()
    return files


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def _cut(config: bytes, layers: int) -> bytes:
    data = json.loads(config)
    data["num_hidden_layers"] = layers
    if "layer_types" in data:
        data["layer_types"] = data["layer_types"][:layers]
    return json.dumps(data).encode()

"""Copies of the embedded model in Hugging Face form, changed as tests need it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ggufrq.models.convert import read_safetensors_header
from ggufrq.models.resolve import embedded_models

DENSE = "docs-qwen3-8m"
Tensors = dict[str, np.ndarray]
_NAMES = {
    **{"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8"},
    **{"int8": "I8", "int32": "I32", "int64": "I64"},
}


def copy(folder: Path, name: str = DENSE) -> Path:
    """A copy of an embedded model that a test may spoil."""
    shutil.copytree(embedded_models()[name], folder)
    return folder


def tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file in F32."""
    header, size = read_safetensors_header(path)
    data = path.read_bytes()[-size:]
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert entry["dtype"] == "BF16"
        raw = np.frombuffer(data[start:end], np.uint16).astype(np.uint32) << 16
        found[name] = raw.view(np.float32).reshape(entry["shape"]).copy()
    return found


def bf16(values: np.ndarray) -> np.ndarray:
    """Values as the upper halves of F32, for ``write``."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write(path: Path, values: Mapping[str, np.ndarray], kinds: Mapping[str, str] | None = None) -> Path:
    """A safetensors file; ``uint16`` stands for BF16, and ``kinds`` names the types of tensors that numpy has
    none for."""
    header: dict[str, Any] = {}
    at = 0
    for name, array in values.items():
        kind = (kinds or {}).get(name) or _NAMES[array.dtype.name]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in values.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return path


def changed(folder: Path, change: Callable[[Tensors], None], *, name: str = DENSE) -> Path:
    """A copy of an embedded model whose tensors ``change`` has changed, in BF16 as before."""
    copy(folder, name)
    path = folder / "model.safetensors"
    values = tensors(path)
    change(values)
    write(path, {key: bf16(array) for key, array in values.items()})
    return folder


def config(folder: Path, **values: Any) -> None:
    """Set values of config.json; None removes one."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

"""The weights of a model in 16 or 32 bits, a piece at a time, and a copy of the model with some of them
changed.

Nothing is kept in memory beyond the piece at hand, and a model in shards becomes one file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ggufrq.base.errors import ModelError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.ggufs.header import TensorInfo, pad
from ggufrq.ggufs.opened import Opened, Place
from ggufrq.ggufs.tensors import type_bytes
from ggufrq.make.fold.changes import F32, Change, as_type

_FLOATS: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
#: Values that are read at a time: 16 MiB in 32 bits.
_PIECE = 1 << 22
_COPY = 1 << 24
#: ggml's numbers, and the file type of a model in f16.
_TYPES = {"f32": 0, "f16": 1}
_FILE_TYPE_F16 = 1
_STRING, _U32 = 8, 4


class Weights(Opened):
    """The tensors of a GGUF model, all its shards. A context manager. Raises ModelError when the model is
    damaged."""

    @property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor, in the order of the files."""
        return [place.info for place in self.places.values()]

    def shape(self, name: str) -> tuple[int, int, int]:
        """Experts, rows and columns of a tensor; a vector is one row."""
        columns, rows, experts = (*self.places[name].info.shape, 1, 1)[:3]
        return experts, rows, columns

    def read(self, name: str, expert: int = 0, first: int = 0, count: int | None = None) -> F32:
        """``count`` rows of one expert from row ``first`` on, [rows, columns]. Raises ModelError for a tensor
        that is quantized."""
        place = self.places[name]
        _, rows, columns = self.shape(name)
        dtype = _FLOATS.get(place.kind)
        if dtype is None:
            raise ModelError(f"{name} is {place.kind}, no float")
        count = rows - first if count is None else count
        place.file.seek(place.start + (expert * rows + first) * columns * dtype.itemsize)
        raw = np.fromfile(place.file, dtype, count * columns)
        if raw.size != count * columns:
            raise _cut(name)
        if place.kind == "bf16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        values: F32 = raw.astype(np.float32, copy=False).reshape(count, columns)
        return values

    def whole(self, name: str) -> F32:
        """A small tensor, [rows, columns] with the rows of all experts one behind the other."""
        experts = self.shape(name)[0]
        return np.concatenate([self.read(name, expert) for expert in range(experts)])


def write_changed(
    weights: Weights,
    out: Path,
    changes: Mapping[str, Change],
    metadata: Mapping[str, str],
    *,
    listener: Listener = SILENT,
) -> None:
    """Write the model with ``changes`` by tensor straight into ``out``, in one piece. Changed tensors in bf16
    become f16, whose rounding is finer; all others stay as they are. ``metadata`` are text values to add.
    ``listener`` is told of the tensors. Raises ModelError."""
    kinds = {
        name: ("f32" if place.kind == "f32" else "f16") if name in changes else place.kind
        for name, place in weights.places.items()
    }
    with out.open("wb") as file:
        file.write(_header(weights, kinds, metadata))
        alignment = weights.header.alignment
        for name, place in weights.places.items():
            if name in changes:
                for piece in _pieces(weights, name, changes[name]):
                    file.write(as_type(piece, kinds[name], name).tobytes())
            else:
                _copy(place, file)
            file.write(bytes(pad(file.tell(), alignment) - file.tell()))
            listener.advance()


def _pieces(weights: Weights, name: str, change: Change) -> Iterator[F32]:
    experts, rows, columns = weights.shape(name)
    step = max(1, _PIECE // columns)
    for expert in range(experts):
        for first in range(0, rows, step):
            values = weights.read(name, expert, first, min(step, rows - first))
            yield change.apply(values, expert, first)


def _size(place: Place, kind: str) -> int:
    info = place.info
    return type_bytes(kind, info.values, info.columns)


def _cut(name: str) -> ModelError:
    return ModelError(f"{name} could not be read to its end", remedy="make or download the model again")


def _copy(place: Place, file: BinaryIO) -> None:
    left = _size(place, place.kind)
    place.file.seek(place.start)
    while left:
        data = place.file.read(min(left, _COPY))
        if not data:
            raise _cut(place.info.name)
        file.write(data)
        left -= len(data)


def _header(weights: Weights, kinds: Mapping[str, str], metadata: Mapping[str, str]) -> bytes:
    """Everything before the data: the values of the source as they are, those of ``metadata``, the list of
    tensors, and padding."""
    header = weights.header
    added = {key: _text(key) + struct.pack("<I", _STRING) + _text(value) for key, value in metadata.items()}
    if any(kind != weights.kind(name) for name, kind in kinds.items()):
        key = "general.file_type"
        added[key] = _text(key) + struct.pack("<II", _U32, _FILE_TYPE_F16)
    values = []
    with weights.paths[0].open("rb") as file:
        file.seek(24)
        for key, size in header.value_bytes.items():
            data = file.read(size)
            if not key.startswith("split."):
                values.append(added.pop(key, data))
    values += added.values()
    infos, offset = [], 0
    for name, place in weights.places.items():
        shape = place.info.shape
        infos.append(
            _text(name)
            + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            + struct.pack("<IQ", _TYPES.get(kinds[name], place.info.type), offset)
        )
        offset = pad(offset + _size(place, kinds[name]), header.alignment)
    start = b"GGUF" + struct.pack("<IQQ", header.version, len(infos), len(values))
    whole = b"".join([start, *values, *infos])
    return whole + bytes(pad(len(whole), header.alignment) - len(whole))


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data

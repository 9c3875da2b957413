"""The header of a GGUF file: metadata and the list of tensors, read without the tensors themselves.

Reads from any binary file object, so that a header can also be read through range requests. Every length is
checked against the size of the file before anything is read, so that a damaged header gives an error and not
a huge allocation. Format: docs/gguf.md of the ggml repository.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.foreign import foreign

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
#: Of the data of tensors, where a file does not say another; llama-quantize pads to this, whatever it says.
ALIGNMENT = 32
#: Value types of the format: struct codes of the fixed ones; strings and arrays are 8 and 9.
_FIXED = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
#: Nanoseconds after which a change of a file surely changes its time.
_SETTLED = 10**9
_MAX_NAME = 65535


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in the header: ``shape`` begins with the row length, ``type`` is ggml's number of it, and
    ``offset`` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def values(self) -> int:
        """How many values it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def columns(self) -> int:
        """How many values a row has; a scalar is a row of one."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Header:
    """``values`` is the metadata, ``kinds`` the number of the type of each entry and, for arrays, of what is
    in them; ``value_bytes`` what each entry takes in the header, key included; ``data_offset`` is where the
    data of the tensors begins."""

    version: int
    values: dict[str, Any]
    value_bytes: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    kinds: dict[str, tuple[int, int | None]] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Whether the file begins like a GGUF file."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_header(path: Path) -> Header:
    """The header of a file, which callers share: nobody writes into it. Raises ModelError when it is missing,
    damaged, or no GGUF file."""
    try:
        facts = path.stat()
        settled = time.time_ns() - facts.st_mtime_ns > _SETTLED
        read = _read if settled else _read.__wrapped__
        return read(path, path.absolute(), facts.st_size, facts.st_mtime_ns)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except ModelError as error:
        raise foreign(path, error.message, error.remedy or "") from None


@lru_cache(4)  # large vocabularies take half a second, and a command looks at its model ten times
def _read(path: Path, _absolute: Path, size: int, _mtime_ns: int) -> Header:
    """The header of a file as long as it is the same one; ``path`` stands for it in errors."""
    with path.open("rb") as file:
        return parse_header(file, size, str(path))


def parse_header(file: BinaryIO, size: int, name: str) -> Header:
    """As ``read_header``, from an open file of ``size`` bytes that ``name`` stands for in errors."""
    reader = _Reader(file, size, name)
    if reader.take(4) != _MAGIC:
        raise reader.damaged("it does not begin like a GGUF file")
    version = reader.number("<I")
    if version not in _VERSIONS:
        raise reader.damaged(f"its version is {version}; {_VERSIONS[-1]} is the current one")
    n_tensors, n_values = reader.number("<Q"), reader.number("<Q")
    reader.require(24 * n_tensors + 13 * n_values)
    values: dict[str, Any] = {}
    value_bytes: dict[str, int] = {}
    kinds: dict[str, tuple[int, int | None]] = {}
    for _ in range(n_values):
        start = reader.position
        key = reader.string(_MAX_NAME)
        kind = reader.number("<I")
        values[key], inner = reader.value(kind)
        kinds[key] = (kind, inner)
        value_bytes[key] = reader.position - start
    tensors = tuple(reader.tensor() for _ in range(n_tensors))
    if len({tensor.name for tensor in tensors}) != n_tensors or len(values) != n_values:
        raise reader.damaged("a name in its header occurs twice")
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise reader.damaged(f"its alignment is {alignment}, which is no power of two from 8 on")
    return Header(version, values, value_bytes, tensors, alignment, pad(reader.position, alignment), kinds)


def pad(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to whole multiples of ``alignment``."""
    return -(-size // alignment) * alignment


class _Reader:
    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file = file
        self.size = size
        self.name = name
        self.position = 0

    def damaged(self, why: str) -> ModelError:
        return ModelError(
            f"{self.name} is damaged or no GGUF file: {why}", remedy="make or download it again"
        )

    def require(self, length: int) -> None:
        if length > self.size - self.position:
            raise self.damaged(f"its header goes on beyond its end ({self.size} bytes)")

    def take(self, length: int) -> bytes:
        self.require(length)
        data = self.file.read(length)
        if len(data) != length:
            raise self.damaged("it could not be read to the end of its header")
        self.position += length
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self, longest: int | None = None) -> str:
        length = self.number("<Q")
        if longest is not None and length > longest:
            raise self.damaged("a name in its header is too long")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> tuple[Any, int | None]:
        """A value, and the type of what is in it when it is an array."""
        if kind in _FIXED:
            return self.number(_FIXED[kind]), None
        if kind == _STRING:
            return self.string(), None
        if kind != _ARRAY:
            raise self.damaged(f"its header has a value of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _FIXED:
            code = _FIXED[inner]
            self.require(count * struct.calcsize(code))
            return struct.unpack(f"<{count}{code[1]}", self.take(count * struct.calcsize(code))), inner
        if inner != _STRING:
            raise self.damaged(f"its header has an array of the unknown type {inner}")
        self.require(8 * count)
        return tuple(self.string() for _ in range(count)), inner

    def tensor(self) -> TensorInfo:
        name = self.string(_MAX_NAME)
        n_dims = self.number("<I")
        if n_dims > _MAX_DIMS:
            raise self.damaged(f"tensor {name} has {n_dims} dimensions")
        shape: Sequence[int] = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))
        return TensorInfo(name, tuple(shape), self.number("<I"), self.number("<Q"))

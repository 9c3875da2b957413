"""The weights of a GGUF, dequantized a few rows at a time, whatever their type and over all shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.files import shards
from ggufrq.ggufs.header import Header, TensorInfo, read_header

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


class Tensors:
    """The tensors of the model that ``path`` is (a shard of). Nothing is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: list[Header] = []
        self._found: dict[str, tuple[Path, Header, TensorInfo]] = {}
        first = read_header(path)  # a header with a large vocabulary takes seconds: none is read twice
        several = first.values.get("split.count", 0) > 1
        for part in shards(path) if several else [path]:
            header = first if part == path else read_header(part)
            self.headers.append(header)
            self._found |= {tensor.name: (part, header, tensor) for tensor in header.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as numpy has it: the row length is last."""
        return tuple(reversed(self._get(name)[2].shape))

    def rows(self, name: str, first: int = 0, count: int | None = None) -> F32:
        """``count`` rows [count, row length] from ``first`` on, all by default."""
        import gguf

        part, header, tensor = self._get(name)
        width = tensor.shape[0]
        count = tensor.values // width - first if count is None else count
        try:
            kind = gguf.GGMLQuantizationType(tensor.type)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            row = width // block * size
            with part.open("rb") as file:
                file.seek(header.data_offset + tensor.offset + first * row)
                data = np.frombuffer(file.read(count * row), np.uint8)
            if len(data) != count * row:
                raise ModelError(f"{part} is damaged: it ends within {name}", remedy="download it again")
            found = gguf.quants.dequantize(data.reshape(count, row), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ModelError(
                f"{name} of {part.name} has type {tensor.type}, which the gguf package cannot "
                f"dequantize: {error}",
                remedy="make the profile from another quantization of the model; all of them share it",
            ) from error
        values = np.asarray(found, np.float32).reshape(count, width)
        scale = f"{name.removesuffix('.weight')}.scale"  # of NVFP4: what llama.cpp multiplies the product by
        return values * self.rows(scale) if scale != name and self._is_one(scale) else values

    def _is_one(self, name: str) -> bool:
        return name in self._found and self._found[name][2].values == 1

    def vector(self, name: str) -> F64 | None:
        """A tensor of one row, or several, in its shape; None when there is none."""
        if name not in self:
            return None
        return np.asarray(self.rows(name), np.float64).reshape(self.shape(name))

    def _get(self, name: str) -> tuple[Path, Header, TensorInfo]:
        if name not in self._found:
            raise ModelError(
                f"{self.path.name} has no tensor {name}",
                remedy="download it again, or make it from the original",
            )
        return self._found[name]

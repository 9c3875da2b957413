"""What a type loses of given weights: encoded by the very code that llama-quantize runs, and decoded
again."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_size_t, c_void_p

import numpy as np

from ggufrq.base.errors import ToolError
from ggufrq.build.ggml_library import Traits, library
from ggufrq.build.project import Build
from ggufrq.ggufs.tensors import type_bytes, type_number
from ggufrq.make.fold.changes import F32, F64


class Codes:
    """The types of a build of llama.cpp. Raises ToolError when its library cannot be loaded."""

    def __init__(self, build: Build) -> None:
        try:
            ggml = library(build.bin, "ggml-base")
        except OSError as error:
            raise ToolError(
                f"the library of llama.cpp cannot be loaded: {error}", remedy="ggufrq build"
            ) from None
        self._quantize = ggml.ggml_quantize_chunk
        self._quantize.restype = c_size_t
        self._quantize.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
        self._traits = ggml.ggml_get_type_traits
        self._traits.restype = ctypes.POINTER(Traits)
        self._traits.argtypes = [c_int]

    def decoded(self, kind: str, values: F32, importance: F32 | None = None) -> F32:
        """``values`` [rows, columns] after a round through the type, whose code weighs errors by
        ``importance`` [columns] when there is one."""
        rows, columns = values.shape
        values = np.ascontiguousarray(values, np.float32)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        number = type_number(kind)
        coded = np.empty(type_bytes(kind, values.size, columns), np.uint8)
        self._quantize(
            number,
            values.ctypes.data,
            coded.ctypes.data,
            0,
            rows,
            columns,
            None if weights is None else weights.ctypes.data,
        )
        out = np.empty_like(values)
        self._traits(number).contents.to_float(coded.ctypes.data, out.ctypes.data, values.size)
        return out

    def error(self, kind: str, values: F32, scales: F64, power: F64) -> float:
        """Mean square error of the product with inputs of mean square ``power`` [columns], summed over the
        rows, when the columns are multiplied by ``scales`` before they are encoded, and the inputs
        divided."""
        decoded = self.decoded(
            kind, (values * scales).astype(np.float32), (power / scales**2).astype(np.float32)
        )
        return float((np.square(decoded / scales - values) @ power).sum())

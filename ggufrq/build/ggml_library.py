"""The libraries of ggml in a build, loaded into this process, and structs of ggml.h that are read there."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path


class Traits(ctypes.Structure):
    """``ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


#: n, result, its stride, x, its stride, y, its stride, rows at a time
_VEC_DOT = ctypes.CFUNCTYPE(None, c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, c_int)


class CpuTraits(ctypes.Structure):
    """``ggml_type_traits_cpu`` of ggml-cpu.h, as far as it is read here."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("vec_dot", _VEC_DOT),
    )


def library(folder: Path, name: str) -> ctypes.CDLL:
    """A library of a build by its name without ``lib``. Raises OSError when it is not there."""
    for pattern in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"):
        if (folder / pattern).is_file():
            return ctypes.CDLL(str(folder / pattern), mode=ctypes.RTLD_GLOBAL)
    raise OSError(f"{folder} has no library {name}")

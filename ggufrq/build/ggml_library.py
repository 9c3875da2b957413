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
    """A library of a build by its name without ``lib``; of modules for several processors, the one that
    llama.cpp takes here. Raises OSError when it is not there."""
    names = [f"lib{name}.so", f"lib{name}.so.0", f"lib{name}.dylib", f"lib{name}.0.dylib", f"{name}.dll"]
    found = next((folder / file for file in names if (folder / file).is_file()), None)
    if found is None:
        modules = [*folder.glob(f"lib{name}-*.so"), *folder.glob(f"{name}-*.dll")]
        found = max(modules, key=_score, default=None)
    if found is None:
        raise OSError(f"{folder} has no library {name}")
    return ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)


def _score(module: Path) -> int:
    """How well a module suits this processor, 0 where it does not: its own answer."""
    return int(ctypes.CDLL(str(module)).ggml_backend_score())

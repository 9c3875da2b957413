"""The codes and the attention of a build of ggml, computed by its own libraries for seeded data.

Run by itself, ``python -m ggufrq.measure.validate.probe FOLDER TYPE…``, so that a library that aborts takes
nothing with it: prints as JSON what was found, by type. The numpy codec is the specification; the layouts of
ggml's structs are those of ggml.h.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from ggufrq import codec
from ggufrq.build.ggml_library import CpuTraits, Traits, library
from ggufrq.codec.pack import U8, pack
from ggufrq.codec.rotate import SIZES, Family, Mode
from ggufrq.codec.tables import CacheType

F32 = npt.NDArray[np.float32]
_SEED = 20240607
_GGML_F32, _GGML_F16 = 0, 1
#: Error of attention, relative to the output's power, that a right build stays far below (queries are chosen
#: so that int8 holds them exactly) and a centroid that is off by one unit in 128 exceeds.
ATTENTION_LIMIT = 1e-5
#: Relative error of a dot product in float32 whose terms are exact.
DOT_LIMIT = 1e-4
_MEMORY = 64 << 20
#: In the order of the enums of ggml-rq.h.
_FAMILIES = ("planar", "iso", "rotor")
_MODES = ("none", "block", "hadamard", "full")


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """The libraries of a build. Raises OSError when they are not there."""

    def __init__(self, folder: Path) -> None:
        self.base = library(folder, "ggml-base")
        self.cpu = library(folder, "ggml-cpu")
        b, c = self.base, self.cpu
        b.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
        b.ggml_get_type_traits.argtypes = [c_int]
        c.ggml_get_type_traits_cpu.restype = ctypes.POINTER(CpuTraits)
        c.ggml_get_type_traits_cpu.argtypes = [c_int]
        b.ggml_init.restype, b.ggml_init.argtypes = c_void_p, [_InitParams]
        b.ggml_free.restype, b.ggml_free.argtypes = None, [c_void_p]
        b.ggml_new_tensor_4d.restype = c_void_p
        b.ggml_new_tensor_4d.argtypes = [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]
        b.ggml_get_data.restype, b.ggml_get_data.argtypes = c_void_p, [c_void_p]
        b.ggml_flash_attn_ext.restype = c_void_p
        b.ggml_flash_attn_ext.argtypes = [c_void_p] * 5 + [c_float] * 3
        b.ggml_new_graph.restype, b.ggml_new_graph.argtypes = c_void_p, [c_void_p]
        b.ggml_build_forward_expand.restype, b.ggml_build_forward_expand.argtypes = None, [c_void_p, c_void_p]
        c.ggml_graph_compute_with_ctx.restype = c_int
        c.ggml_graph_compute_with_ctx.argtypes = [c_void_p, c_void_p, c_int]
        b.ggml_rq_rotation_matrix.restype = c_bool
        b.ggml_rq_rotation_matrix.argtypes = [c_int, c_int, c_int64, c_void_p]
        c.ggml_cpu_init.restype, c.ggml_cpu_init.argtypes = None, []
        c.ggml_cpu_init()

    def type_name(self, type_id: int) -> str:
        """The name that the build gives a type id."""
        name: bytes | None = self.base.ggml_get_type_traits(type_id).contents.type_name
        return name.decode() if name else ""

    def decode(self, type_id: int, blocks: U8, values: int) -> F32:
        """Blocks as the build reads them."""
        out = np.zeros(values, np.float32)
        self.base.ggml_get_type_traits(type_id).contents.to_float(blocks.ctypes.data, out.ctypes.data, values)
        return out

    def encode(self, type_id: int, x: F32, size: int, *, native: bool) -> U8:
        """Values as the build writes them: by its reference, or by the function that the cache uses."""
        out = np.zeros(size, np.uint8)
        traits = self.cpu.ggml_get_type_traits_cpu if native else self.base.ggml_get_type_traits
        found = traits(type_id).contents
        (found.from_float if native else found.from_float_ref)(x.ctypes.data, out.ctypes.data, x.size)
        return out

    def dot(self, type_id: int, row: U8, q8_0: U8, values: int) -> float:
        """A stored row times a row in q8_0, as attention without a kernel of its own computes it."""
        out = np.zeros(1, np.float32)
        found = self.cpu.ggml_get_type_traits_cpu(type_id).contents
        found.vec_dot(values, out.ctypes.data, 0, row.ctypes.data, 0, q8_0.ctypes.data, 0, 1)
        return float(out[0])

    def rotation(self, family: str, mode: str, n: int) -> F32:
        """A rotation matrix [n, n] as the graph gets it; all NaN when the build refuses."""
        out = np.full((n, n), np.nan, np.float32)
        self.base.ggml_rq_rotation_matrix(_FAMILIES.index(family), _MODES.index(mode), n, out.ctypes.data)
        return out

    def attention(
        self, kind: tuple[int, int], q: F32, k: npt.NDArray[Any], v: npt.NDArray[Any], scale: float
    ) -> F32:
        """Flash attention of the CPU backend: q [queries, n] over ``k`` and ``v`` as stored rows of a block
        in the types in ``kind``; [queries, n]."""
        context = self.base.ggml_init(_InitParams(_MEMORY, None, False))
        try:
            nq, d = q.shape
            rows = len(k)
            tq = self.base.ggml_new_tensor_4d(context, _GGML_F32, d, nq, 1, 1)
            tk = self.base.ggml_new_tensor_4d(context, kind[0], d, rows, 1, 1)
            tv = self.base.ggml_new_tensor_4d(context, kind[1], d, rows, 1, 1)
            for tensor, data in ((tq, q), (tk, k), (tv, v)):
                flat = np.ascontiguousarray(data)
                ctypes.memmove(self.base.ggml_get_data(tensor), flat.ctypes.data, flat.nbytes)
            out = self.base.ggml_flash_attn_ext(context, tq, tk, tv, None, scale, 0.0, 0.0)
            graph = self.base.ggml_new_graph(context)
            self.base.ggml_build_forward_expand(graph, out)
            self.cpu.ggml_graph_compute_with_ctx(context, graph, 1)
            result = np.zeros((nq, d), np.float32)  # one head: [d, 1, nq] lies as [nq, d]
            ctypes.memmove(result.ctypes.data, self.base.ggml_get_data(out), result.nbytes)
            return result
        finally:
            self.base.ggml_free(context)


def probe_type(ggml: Ggml, kind: CacheType) -> list[dict[str, Any]]:
    """Hold one type of a build, or a sibling, against the specification: encoding and decoding bit for bit,
    and attention with K, with V, and with both of that type against float64."""
    rng = np.random.default_rng(_SEED + kind.id)
    found = []
    if ggml.type_name(kind.id) != kind.name:
        found.append(_result("code", False, "the name of the type", ggml.type_name(kind.id), kind.name))
        return found

    blocks = _random_blocks(rng, kind, 512)
    want = codec.dequantize(blocks, kind.bits, block=kind.block).ravel()
    got = ggml.decode(kind.id, blocks, want.size)
    found.append(_same("code", "decoding of 512 random blocks", got, want))
    x = (rng.standard_normal((512, kind.block)) * np.exp2(rng.integers(-8, 9, (512, 1)))).astype(np.float32)
    bytes_wanted = codec.quantize(x, kind.bits, block=kind.block).ravel()
    for native, name in ((False, "encoding"), (True, "the cache's own encoding")):
        coded = ggml.encode(kind.id, x.ravel(), bytes_wanted.size, native=native)
        found.append(_same("code", f"{name} of 512 blocks", coded, bytes_wanted))
    family = cast(Family, kind.family)
    for mode in get_args(Mode) if family else ():
        for n in SIZES:
            want = codec.rotation_matrix(family, mode, n)
            got = ggml.rotation(family, mode, n)
            found.append(
                _same("code", f"the {family} rotation of {n} values, {mode}", got.ravel(), want.ravel())
            )
    return [*found, _probe_dot(ggml, kind, rng), *_probe_attention(ggml, kind, rng)]


def _probe_dot(ggml: Ggml, kind: CacheType, rng: np.random.Generator) -> dict[str, Any]:
    """Dot products with each centroid by itself: rows of one index, against positive int8 values."""
    worst = 0.0
    for index in range(2**kind.bits):
        row = pack(np.ones(1, np.float16), np.full((1, kind.block), index, np.uint8), kind.bits)
        y = rng.integers(1, 128, kind.block).astype(np.int8)
        q8_0 = np.zeros((kind.block // 32, 34), np.uint8)
        q8_0[:, :2] = np.ones(1, "<f2").view(np.uint8)  # a scale of 1
        q8_0[:, 2:] = y.view(np.uint8).reshape(-1, 32)
        want = float(codec.dequantize(row, kind.bits, block=kind.block).astype(np.float64).ravel() @ y)
        worst = max(worst, abs(ggml.dot(kind.id, row, q8_0, kind.block) / want - 1))
    return _result(
        "attention",
        worst < DOT_LIMIT,
        f"dot products of {kind.name} with each centroid by itself",
        f"relative error {worst:.2g}",
        f"below {DOT_LIMIT:g}",
    )


def _probe_attention(ggml: Ggml, kind: CacheType, rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    rows = 192
    stored = [_random_blocks(rng, kind, rows, scale=1.0) for _ in range(2)]
    decoded = [codec.dequantize(b, kind.bits, block=kind.block).astype(np.float64) for b in stored]
    plain = [rng.standard_normal((rows, kind.block)).astype(np.float16) for _ in range(2)]
    for nq, how in ((1, "one query"), (64, "64 queries")):
        q = rng.integers(-127, 128, (nq, kind.block)).astype(np.float32)
        q[:, ::32] = 127  # every block of 32 reaches 127, so that int8 holds the queries exactly
        for name, types, k, v, k64, v64 in (
            ("K", (kind.id, _GGML_F16), stored[0], plain[1], decoded[0], plain[1].astype(np.float64)),
            ("V", (_GGML_F16, kind.id), plain[0], stored[1], plain[0].astype(np.float64), decoded[1]),
            ("K and V", (kind.id, kind.id), stored[0], stored[1], decoded[0], decoded[1]),
        ):
            scores = q.astype(np.float64) @ k64.T
            scale = 1.5 / float(scores.std())
            want64 = _softmax(scores * np.float64(np.float32(scale))) @ v64
            got = ggml.attention(types, q, k, v, scale)
            error = float(((got - want64) ** 2).sum() / (want64**2).sum())
            found.append(
                _result(
                    "attention",
                    bool(error < ATTENTION_LIMIT),
                    f"attention with {name} in {kind.name}, {how}, against float64 on decoded values",
                    f"relative error {error:.2g}",
                    f"below {ATTENTION_LIMIT:g}",
                )
            )
    return found


def _random_blocks(rng: np.random.Generator, kind: CacheType, count: int, scale: float | None = None) -> U8:
    """Blocks with all indices, and scales of both signs of exponent, or about ``scale``."""
    blocks = rng.integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    size = np.exp2(rng.uniform(-8, 8, count)) if scale is None else scale * rng.uniform(0.5, 2, count)
    blocks[:, :2] = size.astype("<f2").view(np.uint8).reshape(count, 2)
    return blocks


def _softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e: npt.NDArray[np.float64] = np.exp(x - x.max(axis=1, keepdims=True))
    e /= e.sum(axis=1, keepdims=True)
    return e


def _same(check: str, what: str, got: npt.NDArray[Any], want: npt.NDArray[Any]) -> dict[str, Any]:
    wrong = int((got.view(np.uint8) != want.view(np.uint8)).reshape(want.size, -1).any(axis=1).sum())
    unit = "bytes" if want.dtype == np.uint8 else "values"
    return _result(check, wrong == 0, what, f"{wrong} of {want.size} {unit} differ", "none differs")


def _result(check: str, ok: bool, what: str, found: str, expected: str) -> dict[str, Any]:
    return {"check": check, "ok": ok, "what": what, "found": found, "expected": expected}


def main(folder: str, *names: str) -> None:
    """Print the results for the types named."""
    ggml = Ggml(Path(folder))
    found = {}
    for kind in map(codec.cache_type, names):
        both = (kind, codec.sibling(kind.bits))
        found[kind.name] = [result for one in both for result in probe_type(ggml, one)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The CUDA kernels, compiled as C++ and run by an emulator of warps (cuda/emulator.h), against the reference.

What a warp makes of its lanes, its byte permutes and its matrix products is checked here bit for bit or to
the rounding of f16; what only a GPU shows (races, speed) is left to scripts/gpu_check.py.
"""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from ggufrq.base import proc
from ggufrq.codec import dequantize, quantize, rotation_matrix, tables
from ggufrq.codec.quant import Scale
from ggufrq.codec.rotate import Family, Mode

pytestmark = pytest.mark.native

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "patches" / "overlay" / "ggml" / "src"
BITS = pytest.mark.parametrize("bits", [2, 3, 4])
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Expected = dict[tuple[str, int], tuple[U8, F32]]

#: ids of ggml types; of ours one per code, the kernels know no families, and the siblings
F16, Q4_0, Q8_0, RQ2, RQ3, RQ4, RQ2_64, RQ3_64, RQ4_64 = 1, 2, 8, 112, 113, 114, 121, 122, 123
BLOCK = pytest.mark.parametrize("block", [128, 64])


class Rows(ctypes.Structure):
    """ggml_cuda_rq_rows."""

    _fields_ = [(name, ctypes.c_int64) for name in ("ne0", "ne1", "ne2", "nb0", "nb1", "nb2", "nb3")]


class Job(ctypes.Structure):
    """ggml_cuda_rq_job."""

    _fields_ = [
        *(("src", ctypes.c_void_p), ("dst", ctypes.c_void_p), ("rows", ctypes.c_int64)),
        *(
            ("family", ctypes.c_int),
            ("mode", ctypes.c_int),
            ("cache", ctypes.c_void_p),
            ("idx", ctypes.c_void_p),
        ),
        *(("nb_cache", ctypes.c_int64), ("nb_idx", ctypes.c_int64), ("units", ctypes.c_uint32 * 3)),
        *(("bits", ctypes.c_int), ("block", ctypes.c_int), ("wide", ctypes.c_bool)),
    ]


class Map(ctypes.Structure):
    """ggml_cuda_rq_map."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("map", "mean", "src", "dst")),
        *(("nb_src", ctypes.c_int64 * 3), ("nb_dst", ctypes.c_int64 * 3), ("store", Job)),
        *(("group", ctypes.c_uint32 * 3), ("tiles", ctypes.c_uint32 * 3)),
        *((name, ctypes.c_int) for name in ("rows", "heads", "n")),
        ("is_f16", ctypes.c_bool),
    ]


class Maps(ctypes.Structure):
    """ggml_cuda_rq_maps."""

    _fields_ = [("map", Map * 3), ("n", ctypes.c_int)]


class Jobs(ctypes.Structure):
    """ggml_cuda_rq_jobs."""

    _fields_ = [("job", Job * 3), ("n", ctypes.c_int), ("scale_kind", ctypes.c_int)]


def _rows(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> Any:
    """Shape [n3, n2, n1, units] and byte strides of the first three, numpy's order."""
    _, n2, n1, n0 = shape
    return ctypes.byref(Rows(n0, n1, n2, unit, strides[2], strides[1], strides[0]))


def _flat(n: int, unit: int) -> Any:
    return _rows((1, 1, 1, n), (n * unit,) * 3, unit)


def _at(a: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def _int64(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


class Kernels:
    """The emulated kernels on numpy arrays."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))

    def quantize(self, x: F32, bits: int, kind: int = 0, block: int = 128) -> U8:
        n, size = x.size // block, tables.code(bits, block).bytes
        out = np.full((n, size), 0xA5, np.uint8)
        here, there = _flat(n, 4 * block), _flat(n, size)
        self.lib.emu_quantize(bits, block, kind, ctypes.c_int64(n), _at(x), _at(out), here, there)
        return out

    def dequantize(
        self, blocks: U8, bits: int, dtype: type[Any] = np.float32, block: int = 128
    ) -> npt.NDArray[Any]:
        n, size = len(blocks), tables.code(bits, block).bytes
        out = np.full((n, block), np.nan, dtype)
        to_f16 = int(dtype is np.float16)
        here, there = _flat(n, size), _flat(n, block * out.itemsize)
        self.lib.emu_dequantize(bits, block, to_f16, ctypes.c_int64(n), _at(blocks), _at(out), here, there)
        return out

    def rotate(self, n: int, *jobs: Job, maps: tuple[Map, ...] = (), scale_kind: int = 0) -> None:
        """One launch for rows of n values, and products with the matrices of a profile."""
        padded = (*jobs, *(Job(),) * (3 - len(jobs)))
        products = Maps((Map * 3)(*maps, *(Map(),) * (3 - len(maps))), len(maps))
        self.lib.emu_rotate(
            n,
            ctypes.byref(products) if maps else None,
            ctypes.byref(Jobs((Job * 3)(*padded), len(jobs), scale_kind)),
        )


def _build(target: Path, sources: Path = SOURCES, *defines: str) -> Kernels:
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler that takes GCC's options")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-Wno-unused-function", *defines]
    include = ["-I", HERE / "cuda" / "shim", "-I", sources / "ggml-cuda", "-I", sources]
    include += ["-I", SOURCES.parent / "include"]
    proc.run([compiler, *flags, *include, HERE / "cuda" / "kernels.cpp", "-o", target])
    return Kernels(target)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return _build(tmp_path_factory.mktemp("cuda") / "kernels.so")


@pytest.fixture(scope="module")
def unfused_rq(build_rq: Any, compiler: str) -> Any:
    """The C code where products and sums are not fused."""
    return build_rq(compiler, "-O2", "-ffp-contract=off")


def _same_bits(a: F32, b: F32) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def _part(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(x[:160])


def test_blocks_bit_for_bit(kernels: Kernels, hard_data: dict[str, F32], expected: Expected) -> None:
    for (name, bits, block), (blocks, values) in expected.items():
        if bits == 5:  # which it has no kernels for
            continue
        n, size = (160, tables.code(bits).bytes) if block == 128 else (161, tables.code(bits, 64).bytes)
        x = np.ascontiguousarray(hard_data[name].reshape(-1, block)[:n])  # an odd one takes half a warp
        blocks = np.ascontiguousarray(blocks.reshape(-1, size)[:n])
        values = np.ascontiguousarray(values.reshape(-1, block)[:n])
        assert np.array_equal(kernels.quantize(x, bits, block=block), blocks), (name, bits, block)
        assert _same_bits(kernels.dequantize(blocks, bits, block=block), values), (name, bits, block)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        got = kernels.dequantize(blocks, bits, np.float16, block)
        assert np.array_equal(got, half), (name, bits, block)


@pytest.mark.parametrize(("kind", "scale"), [(1, "lsq"), (2, "norm")])
def test_other_scales(kernels: Kernels, hard_data: dict[str, F32], kind: int, scale: Scale) -> None:
    for name, x in hard_data.items():
        for block in (128, 64):
            part = np.ascontiguousarray(x.reshape(-1, block)[:24])
            for bits in (2, 3, 4):
                expected = quantize(part, bits, block=block, scale=scale)
                assert np.array_equal(kernels.quantize(part, bits, kind, block), expected), (name, block)


@BITS
@BLOCK
def test_every_index_at_every_place(kernels: Kernels, bits: int, block: int) -> None:
    size = tables.code(bits, block).bytes
    data = np.random.default_rng(3).integers(0, 256, (512, size), dtype=np.uint8)
    data[:, :2] = np.array([0x3C01], np.uint16).view(np.uint8)
    assert _same_bits(kernels.dequantize(data, bits, block=block), dequantize(data, bits, block=block))


@BITS
@pytest.mark.parametrize(("block", "units"), [(128, 2), (64, 3)])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_set_rows_and_get_rows(kernels: Kernels, bits: int, block: int, units: int, index: type[Any]) -> None:
    """Rows of a few blocks, in a tensor with gaps, to places that repeat over the outer dimensions."""
    rng = np.random.default_rng(5)
    size = tables.code(bits, block).bytes
    wide = rng.standard_normal((3, 3, 5, (units + 1) * block)).astype(np.float32)
    x = wide[..., block:]  # rows with a gap before them
    idx = np.stack([rng.permutation(9)[:5] for _ in range(3)]).astype(index).reshape(1, 3, 5)
    out = np.full((3, 3, 9, units * size), 0xA5, np.uint8)

    source = _rows((3, 3, 5, units), x.strides[:3], 4 * block)
    index_strides = _int64(idx.itemsize, idx.strides[1], idx.strides[0])
    strides = _int64(0, out.strides[2], out.strides[1], out.strides[0])
    n = ctypes.c_int64(3 * 3 * 5 * units)
    start = ctypes.c_void_p(wide.ctypes.data + 4 * block)
    sizes = _int64(5, 3, 1)
    is_wide = int(index is np.int64)
    kernels.lib.emu_set_rows(
        bits, block, is_wide, n, start, _at(idx), _at(out), source, sizes, index_strides, strides
    )

    blocks = quantize(np.ascontiguousarray(x), bits, block=block)
    expected = np.full_like(out, 0xA5)
    for i3, i2, i1 in np.ndindex(3, 3, 5):
        expected[i3, i2, idx[0, i2, i1]] = blocks[i3, i2, i1]
    assert np.array_equal(out, expected)

    # get_rows: one index per row of each matrix
    pick = rng.integers(0, 9, (3, 3, 7)).astype(np.int32)
    back = np.full((3, 3, 7, units * block), np.nan, np.float32)
    safe = np.where(expected == 0xA5, 0, expected)
    target = _rows((3, 3, 7, units), back.strides[:3], 4 * block)
    index_strides = _int64(4, pick.strides[1], pick.strides[0])
    n = ctypes.c_int64(3 * 3 * 7 * units)
    kernels.lib.emu_get_rows(bits, block, n, _at(safe), _at(pick), _at(back), target, index_strides, strides)
    values = dequantize(safe, bits, block=block)
    assert _same_bits(back, np.take_along_axis(values, pick[..., None], axis=2))


@BITS
@pytest.mark.parametrize(("block", "units"), [(128, 2), (64, 3)])
def test_copies_of_permuted_rows(kernels: Kernels, bits: int, block: int, units: int) -> None:
    """F32 to blocks, blocks to F32 and blocks to blocks between tensors of other strides."""
    rng = np.random.default_rng(6)
    size, row, shape = tables.code(bits, block).bytes, units * block, (2, 5, 3, units)
    x = rng.standard_normal((2, 3, 5, row)).astype(np.float32).transpose(0, 2, 1, 3)  # [2, 5, 3, row]
    n = ctypes.c_int64(2 * 5 * 3 * units)
    base = x.base
    assert base is not None
    blocks = np.zeros((2, 5, 3, units * size), np.uint8)
    rows = _rows(shape, blocks.strides[:3], size)
    source = _rows(shape, x.strides[:3], 4 * block)
    kernels.lib.emu_quantize(bits, block, 0, n, _at(x), _at(blocks), source, rows)
    assert np.array_equal(blocks, quantize(np.ascontiguousarray(x), bits, block=block))

    moved = np.zeros((5, 2, 3, units * size), np.uint8)
    view = moved.transpose(1, 0, 2, 3)
    there = _rows(shape, view.strides[:3], size)
    kernels.lib.emu_copy(bits, block, n, _at(blocks), _at(moved), rows, there)
    assert np.array_equal(view, blocks)

    back = np.full((2, 5, 3, row), np.nan, np.float32)
    here, there = _rows(shape, view.strides[:3], size), _rows(shape, back.strides[:3], 4 * block)
    kernels.lib.emu_dequantize(bits, block, 0, n, _at(moved), _at(back), here, there)
    assert _same_bits(back, dequantize(blocks, bits, block=block))


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("n", [64, 128, 256])
def test_rotations(kernels: Kernels, unfused_rq: Any, family: Family, mode: Mode, n: int) -> None:
    """The bits of the C code."""
    f, m = get_args(Family).index(family), get_args(Mode).index(mode)
    x = np.random.default_rng(n).standard_normal((5, n)).astype(np.float32)
    y = np.full_like(x, np.nan)
    kernels.rotate(n, Job(src=_at(x), dst=_at(y), rows=len(x), family=f, mode=m))
    assert all(_same_bits(row, unfused_rq.rotate(one, f, m)) for row, one in zip(y, x, strict=True))
    exact = x.astype(np.float64) @ rotation_matrix(family, mode, n)
    assert np.abs(y - exact).max() < 1e-6 * np.linalg.norm(x, axis=1).max()


#: values that are rotated together, of a head and of a block; three heads of 64 are no multiple of 128
@pytest.mark.parametrize(
    ("n", "head", "block"), [(128, 128, 128), (256, 256, 128), (64, 64, 64), (64, 192, 64), (64, 128, 128)]
)
@pytest.mark.parametrize("kind", get_args(Scale))
def test_rotations_and_stores_in_one_launch(
    kernels: Kernels, unfused_rq: Any, n: int, head: int, block: int, kind: Scale
) -> None:
    """Q, K and V of a layer: what three rotations and two stores write, and not a byte beside it."""
    rng = np.random.default_rng(n)
    size = {bits: tables.code(bits, block).bytes for bits in (2, 3, 4)}
    tokens, heads, kv_heads, cells = 3, 5, 3 if head < 128 else 2, 7
    q = rng.standard_normal((tokens * heads * head // n, n)).astype(np.float32)
    k, v = rng.standard_t(2, (2, tokens * kv_heads * head // n, n)).astype(np.float32)
    units = kv_heads * head // block
    for k_bits, v_bits, k_family, v_family in ((3, 3, 1, 1), (4, 2, 0, 2), (2, 4, 2, 0)):
        out = {name: np.full_like(x, np.nan) for name, x in (("q", q), ("v", v))}
        caches = {
            name: np.full((cells, units * size[b] + 6), 0xA5, np.uint8)
            for name, b in (("k", k_bits), ("v", v_bits))
        }
        rows64 = np.array([5, 0, 3], np.int64)
        rows32 = np.array([[2, 99], [6, 99], [4, 99]], np.int32)
        shared = {"rows": len(k), "units": (0, 0, units), "block": block}
        kernels.rotate(
            n,
            Job(src=_at(q), dst=_at(out["q"]), rows=len(q), family=k_family, mode=3),
            Job(  # read by another node, too
                src=_at(v), dst=_at(out["v"]), family=v_family, mode=3, bits=v_bits, cache=_at(caches["v"]),
                nb_cache=caches["v"].strides[0], idx=_at(rows64), nb_idx=8, wide=True, **shared,
            ),
            Job(
                src=_at(k), family=k_family, mode=1, bits=k_bits, cache=_at(caches["k"]),
                nb_cache=caches["k"].strides[0], idx=_at(rows32), nb_idx=8, wide=False, **shared,
            ),
            scale_kind=("inner", "lsq", "norm").index(kind),
        )  # fmt: skip
        turned = {
            name: np.stack([unfused_rq.rotate(row, family, mode) for row in x])
            for name, x, family, mode in (("q", q, k_family, 3), ("k", k, k_family, 1), ("v", v, v_family, 3))
        }
        assert _same_bits(out["q"], turned["q"])
        assert _same_bits(out["v"], turned["v"])
        for name, bits, rows in (("k", k_bits, rows32[:, 0]), ("v", v_bits, rows64)):
            expected = np.full_like(caches[name], 0xA5)
            blocks = quantize(turned[name].reshape(-1, block), bits, block=block, scale=kind)
            expected[rows, : units * size[bits]] = blocks.reshape(tokens, -1)
            assert np.array_equal(caches[name], expected), (name, bits)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize(
    ("n", "head", "block", "bits"),
    [(128, 128, 128, 3), (64, 192, 64, 2), (64, 64, 64, 4), (256, 512, 128, 3)],
)
@pytest.mark.parametrize("half", [True, False])
def test_a_profile_in_one_launch_with_rotations_and_stores(
    kernels: Kernels, unfused_rq: Any, n: int, head: int, block: int, bits: int, tokens: int, half: bool
) -> None:
    """K less its mean and Q by the matrices of the KV heads, V by its rotation; K and V are stored, Q and V
    written."""
    rng = np.random.default_rng(head + tokens)
    heads, group, cells, size = 3 if block == 64 else 2, 2, 9, tables.code(bits, block).bytes
    maps = (rng.standard_normal((2, heads, head, head)) / np.sqrt(head)).astype("f2" if half else "f4")
    mean = rng.standard_normal((heads, head)).astype(np.float32)
    k = (3 * mean + rng.standard_normal((tokens, heads, head))).astype(np.float32)
    q = rng.standard_normal((tokens, heads * group, head)).astype(np.float32)
    v = rng.standard_normal((tokens * heads * head // n, n)).astype(np.float32)
    units = heads * head // block
    rows = rng.permutation(cells)[:tokens].astype(np.int64)
    caches = {name: np.full((cells, units * size + 6), 0xA5, np.uint8) for name in "kv"}
    out_k, out_q, out_v = (np.full_like(x, np.nan) for x in (k, q, v))
    out_q = out_q.reshape(heads, group, tokens, head)
    target = {
        name: {
            "bits": bits, "block": block, "cache": _at(cache), "nb_cache": cache.strides[0],
            "idx": _at(rows), "nb_idx": 8, "wide": True, "units": (0, 0, units),
        }
        for name, cache in caches.items()
    }  # fmt: skip
    kernels.rotate(
        n,
        Job(src=_at(v), dst=_at(out_v), rows=len(v), family=1, mode=3, **target["v"]),
        maps=(
            Map(  # its result is read by another node, as it is behind a CONT
                map=_at(maps[0]), mean=_at(mean), src=_at(k), dst=_at(out_k), nb_src=(heads * head, 0, head),
                nb_dst=(heads * head, 0, head), store=Job(**target["k"]), group=(0, 0, 1),
                tiles=(0, 0, -(-tokens // 4)), rows=tokens, heads=heads, n=head, is_f16=half,
            ),
            Map(
                map=_at(maps[1]), src=_at(q), dst=_at(out_q),
                nb_src=(heads * group * head, head, group * head),
                nb_dst=(head, tokens * head, group * tokens * head), group=(0, 0, group),
                tiles=(0, 0, -(-tokens * group // 4)), rows=tokens * group, heads=heads, n=head, is_f16=half,
            ),
        ),
    )  # fmt: skip
    exact = maps.astype(np.float64)
    want_k = np.einsum("hij,thj->thi", exact[0], k - mean)
    want_q = np.einsum("hij,thgj->hgti", exact[1], q.reshape(tokens, heads, group, head))
    assert np.abs(out_k - want_k).max() < 1e-5 * np.abs(want_k).max()
    assert np.abs(out_q - want_q).max() < 1e-5 * np.abs(want_q).max()
    turned = np.stack([unfused_rq.rotate(row, 1, 3) for row in v])
    assert _same_bits(out_v, turned)
    for name, values in (("k", out_k), ("v", turned)):
        expected = np.full_like(caches[name], 0xA5)
        blocks = quantize(values.reshape(-1, block), bits, block=block)
        expected[rows, : units * size] = blocks.reshape(tokens, -1)
        assert np.array_equal(caches[name], expected), name


@pytest.mark.parametrize(("dim", "n"), [(128, 128), (256, 256), (256, 128), (64, 64), (192, 64)])
@pytest.mark.parametrize("parts", [1, 3, 33, 70])
@pytest.mark.parametrize("family", [None, *get_args(Family)])
def test_parts_of_attention_are_combined_and_rotated(
    kernels: Kernels, dim: int, n: int, parts: int, family: Family | None
) -> None:
    rng = np.random.default_rng(n + parts)
    values = rng.standard_normal((5, parts, dim)).astype(np.float32)
    meta = np.stack([5 * rng.standard_normal((5, parts)), rng.uniform(0.1, 9, (5, parts))], -1).astype(
        np.float32
    )
    meta[1, 0] = (-1e38, 0)  # of a part that saw no row
    out = np.full((5, dim), np.nan, np.float32)
    f = -1 if family is None else get_args(Family).index(family)
    kernels.lib.emu_combine(dim, n, _at(values), _at(meta), _at(out), ctypes.c_int64(5), parts, f, 3)

    expected = values[:, 0].astype(np.float64)
    if parts > 1:
        weight = np.exp(meta[..., 0].astype(np.float64) - meta[..., 0].max(1, keepdims=True))
        expected = np.einsum("rp,rpn->rn", weight, values) / (weight * meta[..., 1]).sum(1, keepdims=True)
    if family is not None:
        expected = (expected.reshape(5, -1, n) @ rotation_matrix(family, "full", n)).reshape(5, dim)
    assert np.abs(out - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("tiles", [1, 4, 8, 40, 100, 528, 600, 5000])
@pytest.mark.parametrize("passes", [1, 2, 64, 1024])
def test_the_rows_are_split_so_that_the_card_is_full(kernels: Kernels, tiles: int, passes: int) -> None:
    """On a card with 132 multiprocessors of four CUDA blocks."""
    places = 528

    def full(parts: int) -> float:
        return tiles * parts / (-(-tiles * parts // places) * places)

    parts = kernels.lib.emu_parts(*map(ctypes.c_int64, (tiles, places, passes)))
    assert 1 <= parts <= passes
    fewer = [n for n in range(1, passes + 1) if tiles * n <= 4 * places] or [1]
    assert full(parts) >= min(0.95, max(map(full, fewer))) - 1e-9
    assert tiles * parts <= 8 * places or parts == 1


@BITS
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_the_vector_kernel_asks_of_a_type(kernels: Kernels, bits: int, head_dim: int) -> None:
    """Products with a query in q8_1 by 2, 4 and 32 or 16 lanes (AMD and NVIDIA); values in f32 and f16."""
    rng = np.random.default_rng(bits * head_dim)
    block = min(head_dim, 128)
    kernels.lib.emu_vec_dot.restype = ctypes.c_float
    for _ in range(20):
        row = quantize(rng.standard_t(3, head_dim).astype(np.float32), bits, block=block)
        values = dequantize(row, bits, block=block)
        q = rng.integers(-127, 128, head_dim).astype(np.int8)
        scales = rng.uniform(0.5, 2.0, head_dim // 32).astype(np.float32)
        terms = values.astype(np.float64) * q * np.repeat(scales, 32)
        for lanes in (2, 4, 32):
            dot = kernels.lib.emu_vec_dot(bits, head_dim, lanes, _at(row), _at(q), _at(scales))
            assert abs(dot - terms.sum()) <= 1e-6 * np.abs(terms).sum()

        f32, f16 = np.full(head_dim, np.nan, np.float32), np.full(head_dim, np.nan, np.float16)
        kernels.lib.emu_vec_dequantize(bits, block, ctypes.c_int64(head_dim), _at(row), _at(f32), _at(f16))
        assert _same_bits(f32, values)
        assert np.array_equal(f16, values.astype(np.float16))


def test_what_is_written_otherwise_for_amd(
    tmp_path: Path, hard_data: dict[str, F32], expected: Expected
) -> None:
    """Bytes are picked by another instruction there."""
    kernels = _build(tmp_path / "amd.so", SOURCES, "-DGGML_USE_HIP")
    test_blocks_bit_for_bit(kernels, hard_data, expected)
    for bits in (2, 3, 4):
        for head_dim in (64, 128):
            test_what_the_vector_kernel_asks_of_a_type(kernels, bits, head_dim)


# ---- attention ----


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("queries", "heads", "kv", "heads_kv", "sequences")),
        ("nb_q", ctypes.c_int32 * 3),
        ("nb_k", ctypes.c_int32 * 2),
        ("nb_k3", ctypes.c_int64),
        ("nb_v", ctypes.c_int32 * 2),
        ("nb_v3", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("mask_sequences", "nb_mask", "parts")),
        *((name, ctypes.c_float) for name in ("scale", "max_bias", "softcap")),
    ]


class _Recent(ctypes.Structure):
    """ggml_cuda_rq_recent."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "k_new", "v_new", "mask")),
        *((name, ctypes.c_int32) for name in ("n_held", "n", "parts", "nb_mask")),
        ("nb_mask3", ctypes.c_int64),
        *((f"nb_{name}", ctypes.c_int64 * 3) for name in ("k", "v", "k_new", "v_new")),
    ]


@dataclass
class Case:
    """One call of the attention kernel."""

    type_k: int = RQ3
    type_v: int = RQ3
    dim: int = 128  # of K and the queries
    dim_v: int = 0  # of V, where it is another
    queries: int = 1
    heads: int = 8
    heads_kv: int = 2
    kv: int = 113
    sequences: int = 1
    parts: int = 1
    mask: str = "causal"
    max_bias: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    spread: float = 1.0
    outlier: float = 1.0  # factor of one value of the queries
    rows_v: float = 0.0  # rows of V are of so many different sizes, as the standard deviation of a logarithm
    kv_max: int = 0  # rows from there on are known to be masked
    held: int = 0  # recent rows that were kept in f16
    fresh: int = 0  # recent rows of this batch, in f32


def _encode(x: npt.NDArray[np.float64], kind: int) -> tuple[U8, npt.NDArray[np.float64]]:
    """x [..., dim] as bytes of that type and what they mean."""
    if kind == F16:
        half = x.astype(np.float16)
        return half.view(np.uint8), half.astype(np.float64)
    if kind == Q8_0:
        groups = x.reshape(*x.shape[:-1], -1, 32)
        d = (np.abs(groups).max(axis=-1) / 127).astype(np.float16)
        q = np.rint(groups / np.maximum(d, np.float16(1e-6))[..., None].astype(np.float64))
        q = np.clip(q, -128, 127).astype(np.int8)
        raw = np.concatenate([d[..., None].view(np.uint8), q.view(np.uint8)], axis=-1)
        return raw.reshape(*x.shape[:-1], -1), (q * d[..., None].astype(np.float64)).reshape(x.shape)
    if kind == Q4_0:
        groups = x.reshape(*x.shape[:-1], -1, 32)
        d = (np.abs(groups).max(axis=-1) / 8).astype(np.float16)
        n = np.clip(np.rint(groups / d[..., None].astype(np.float64)) + 8, 0, 15).astype(np.uint8)
        nibbles = n[..., :16] | n[..., 16:] << 4
        raw = np.concatenate([d[..., None].view(np.uint8), nibbles], axis=-1)
        return raw.reshape(*x.shape[:-1], -1), ((n - 8.0) * d[..., None].astype(np.float64)).reshape(x.shape)
    bits, block = (kind - RQ2 + 2, 128) if kind < RQ2_64 else (kind - RQ2_64 + 2, 64)
    blocks = quantize(x.astype(np.float32), bits, block=block)
    return blocks, dequantize(blocks, bits, block=block).astype(np.float64)


def _mask(case: Case, rng: np.random.Generator) -> npt.NDArray[np.float16] | None:
    """[sequences, queries, kv], 0 or the distance where a query sees a row, else -inf."""
    if case.mask == "none":
        return None
    query = case.kv - case.queries + np.arange(case.queries)[:, None]
    distance = query - np.arange(case.kv)[None, :]
    seen = distance >= 0
    if case.mask == "window":
        seen &= distance < 20
    if case.mask == "gap":  # whole passes that nobody sees, at the start, in the middle and at the end
        row = np.arange(case.kv)[None, :]
        seen &= (row > 200) & ((row < 400) | (row > 700)) & (row < case.kv - 150)
    values = np.where(seen, -distance if case.max_bias else 0.25 * rng.standard_normal(seen.shape), -np.inf)
    return np.broadcast_to(values, (case.sequences, *seen.shape)).astype(np.float16)


@dataclass
class RecentRows:
    """Rows as they were before quantization: what the kernel gets, and what is right."""

    arrays: dict[str, npt.NDArray[Any]]
    mask: npt.NDArray[np.float16]  # [sequences, queries, rows], wider than the rows are many
    k: npt.NDArray[np.float64]  # [sequences, rows, heads_kv, dim]
    v: npt.NDArray[np.float64]

    @classmethod
    def of(cls, case: Case, rng: np.random.Generator) -> RecentRows:
        arrays: dict[str, npt.NDArray[Any]] = {}
        exact = []
        for name, dim, size, shift in (
            ("k", case.dim, case.spread, 0.0),
            ("v", case.dim_v or case.dim, 1.0, 0.5),
        ):
            # of each stream a row is of none of these tokens; heads side by side
            shape = (case.sequences, case.held + 1 + case.fresh, case.heads_kv, dim)
            drawn = size * rng.standard_normal(shape) + shift
            held, fresh = (
                drawn[:, : case.held + 1].astype(np.float16),
                drawn[:, case.held + 1 :].astype(np.float32),
            )
            arrays |= {name: held, f"{name}_new": fresh}
            rows = [held[:, : case.held], fresh.astype(np.float16)]
            exact.append(np.concatenate(rows, axis=1).astype(np.float64))
        n = case.held + case.fresh
        seen = rng.random((case.sequences, case.queries, n)) < 0.7
        seen[:, :, case.held :] &= np.arange(case.fresh) <= np.arange(case.queries)[:, None]
        near = -rng.integers(0, 30, seen.shape) if case.max_bias else 0.25 * rng.standard_normal(seen.shape)
        mask = np.full(
            (case.sequences, case.queries, n + 7), np.nan
        )  # what is behind the rows is not looked at
        mask[:, :, :n] = np.where(seen, near, -np.inf)
        return cls(arrays, mask.astype(np.float16), exact[0], exact[1])

    def call(self, case: Case) -> _Recent:
        n = case.held + case.fresh
        strides = {
            f"nb_{name}": (ctypes.c_int64 * 3)(*(a.strides[i] for i in (1, 2, 0)))
            for name, a in self.arrays.items()
        }
        return _Recent(
            **{name: _at(a) for name, a in self.arrays.items()}, mask=_at(self.mask),
            n_held=case.held, n=n,
            nb_mask=self.mask.strides[1], nb_mask3=self.mask.strides[0], **strides,
        )  # fmt: skip


def _run(kernels: Kernels, case: Case) -> tuple[F32, npt.NDArray[np.float64]]:
    """What the kernel gives and what is right, [sequences, queries, heads, dim]."""
    rng = np.random.default_rng(11)
    dim_v = case.dim_v or case.dim
    shape = (case.sequences, case.kv, case.heads_kv, case.dim)  # as a cache has it: heads side by side
    k_bytes, k = _encode(rng.standard_normal(shape) * case.spread, case.type_k)
    sizes = np.exp(case.rows_v * rng.standard_normal((*shape[:3], 1)))
    v_bytes, v = _encode(sizes * (rng.standard_normal((*shape[:3], dim_v)) + 0.5), case.type_v)
    q = (case.spread * rng.standard_normal((case.sequences, case.queries, case.heads, case.dim))).astype(
        np.float32
    )
    q[..., 3] *= case.outlier
    mask = _mask(case, rng)
    sinks = (2 * rng.standard_normal(case.heads)).astype(np.float32) if case.sinks else None
    # caches start where an aligned buffer does, heads anywhere in it; nothing may be read behind it
    buffers = []
    for raw in (k_bytes, v_bytes):
        buffer = np.zeros(raw.nbytes + 144, np.uint8)
        at = -buffer.ctypes.data % 128
        held = buffer[at : at + raw.nbytes].reshape(raw.shape)
        held[:] = raw
        buffers.append(held)
    k_held, v_held = buffers

    call = _Attention(
        case.queries, case.heads, case.kv, case.heads_kv, case.sequences,
        (q.strides[1], q.strides[2], q.strides[0]),
        (k_held.strides[1], k_held.strides[2]), k_held.strides[0],
        (v_held.strides[1], v_held.strides[2]), v_held.strides[0],
        case.sequences, case.kv * 2, case.parts,
        case.dim**-0.5, case.max_bias, case.softcap,
    )  # fmt: skip
    out = np.full((case.sequences, case.queries, case.heads, dim_v), np.nan, np.float32)
    held_mask = None if mask is None else np.ascontiguousarray(mask)
    kv_max = np.full(case.sequences * case.queries, case.kv_max, np.int32) if case.kv_max else None
    recent = RecentRows.of(case, rng) if case.held + case.fresh else None
    recent_call = None if recent is None else recent.call(case)
    rows = (ctypes.c_int32 * 2)()
    kernels.lib.emu_attention(
        case.dim, dim_v, case.type_k, case.type_v, ctypes.byref(call), _at(q), _at(k_held), _at(v_held),
        None if held_mask is None else _at(held_mask), None if sinks is None else _at(sinks),
        None if kv_max is None else _at(kv_max),
        None if recent_call is None else ctypes.byref(recent_call), _at(out), rows,
    )  # fmt: skip
    # that a CUDA block takes at once, recent ones sixteen for each warp, or each two that share a row
    assert rows[0] in ((32, 64) if dim_v > 256 else (64, 128, 256))
    assert rows[1] == (32 if dim_v > 256 else 64)

    group = case.heads // case.heads_kv
    if recent is not None:
        k, v = np.concatenate([k, recent.k], axis=1), np.concatenate([v, recent.v], axis=1)
        whole = np.zeros((case.sequences, case.queries, k.shape[1]), np.float16)
        whole[:, :, : case.kv] = 0 if mask is None else mask
        whole[:, :, case.kv :] = recent.mask[:, :, : case.held + case.fresh]
        mask = whole
    k, v = (np.repeat(a, group, axis=2) for a in (k, v))
    scores = np.einsum("sqhd,skhd->sqhk", q.astype(np.float64), k) * case.dim**-0.5
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if case.kv_max:
        scores[..., case.kv_max : case.kv] = -np.inf
    if mask is not None:
        slopes = np.ones(case.heads)
        if case.max_bias:
            n = 2 ** int(np.log2(case.heads))
            m0, m1 = 2 ** (-case.max_bias / n), 2 ** (-case.max_bias / 2 / n)
            slopes = np.array(
                [m0 ** (h + 1) if h < n else m1 ** (2 * (h - n) + 1) for h in range(case.heads)]
            )
        scores = scores + slopes[:, None] * mask[:, :, None, :].astype(np.float64)
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None].astype(np.float64), (*scores.shape[:3], 1))
        scores = np.concatenate([scores, column], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return out, np.einsum("sqhk,skhd->sqhd", weights[..., : k.shape[1]], v)


def _error(kernels: Kernels, case: Case) -> float:
    out, right = _run(kernels, case)
    assert np.isfinite(out).all()
    return float(np.abs(out - right).max() / np.abs(right).max())


WIDE, NARROW = (RQ2, RQ3, RQ4), (RQ2_64, RQ3_64, RQ4_64)


def _pairs(ours_k: tuple[int, ...], ours_v: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(k, v) for k in (*ours_k, F16, Q8_0) for v in (*ours_v, F16, Q8_0) if k in ours_k or v in ours_v]


PAIRS = [(k, v, dim, dim) for k, v in _pairs(WIDE, WIDE) for dim in (128, 256, 512)]
PAIRS += [(k, v, 64, 64) for k, v in _pairs(NARROW, NARROW)]
PAIRS += [(k, v, 192, 128) for k, v in _pairs(NARROW, WIDE)]
PAIRS += [(kind, kind, *dims) for kind in NARROW for dims in ((576, 512), (320, 256))]  # MLA
PAIRS += [(k, v, 320, 256) for k, v in zip(NARROW, WIDE, strict=True)]

#: of the largest value; queries and weights have 15 bits, or those of f16 where K or V does
TOLERANCE = 5e-4


@pytest.mark.parametrize(("type_k", "type_v", "dim", "dim_v"), PAIRS)
def test_attention_of_every_pair(kernels: Kernels, type_k: int, type_v: int, dim: int, dim_v: int) -> None:
    assert _error(kernels, Case(type_k, type_v, dim, dim_v, queries=3, kv=330)) < TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        Case(heads=2, heads_kv=2, queries=9),  # no groups: eight queries share a CUDA block
        Case(heads=4, heads_kv=2, queries=5),
        Case(heads=9, heads_kv=3, queries=3),  # groups that leave columns idle
        Case(heads=12, heads_kv=2, queries=2),
        Case(heads=24, heads_kv=2, queries=1),  # two CUDA blocks per KV head
        Case(heads=5, heads_kv=1, dim=256, kv=97),  # odd strides: every row starts elsewhere
        Case(heads=7, heads_kv=7, kv=33, type_k=RQ2, type_v=RQ4),
        Case(kv=1),
        Case(kv=64, mask="none"),
        Case(kv=1500),
        Case(kv=1000, parts=3),
        Case(kv=1000, parts=5, mask="gap", queries=2),
        Case(kv=1000, parts=2, mask="gap", dim=256, type_k=RQ4, type_v=RQ4),
        Case(kv=300, mask="window", queries=4),
        Case(kv=512, kv_max=256, mask="none", sequences=2, heads=8, heads_kv=1),
        Case(sequences=3, queries=2, kv=70),
        Case(heads=12, heads_kv=3, max_bias=8.0, kv=200, queries=2),
        Case(softcap=5.0, spread=2.0),
        Case(softcap=20.0, dim=256, queries=2),
        Case(sinks=True, parts=2, kv=600),
        Case(sinks=True, kv=40),
        Case(spread=4.0, kv=700, parts=2),  # sharp: most rows of V have no weight
        Case(spread=0.01, kv=900),  # flat: sums of many small weights
        Case(RQ3_64, RQ3_64, 64, heads=9, heads_kv=3, kv=97),  # odd strides, as SmolLM2 has them
        Case(RQ2_64, RQ4_64, 64, heads=6, heads_kv=6, queries=9, kv=1000, parts=3, mask="gap"),
        Case(RQ4_64, Q8_0, 64, heads=12, heads_kv=3, max_bias=8.0, kv=200, queries=2, sequences=2),
        Case(RQ3_64, RQ3_64, 64, softcap=5.0, spread=2.0, sinks=True, kv=70),
        Case(RQ3_64, RQ3, 192, 128, heads=16, heads_kv=1, kv=600, parts=2, sinks=True),
        Case(RQ2_64, RQ4, 192, 128, heads=3, heads_kv=3, queries=4, kv=300, mask="window"),
        Case(F16, RQ3, 192, 128, heads=8, heads_kv=1, kv=70, sequences=2),
        # two warps share a row: groups of Gemma 4 and others, passes of one pair alone, odd strides
        Case(dim=512, heads=16, heads_kv=2, kv=300, mask="window", queries=2),
        Case(dim=512, heads=2, heads_kv=2, queries=9, kv=33),
        Case(dim=512, heads=5, heads_kv=1, kv=97),
        Case(dim=512, heads=24, heads_kv=2, kv=1, type_k=RQ2, type_v=RQ4),
        Case(dim=512, kv=600, parts=3, mask="gap", queries=2, type_k=RQ4, type_v=RQ3),
        Case(dim=512, kv=512, kv_max=256, mask="none", sequences=2, heads=8, heads_kv=1),
        Case(dim=512, heads=12, heads_kv=3, max_bias=8.0, kv=130, queries=2, sequences=2, type_v=Q8_0),
        Case(dim=512, softcap=20.0, sinks=True, kv=70, type_k=F16),
        Case(dim=512, spread=4.0, kv=500, parts=2),
        Case(dim=512, kv=300, rows_v=2.5, outlier=20.0),
        Case(RQ3_64, RQ3, 320, 256, heads=32, heads_kv=1, kv=130, sinks=True, parts=2),
        Case(RQ3_64, RQ3_64, 576, 512, heads=20, heads_kv=1, kv=300, mask="window", queries=2),
        Case(RQ4_64, RQ4_64, 576, 512, heads=5, heads_kv=1, kv=97, parts=2, sequences=2, outlier=20.0),
        Case(RQ3_64, RQ3_64, 320, 256, heads=32, heads_kv=1, kv=97, parts=2, sequences=2, sinks=True),
    ],
    ids=str,
)
def test_attention_shapes_and_flags(kernels: Kernels, case: Case) -> None:
    assert _error(kernels, case) < TOLERANCE


#: kernels that there are for recent rows alone
ALIKE = [(kind, kind, dim, dim) for kind in (Q8_0, Q4_0) for dim in (64, 128, 256, 512)]


@pytest.mark.parametrize(("type_k", "type_v", "dim", "dim_v"), [*PAIRS, *ALIKE])
def test_recent_rows_beside_every_pair(
    kernels: Kernels, type_k: int, type_v: int, dim: int, dim_v: int
) -> None:
    case = Case(type_k, type_v, dim, dim_v, queries=2, heads=4, heads_kv=1, kv=70, held=33, fresh=2)
    assert _error(kernels, case) < TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        Case(held=33, fresh=1),
        Case(RQ3_64, RQ3_64, 64, heads=4, heads_kv=2, queries=2, kv=90, held=33, fresh=2),
        Case(RQ4_64, RQ3, 192, dim_v=128, heads=8, heads_kv=1, kv=90, held=40, fresh=1),
        Case(Q4_0, Q4_0, 64, heads=4, heads_kv=2, kv=90, held=40, fresh=1),
        Case(held=1, fresh=1, kv=1),
        Case(held=0, fresh=5, queries=5, kv=200),
        Case(heads=2, heads_kv=2, queries=9, held=34, fresh=9),
        Case(heads=9, heads_kv=3, queries=3, held=20, fresh=3),
        Case(heads=24, heads_kv=2, held=65, fresh=1),  # two parts of recent rows
        Case(heads=5, heads_kv=1, dim=256, kv=97, held=130, fresh=1),
        Case(held=1025, fresh=2, queries=2, heads_kv=4, kv=40),
        Case(Q4_0, Q4_0, heads=5, heads_kv=1, kv=300, parts=2, held=1024, fresh=1),
        Case(kv=600, parts=3, mask="gap", queries=2, held=33, fresh=2),
        Case(kv=300, mask="window", queries=4, held=40, fresh=4),
        Case(kv=64, mask="none", held=33, fresh=1),
        Case(sequences=3, queries=2, kv=70, held=33, fresh=2),
        Case(heads=12, heads_kv=3, max_bias=8.0, kv=200, queries=2, held=17, fresh=2),
        Case(softcap=5.0, spread=2.0, held=33, fresh=1),
        Case(sinks=True, parts=2, kv=600, held=33, fresh=1),
        Case(spread=4.0, kv=300, held=33, fresh=1),  # sharp
        Case(spread=0.01, kv=900, held=33, fresh=1),  # flat
        Case(RQ3_64, RQ3_64, 64, heads=9, heads_kv=3, kv=97, held=33, fresh=1),
        Case(RQ3_64, RQ3, 192, 128, heads=8, heads_kv=1, kv=70, held=65, fresh=2, queries=2),
        Case(dim=512, heads=16, heads_kv=2, kv=200, mask="window", held=65, fresh=2, queries=2),
        Case(dim=512, heads=5, heads_kv=1, kv=97, held=130, fresh=1, sequences=2),
        Case(RQ2, RQ4, 512, heads=2, heads_kv=2, kv=300, parts=2, held=1, fresh=9, queries=9, sinks=True),
        Case(dim=512, max_bias=8.0, softcap=20.0, held=33, fresh=1, type_v=F16),
        Case(RQ3_64, RQ3_64, 576, 512, heads=20, heads_kv=1, kv=97, held=65, fresh=2, queries=2),
    ],
    ids=str,
)
def test_recent_rows_with_shapes_and_flags(kernels: Kernels, case: Case) -> None:
    assert _error(kernels, case) < TOLERANCE


class _Queries(ctypes.Structure):
    """ggml_cuda_rq_queries."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("nb", ctypes.c_int64 * 3),
        *((name, ctypes.c_uint32 * 3) for name in ("heads", "n", "group")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "max_bias", "m0", "m1")),
        ("n_head_log2", ctypes.c_uint32),
    ]


@pytest.mark.parametrize(
    "case",
    [
        Case(held=33, fresh=1),
        Case(dim=256, heads=6, heads_kv=3, queries=2, held=9, fresh=2, sequences=2),
        Case(dim=64, heads=3, heads_kv=3, queries=1, held=20, fresh=1),
        Case(heads=12, heads_kv=3, max_bias=8.0, queries=2, held=70, fresh=2),
        Case(softcap=5.0, spread=2.0, held=5, fresh=1),
    ],
    ids=str,
)
def test_recent_rows_where_parts_are_put_together(kernels: Kernels, case: Case) -> None:
    """For upstream's vector kernel: parts of rows of the cache, each as if it were one row of its weight."""
    rng = np.random.default_rng(12)
    recent, parts = RecentRows.of(case, rng), 3
    shape = (case.sequences, case.queries, case.heads)
    q = (case.spread * rng.standard_normal((*shape, case.dim))).astype(np.float32)
    values = rng.standard_normal((*shape, parts, case.dim)).astype(np.float32)
    meta = np.stack([rng.standard_normal((*shape, parts)), np.ones((*shape, parts))], -1).astype(np.float32)
    meta[0, 0, 0] = (-1e38, 0)  # no row of the cache is seen
    values[0, 0, 0] = 0
    out = np.full((*shape, case.dim), np.nan, np.float32)
    n_log2 = 2 ** int(np.log2(case.heads))
    m0, m1 = 2 ** (-case.max_bias / n_log2), 2 ** (-case.max_bias / 2 / n_log2)
    scale = case.dim**-0.5
    queries = _Queries(
        _at(q), (ctypes.c_int64 * 3)(q.strides[1], q.strides[2], q.strides[0]),
        *((ctypes.c_uint32 * 3)(0, 0, n) for n in (case.heads, case.queries, case.heads // case.heads_kv)),
        scale / (case.softcap or 1), case.softcap, case.max_bias, m0, m1, n_log2,
    )  # fmt: skip
    kernels.lib.emu_combine_recent(
        case.dim, _at(values), _at(meta), _at(out), ctypes.c_int64(int(np.prod(shape))), parts,
        ctypes.byref(queries), ctypes.byref(recent.call(case)),
    )  # fmt: skip

    group = case.heads // case.heads_kv
    k, v = np.repeat(recent.k, group, axis=2), np.repeat(recent.v, group, axis=2)
    scores = np.einsum("sqhd,skhd->sqhk", q.astype(np.float64), k) * scale
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    h = np.arange(case.heads)
    slopes = (
        np.where(h < n_log2, m0 ** (h + 1.0), m1 ** (2.0 * (h - n_log2) + 1)) if case.max_bias else 1 + 0 * h
    )
    mask = recent.mask[:, :, None, : case.held + case.fresh].astype(np.float64)
    scores = np.concatenate([meta[..., 0].astype(np.float64), scores + slopes[:, None] * mask], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights[..., :parts] *= meta[..., 1]
    weights /= weights.sum(axis=-1, keepdims=True)
    right = np.einsum("sqhk,skhd->sqhd", weights[..., parts:], v)
    right += np.einsum("sqhp,sqhpd->sqhd", weights[..., :parts], values.astype(np.float64))
    assert np.abs(out - right).max() < 1e-5 * np.abs(right).max()


class _Gather(ctypes.Structure):
    _fields_ = [
        ("dst", ctypes.c_void_p),
        ("src", ctypes.c_void_p * 3),
        ("nb", ctypes.c_int64 * 3 * 3),
        ("end", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("first", "rows", "dim", "heads", "sequences")),
    ]


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("converted", [False, True])
def test_recent_rows_are_put_behind_the_cache(kernels: Kernels, dim: int, converted: bool) -> None:
    """For upstream's kernels: f16 rows of the cache, or those that something else has converted; rows that
    were held; rows of this batch, rounded; zeros."""
    rng = np.random.default_rng(dim)
    sequences, heads, counts, total = 2, 3, (11, 5, 4), 32
    sources = [
        rng.standard_normal((sequences, n + 2, heads, dim)).astype(np.float32 if i == 2 else np.float16)
        for i, n in enumerate(counts)
    ]  # rows behind each that are not wanted
    sources[2][0, 0, 0, :2] = 1 + 2**-11, 7e4  # to even, and beyond f16
    out = np.full((sequences, total, heads, dim), 0.5, np.float16)
    ends = np.cumsum(counts)
    strides = [(ctypes.c_int64 * 3)(*(a.strides[i] for i in (1, 2, 0))) for a in sources]
    call = _Gather(
        _at(out), (ctypes.c_void_p * 3)(*(a.ctypes.data for a in sources)),
        (ctypes.c_int64 * 3 * 3)(*strides),
        (ctypes.c_int32 * 3)(*ends), counts[0] if converted else 0, total, dim, heads, sequences,
    )  # fmt: skip
    kernels.lib.emu_gather(ctypes.byref(call))
    with np.errstate(over="ignore"):
        parts = [a[:, :n].astype(np.float16) for a, n in zip(sources, counts, strict=True)]
    expected = np.concatenate(
        [*parts, np.zeros((sequences, total - ends[-1], heads, dim), np.float16)], axis=1
    )
    if converted:
        expected[:, : counts[0]] = 0.5
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("type_v", [RQ3, RQ4, Q8_0, RQ3_64])
@pytest.mark.parametrize("kv", [60, 900])
def test_rows_of_v_may_differ_in_size(kernels: Kernels, type_v: int, kv: int) -> None:
    """Weights share their units with all of a pass: what is small there must not matter."""
    dim, type_k = (64, RQ3_64) if type_v in NARROW else (128, RQ3)
    assert _error(kernels, Case(type_k, type_v, dim, kv=kv, rows_v=2.5, spread=1.5)) < TOLERANCE


@pytest.mark.parametrize("type_k", [RQ3, Q8_0, RQ3_64])
def test_scores_keep_fifteen_bits_of_the_query(kernels: Kernels, type_k: int) -> None:
    """A query with an outlier of a hundred times the rest: in a plain int8 query that would be lost."""
    dim, dim_v = (192, 128) if type_k in NARROW else (128, 128)
    assert _error(kernels, Case(type_k, RQ3, dim, dim_v, kv=200, outlier=100.0)) < 5 * TOLERANCE


MUTATIONS = [
    ("rq-device.cuh", "h |= __shfl_xor_sync(0xFFFFFFFF, h, lanes/2, WARP_SIZE) << 1;", ""),
    ("rq-device.cuh", "w >> (N == 128 ? 2 : 1)), 0, 0x", "0), 0, 0x"),
    ("rq-device.cuh", "w >> (N == 128 ? 2 : 1)) & 0x55555555", "0) & 0x55555555"),
    ("rq-fattn-kv.cuh", "n[r][0] = code::word(row[r], g);", "n[r][0] = code::word(row[r], g % 4);"),
    ("rq-fattn-kv.cuh", "prmt(m[0], m[1], 0x5140)", "prmt(m[1], m[0], 0x5140)"),
    ("rq-fattn-kv.cuh", "sum.x[l] *= 256;", "sum.x[l] = 0;"),
    ("rq-fattn-kv.cuh", "^ 0x80808080", ""),
    ("rq-fattn.cuh", "s[i/16][i/8%2*2 + c]", "s[i/16][c*2 + i/8%2]"),
    # the case below has recent rows
    ("rq-fattn.cuh", "(row - n_held)*nb_fresh", "row*nb_fresh"),
    ("rq-fattn.cuh", "head_kv*recent.nb_v[1]", "0*recent.nb_v[1]"),
    ("rq-fattn.cuh", "if constexpr (!scaled)", "if constexpr (scaled)"),
    ("rq-fattn.cuh", "(is_recent ? recent.nb_mask : nb31)", "nb31"),
    ("rq-fattn.cuh", "const int step = parts*", "const int step = gridDim.y*"),
    # two warps share a row
    ("rq-fattn.cuh", "fa::teams*GGML_CUDA_RQ_FA_RECENT_ROWS };", "4*GGML_CUDA_RQ_FA_RECENT_ROWS };"),
    ("rq-fattn.cuh", "__barrier_sync_count(1 + id, 2*WARP_SIZE); //", "//"),
    ("rq-fattn.cuh", "__barrier_sync_count(1 + id, 2*WARP_SIZE);\n#else", "#else"),
    ("rq-fattn.cuh", "part*VC::row_bytes(fa::dim_v)", "0*part"),
    ("rq-fattn.cuh", "q_all += part*fa::words_half;", ""),
    ("rq-fattn.cuh", "tiles + (warp ^ 1)*fa::words_recent", "tiles + warp*fa::words_recent"),
    ("rq-fattn.cuh", "part*DV        *(int) sizeof(half)", "0*part"),
    ("rq-fattn.cuh", "s[i][l] += other[l];", "(void) other[l];"),
    ("rq-fattn.cuh", "part*KC::row_bytes(fa::next_k)", "0*part"),
    ("rq-fattn.cuh", "i < n ? 0.0f : v[i/32]", "v[i/32]"),
    ("rq-fattn.cuh", "part*fa::next_k*(int) sizeof(half)", "0*part"),
    ("rq-fattn.cuh", "(part == 0 ? words_tiles : -words_tiles)", "0"),
]


def _is_wrong(kernels: Kernels, case: Case) -> bool:
    try:
        return _error(kernels, case) > 5 * TOLERANCE
    except AssertionError:  # no numbers, or other rows in a pass
        return True


@pytest.mark.thorough  # compiles the kernels for each
@pytest.mark.parametrize(("file", "old", "new"), MUTATIONS, ids=[m[1][:40] for m in MUTATIONS])
def test_a_planted_mistake_is_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    path = sources / "ggml-cuda" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    wrong = _build(tmp_path / "wrong.so", sources)
    x = np.random.default_rng(1).standard_normal((16, 128)).astype(np.float32)
    blocks = quantize(x, 3)
    same = np.array_equal(wrong.quantize(x, 3), blocks) and _same_bits(
        wrong.dequantize(blocks, 3), dequantize(blocks, 3)
    )
    cases = [
        Case(queries=2, kv=700, outlier=20.0, held=33, fresh=2),
        Case(RQ3_64, RQ3_64, 64, queries=2, kv=150),
        Case(dim=512, kv=150),
        Case(RQ3_64, RQ3_64, 576, 512, kv=97, held=33, fresh=2),
    ]
    assert not same or any(_is_wrong(wrong, case) for case in cases)

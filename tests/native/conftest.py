"""Our C sources as a shared library of their own, called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ggufrq.base import proc
from ggufrq.codec import dequantize, quantize, tables

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "patches" / "overlay" / "ggml" / "src"

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def _pointer(a: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> ctypes.c_void_p:
    assert a.flags.c_contiguous
    return ctypes.c_void_p(a.ctypes.data)


def _code(bits: int, block: int) -> str:
    """As the code is called in C."""
    return f"rq{bits}" if block == 128 else f"rq{bits}_{block}"


class Rq:
    """The functions of ggml-rq.h on numpy arrays."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.ggml_rq_rotation_matrix.restype = ctypes.c_bool
        self.lib.ggml_rq_rotate_row.restype = ctypes.c_bool

    def quantize(self, x: F32, bits: int, block: int = 128) -> U8:
        """quantize_row_rqN_ref of x [..., n]."""
        out = np.full(x.size // block * tables.code(bits, block).bytes, 0xA5, np.uint8)
        function = getattr(self.lib, f"quantize_row_{_code(bits, block)}_ref")
        function(_pointer(x), _pointer(out), ctypes.c_int64(x.size))
        return out.reshape(*x.shape[:-1], -1)

    def dequantize(self, blocks: U8, bits: int, block: int = 128) -> F32:
        """dequantize_row_rqN of blocks [..., bytes]."""
        out = np.full(blocks.size // tables.code(bits, block).bytes * block, np.nan, np.float32)
        function = getattr(self.lib, f"dequantize_row_{_code(bits, block)}")
        function(_pointer(blocks), _pointer(out), ctypes.c_int64(out.size))
        return out.reshape(*blocks.shape[:-1], -1)

    def matrix(self, family: int, mode: int, n: int) -> F32 | None:
        """ggml_rq_rotation_matrix, None where it refuses."""
        out = np.full((max(n, 0), max(n, 0)), np.nan, np.float32)
        ok = self.lib.ggml_rq_rotation_matrix(family, mode, ctypes.c_int64(n), _pointer(out))
        return out if ok else None

    def rotate(self, x: F32, family: int, mode: int, *, in_place: bool = False) -> F32 | None:
        """ggml_rq_rotate_row of x [n], None where it refuses."""
        source = x.copy()
        out = source if in_place else np.full_like(x, np.nan)
        size = ctypes.c_int64(x.size)
        ok = self.lib.ggml_rq_rotate_row(family, mode, _pointer(source), _pointer(out), size)
        return out if ok else None


def compile_c(target: Path, compiler: str, flags: Sequence[str], sources: Path, *more: Path | str) -> Path:
    """Compile ggml-rq.c in `sources` and more files with the stand-ins of shim/ into target."""
    include = ("-I", HERE / "shim", "-I", sources)
    strict = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-unused-function")
    proc.run([compiler, *strict, *flags, *include, sources / "ggml-rq.c", *more, "-o", target, "-lm"])
    return target


@pytest.fixture(scope="session")
def compiler() -> str:
    """The system's C compiler."""
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return name
    pytest.skip("no C compiler that takes GCC's options")


@pytest.fixture(scope="session")
def build_rq(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rq]:
    """build_rq(compiler, *flags, sources=SOURCES): compile and load."""

    def build(compiler: str, *flags: str, sources: Path = SOURCES) -> Rq:
        target = tmp_path_factory.mktemp("rq") / "rq.so"
        # its own functions, not those of a libggml-base that other tests have loaded for all to see
        own = ("-Wl,-Bsymbolic",) if sys.platform == "linux" else ()
        return Rq(compile_c(target, compiler, ("-shared", "-fPIC", *own, *flags), sources))

    return build


@pytest.fixture(scope="session")
def load_rq() -> Callable[[Path], Rq]:
    """Load a library that holds the functions of ggml-rq.h."""
    return Rq


@pytest.fixture(scope="session")
def rq(compiler: str, build_rq: Callable[..., Rq]) -> Rq:
    """The library with the flags of a release build."""
    return build_rq(compiler, "-O3")


def _thresholds(bits: int, rng: np.random.Generator) -> F32:
    """Blocks on and next to the borders between centroids, for scales of every size."""
    m = np.array(tables.code(bits).magnitudes, np.float64)
    points = np.concatenate([m, (m[1:] + m[:-1]) / 2, [m[-1] * 1.05, m[-1] * 1.5, m[0] / 2]])
    scale = 2.0 ** rng.uniform(-30, 9, (2048, 1)) * np.where(rng.random((2048, 1)) < 0.5, 1, 1 / 128)
    x = (rng.choice(points, (2048, 128)) * scale * rng.choice([-1, 1], (2048, 128))).astype(np.float32)
    steps = rng.integers(-2, 3, x.shape)
    return (x.view(np.int32) + steps.astype(np.int32)).view(np.float32)


@pytest.fixture(scope="session")
def hard_data() -> dict[str, F32]:
    """Over four million values by kind, each [blocks, 128]."""
    rng = np.random.default_rng(20260613)
    n = 4096

    def normal(rows: int = n) -> npt.NDArray[np.float64]:
        return rng.standard_normal((rows, 128))

    few = rng.random((n, 128)) < 0.05
    odd = [np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, 1e-45, -1e-40, 3e38, 65504, 64992.25, -64993]
    special = np.array(odd)
    one_word = rng.integers(0, 2**32, (n, 1), dtype=np.uint32)
    data = {
        "gaussian": normal(8192),
        "log-normal channels": normal() * np.exp(1.5 * rng.standard_normal((1, 128))),
        "log-normal blocks": normal() * np.exp(6 * rng.standard_normal((n, 1))),
        "outliers": normal() * np.where(few, 100, 1),
        "student t": rng.standard_t(1.5, (n, 128)),
        "uniform": rng.uniform(-1, 1, (n, 128)),
        "sparse": np.where(few, normal(), -0.0),
        "one value": np.where(np.arange(128) == rng.integers(0, 128, (n, 1)), normal(), 0),
        "constant": np.repeat(rng.standard_normal((512, 1)), 128, 1) * 2.0 ** rng.integers(-40, 20, (512, 1)),
        "two constants": rng.choice([1.0, -0.3], (n, 128)) * rng.uniform(0, 9, (n, 1)),
        "powers of two": 2.0 ** rng.integers(-10, 1, (n, 128)),
        "zero": np.zeros((16, 128)) * np.where(rng.random((16, 128)) < 0.5, -1, 1),
        "near the smallest": normal() * 2.0 ** rng.uniform(-28, -20, (n, 1)),
        "denormal": normal() * 1e-40,
        "huge": normal() * 10.0 ** rng.uniform(3.5, 5.5, (n, 1)),
        "special values": np.where(few, rng.choice(special, (n, 128)), normal()),
        "only special values": rng.choice(special, (n, 128)),
        "integers": rng.integers(-8, 9, (n, 128)),
    }
    found = {k: v.astype(np.float32) for k, v in data.items()}
    found["bit patterns"] = rng.integers(0, 2**32, (8192, 128), dtype=np.uint32).view(np.float32)
    found["one bit pattern"] = np.repeat(one_word, 128, 1).view(np.float32)
    # exponents below that of infinity, near each other: real blocks of any size
    exponent = rng.integers(1, 255, (n, 1)) - rng.integers(0, 12, (n, 128))
    words = (np.maximum(exponent, 0) << 23 | rng.integers(0, 2**23, (n, 128))).astype(np.uint32)
    found["any exponent"] = (words | rng.integers(0, 2, (n, 128), dtype=np.uint32) << 31).view(np.float32)
    for bits in (2, 3, 4, 5):
        found[f"thresholds at {bits} bits"] = _thresholds(bits, rng)
    # every float32 that may decide whether a block is zero
    edge = (np.arange(-512, 512, dtype=np.int32) + np.int32(0x33800000)).view(np.float32)
    found["smallest"] = np.repeat(edge[:, None], 128, 1)
    return {k: np.ascontiguousarray(v) for k, v in found.items()}


@pytest.fixture(scope="session")
def expected(hard_data: dict[str, F32]) -> dict[tuple[str, int, int], tuple[U8, F32]]:
    """Blocks and decoded values of the numpy reference, by kind of data, bits and values of a block (of those
    of 64 and of 5 bits for the first thousand rows)."""
    found = {}
    for name, x in hard_data.items():
        for block, bits in product((128, 64), (2, 3, 4, 5)):
            part = x if block == 128 and bits < 5 else x[:1024]
            with np.errstate(invalid="raise", divide="raise", over="raise"):
                blocks = quantize(part, bits, block=block)
                found[name, bits, block] = blocks, dequantize(blocks, bits, block=block)
    return found

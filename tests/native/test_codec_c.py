"""The C codes and rotations against the numpy reference, bit for bit, and under the sanitizers."""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufrq.base import proc
from ggufrq.base.errors import ToolError
from ggufrq.codec import dequantize, quantize, rotation_matrix, tables
from ggufrq.codec.quant import Scale
from ggufrq.codec.rotate import Family, Mode

if TYPE_CHECKING:
    from ggufrq.build.project import Build

pytestmark = pytest.mark.native

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "patches" / "overlay" / "ggml" / "src"
COMPILERS = [c for c in ("gcc", "clang") if shutil.which(c)]
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5])
BLOCK = pytest.mark.parametrize("block", [128, 64])
F32 = npt.NDArray[np.float32]
Expected = dict[tuple[str, int, int], tuple[npt.NDArray[np.uint8], F32]]


def same_bits(a: F32, b: F32) -> bool:
    """Equal with -0.0 and NaN told apart."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def differing(library: Any, data: dict[str, F32], expected: Expected) -> list[tuple[str, int, int]]:
    """Kinds of data, bits and values of a block for which the library's blocks or values are not those of the
    reference."""
    return [
        (name, bits, block)
        for (name, bits, block), (blocks, values) in expected.items()
        if not np.array_equal(library.quantize(data[name][: len(blocks)], bits, block), blocks)
        or not same_bits(library.dequantize(blocks, bits, block), values)
    ]


def test_bit_for_bit(rq: Any, hard_data: dict[str, F32], expected: Expected) -> None:
    assert sum(x.size for x in hard_data.values()) > 4_000_000
    assert differing(rq, hard_data, expected) == []
    for (name, *_), (blocks, values) in expected.items():
        assert np.isfinite(values).all()
        assert blocks.any() == (name not in {"zero", "denormal"})


def test_names_of_scales(rq: Any) -> None:
    """Those of the reference, in the order of its numbers; nothing and "" are the first."""
    name, from_name = rq.lib.ggml_rq_scale_name, rq.lib.ggml_rq_scale_from_name
    name.restype, from_name.restype = ctypes.c_char_p, ctypes.c_bool
    names = get_args(Scale)
    assert [name(i).decode() for i in range(len(names))] == list(names)
    for text, expected in [(n.encode(), i) for i, n in enumerate(names)] + [(None, 0), (b"", 0)]:
        found = ctypes.c_int(-1)
        assert from_name(text, ctypes.byref(found))
        assert found.value == expected
    assert not from_name(b"ful", ctypes.byref(ctypes.c_int()))


def test_an_unknown_scale_is_inner(
    build_rq: Callable[..., Any], hard_data: dict[str, F32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp refuses it where a model is loaded; who comes here without gets the default."""
    monkeypatch.setenv("LLAMA_RQ_SCALE", "ful")
    library = build_rq(COMPILERS[0], "-O2")
    x = hard_data["gaussian"][:300]
    assert np.array_equal(library.quantize(x, 3), quantize(x, 3, scale="inner"))


@BITS
@BLOCK
@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=128),
    floats=st.lists(st.floats(width=32), min_size=1, max_size=128),
)
def test_generated_values(rq: Any, bits: int, block: int, words: list[int], floats: list[float]) -> None:
    patterns = np.resize(np.array(words, np.uint32), 128).view(np.float32)
    values = np.resize(np.array(floats, np.float32), 128)
    x = np.stack([patterns, values, np.sort(values)])
    expected = quantize(x, bits, block=block)
    assert np.array_equal(rq.quantize(x, bits, block), expected)
    assert same_bits(rq.dequantize(expected, bits, block), dequantize(expected, bits, block=block))


@BITS
@BLOCK
def test_every_byte_decodes(rq: Any, bits: int, block: int) -> None:
    """All values of every byte, and every scale that is a number, also those that no encoder writes."""
    size = tables.code(bits, block).bytes
    data = np.random.default_rng(3).integers(0, 256, (256 * 62, size), dtype=np.uint8)
    for column in range(2, size):
        data[np.arange(256) + 256 * (column % 62), column] = np.arange(256)
    scales = np.arange(len(data), dtype=np.uint16) * 2
    data[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    assert same_bits(rq.dequantize(data, bits, block), dequantize(data, bits, block=block))


@pytest.mark.parametrize("flags", ["-O2", "-O3 -march=native"])
@pytest.mark.parametrize("scale", ["lsq", "norm"])
def test_other_scales(
    build_rq: Callable[..., Any],
    hard_data: dict[str, F32],
    monkeypatch: pytest.MonkeyPatch,
    scale: Scale,
    flags: str,
) -> None:
    """LLAMA_RQ_SCALE, which a library reads once."""
    monkeypatch.setenv("LLAMA_RQ_SCALE", scale)
    library = build_rq(COMPILERS[0], *flags.split())
    for name, x in hard_data.items():
        part = x[:300]
        for bits, block in product((2, 3, 4, 5), (128, 64)):
            wanted = quantize(part, bits, scale=scale, block=block)
            assert np.array_equal(library.quantize(part, bits, block), wanted), name


@pytest.mark.parametrize(
    "flags", ["-O0", "-O1", "-O2", "-O3", "-O3 -march=native", "-O2 -march=native -ffp-contract=off", "-Os"]
)
@pytest.mark.parametrize("other_compiler", COMPILERS)
def test_all_compilers_agree(
    build_rq: Callable[..., Any],
    rq: Any,
    hard_data: dict[str, F32],
    expected: Expected,
    other_compiler: str,
    flags: str,
) -> None:
    other = build_rq(other_compiler, *flags.split())
    assert differing(other, hard_data, expected) == []
    for family in range(3):
        for mode in range(4):
            for n in (64, 256):
                assert same_bits(other.matrix(family, mode, n), rq.matrix(family, mode, n))


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("n", [64, 128, 256])
def test_rotations(rq: Any, family: Family, mode: Mode, n: int) -> None:
    f, m = get_args(Family).index(family), get_args(Mode).index(mode)
    dense = rotation_matrix(family, mode, n)
    assert same_bits(rq.matrix(f, m, n), dense)
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
        y = rq.rotate(x, f, m)
        exact = dense.astype(np.float64) @ x
        assert np.abs(y - exact).max() < 1e-6 * np.linalg.norm(x)
        assert same_bits(rq.rotate(x, f, m, in_place=True), y)


def test_rotations_refuse(rq: Any) -> None:
    wrong = (
        (-1, 1, 128),
        (3, 1, 128),
        (0, -1, 128),
        (0, 4, 128),
        (0, 1, 32),
        (0, 1, 0),
        (0, 1, 192),
        (0, 1, 384),
    )
    for family, mode, n in wrong:
        assert rq.matrix(family, mode, n) is None
        assert rq.rotate(np.zeros(n, np.float32), family, mode) is None


def test_sanitizers(compiler: str, tmp_path: Path) -> None:
    sources = ["-I", HERE / "shim", "-I", SOURCES, SOURCES / "ggml-rq.c", HERE / "rq_random.c", "-lm"]
    checks = "address,undefined,float-cast-overflow,float-divide-by-zero"
    sanitize = ["-O1", "-g", f"-fsanitize={checks}", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    try:
        proc.run([compiler, *sanitize, probe, "-o", tmp_path / "probe"])
    except ToolError:
        pytest.skip(f"{compiler} has no sanitizers")
    proc.run([compiler, "-std=c11", *sanitize, *sources, "-o", tmp_path / "checked"])
    proc.run([compiler, "-std=c11", "-O3", *sources, "-o", tmp_path / "plain"])
    # ASan's leak check needs ptrace, which containers forbid; the buffers are the point here
    checked = proc.run([tmp_path / "checked", "4000"], env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert checked.stdout == proc.run([tmp_path / "plain", "4000"]).stdout
    assert len(checked.stdout.strip()) == 16


MUTATIONS = [
    ("ggml-rq-tables.h", "#define GGML_RQ3_STEP2 48", "#define GGML_RQ3_STEP2 47"),
    ("ggml-rq-tables.h", "58, 75, 96, 127", "58, 75, 95, 127"),
    ("ggml-rq-tables.h", "59, 124, 206", "59, 125, 206"),
    ("ggml-rq-tables.h", "84, 96, 114", "84, 96, 115"),
    ("ggml-rq.c", "(idx[j + b*(n/8)] >> low) << b", "(idx[j + b*(n/8)] >> low) << (7 - b)"),
    ("ggml-rq.c", "(idx[j] & 15) | idx[j + n/2] << 4", "(idx[j + n/2] & 15) | idx[j] << 4"),
    ("ggml-rq.c", "q[j] >> 4) & 3", "q[j] >> 6) & 3"),
    ("ggml-rq-tables.h", "90, 105, 127", "90, 104, 127"),
    ("ggml-rq.c", "#define RQ_LOW(bits) ((bits) < 4 ? 2 : 4)", "#define RQ_LOW(bits) ((bits) != 4 ? 2 : 4)"),
    ("ggml-rq.c", "best = gain > best ? gain : best", "best = gain"),
    ("ggml-rq.c", "#define RQ_BITS_MIN 0x33800000", "#define RQ_BITS_MIN 0x33800001"),
    ("ggml-rq.c", "#define RQ_BITS_MAX 0x477de040", "#define RQ_BITS_MAX 0x477fe000"),
    ("ggml-rq.c", "RQ_QUANTIZE_ROW(3_64, QK_RQ_64, 3)", "RQ_QUANTIZE_ROW(3_64, QK_RQ, 3)"),
]


@pytest.mark.parametrize(("file", "old", "new"), MUTATIONS, ids=[m[2] for m in MUTATIONS])
def test_a_planted_mistake_is_found(
    compiler: str,
    build_rq: Callable[..., Any],
    hard_data: dict[str, F32],
    expected: Expected,
    tmp_path: Path,
    file: str,
    old: str,
    new: str,
) -> None:
    for name in ("ggml-rq.c", "ggml-rq.h", "ggml-rq-blocks.h", "ggml-rq-tables.h"):
        shutil.copy(SOURCES / name, tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, new))
    wrong = build_rq(compiler, "-O2", sources=tmp_path)
    assert differing(wrong, hard_data, expected)


@pytest.mark.build
def test_built_library_is_bit_for_bit(
    llama_build: Build, hard_data: dict[str, F32], expected: Expected, load_rq: Callable[..., Any]
) -> None:
    """The same through llama.cpp's own headers, flags and fp16 conversion."""
    suffix = {"Darwin": "dylib", "Windows": "dll"}.get(platform.system(), "so")
    built = load_rq(next(iter(sorted(llama_build.bin.glob(f"*ggml-base*.{suffix}")))))
    assert differing(built, hard_data, expected) == []
    for f, family in enumerate(get_args(Family)):
        for m, mode in enumerate(get_args(Mode)):
            assert same_bits(built.matrix(f, m, 256), rotation_matrix(family, mode, 256))

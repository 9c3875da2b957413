"""The kernel of ggufrq.mlx on this machine, in a signature as mlx writes it, against the numpy reference."""

from __future__ import annotations

from pathlib import Path

import msl
import numpy as np
import pytest
from fake_metal import HERE, compiler

from ggufrq.base import proc
from ggufrq.codec import dequantize, quantize, tables

pytestmark = [pytest.mark.native, pytest.mark.slow]

SOURCE = HERE.parents[1] / "ggufrq" / "mlx" / "decode.metal"
NAMES = ("DK", "DV", "HEADS", "SHARE", "PARTS", "K_BITS", "K_BLOCK", "V_BITS", "V_BLOCK")
#: dim of K and V, heads, those that share one of K, parts, bits of K and V.
CASES = {
    "k3v3": (128, 128, 4, 2, 3, 3, 3),
    "k4v2": (256, 128, 2, 1, 1, 4, 2),
    "k2v4_64": (64, 192, 6, 3, 4, 2, 4),
    "k3v3_64": (64, 64, 2, 2, 2, 3, 3),
    "k5v5_64": (128, 64, 2, 2, 2, 5, 5),
}
SIGNATURE = """
template <{template}>
kernel void decode(
        const device float * q,
        const device uchar * k,
        const constant int64_t * k_strides,
        const device uchar * v,
        const constant int64_t * v_strides,
        const constant int * places,
        const device float * k_centroids,
        const device float * v_centroids,
        device float * values,
        device float * sums,
        uint3 thread_position_in_grid [[thread_position_in_grid]],
        uint thread_index_in_simdgroup [[thread_index_in_simdgroup]]) {{
{body}
}}
{instances}
"""


def block_of(dim: int) -> int:
    return 128 if dim % 128 == 0 else 64


def template(name: str) -> tuple[int, ...]:
    dk, dv, heads, share, parts, k_bits, v_bits = CASES[name]
    return dk, dv, heads, share, parts, k_bits, block_of(dk), v_bits, block_of(dv)


@pytest.fixture(scope="module")
def program(clang: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    header, _, body = SOURCE.read_text(encoding="utf-8").partition("// body\n")
    instances = []
    for name in CASES:
        of = f"decode<{', '.join(map(str, template(name)))}>"
        instances.append(f"typedef decltype({of}) {name}_t;")
        instances.append(f'template [[host_name("{name}")]] kernel {name}_t {of};')
    said = SIGNATURE.format(
        template=", ".join(f"int {name}" for name in NAMES), body=body, instances="\n".join(instances)
    )
    source = "using namespace metal;\n" + header + said
    kernels = msl.compile_kernels(clang, msl.translate(source, "mlx", bool), folder / "mlx.o")
    hosts = [HERE / "run_kernel.cpp", HERE / "shim" / "kernels.cpp", HERE / "shim" / "lanes.cpp"]
    flags = ["-std=c++17", "-O1", "-Wno-deprecated-declarations", f"-I{HERE}"]
    proc.run([compiler(), *flags, *hosts, kernels, "-o", folder / "run"])
    return folder / "run"


@pytest.mark.parametrize("name", CASES)
def test_one_query_over_blocks(program: Path, name: str, tmp_path: Path) -> None:
    """Two sequences, blocks with room behind them, a range of the cells."""
    dk, dv, heads, share, parts, k_bits, v_bits = CASES[name]
    batch, room, used = 2, 40, (3, 32)
    rng = np.random.default_rng(len(name))
    q = rng.standard_normal((batch * heads, dk)).astype(np.float32) * dk**-0.5
    sides = []
    for dim, bits in ((dk, k_bits), (dv, v_bits)):
        x = rng.standard_normal((batch, heads // share, room, dim)).astype(np.float32)
        blocks = quantize(x, bits, block=block_of(dim))
        table = np.zeros(32, np.float32)
        centroids = tables.code(bits, block_of(dim)).centroids
        table[: len(centroids)] = centroids
        sides.append(
            (blocks, np.array(blocks.strides, np.int64), table, dequantize(blocks, bits, block=block_of(dim)))
        )
    values = np.full((batch * heads, parts, dv), np.nan, np.float32)
    sums = np.full((batch * heads, parts, 2), np.nan, np.float32)
    (k, k_strides, k_table, k_plain), (v, v_strides, v_table, v_plain) = sides
    given = [q, k, k_strides, v, v_strides, np.array(used, np.int32), k_table, v_table, values, sums]
    files = [tmp_path / str(i) for i in range(len(given))]
    for path, array in zip(files, given, strict=True):
        path.write_bytes(array.tobytes())
    proc.run([program, name, "1", str(batch * heads), str(parts), "32", "1", "1", *files])
    values = np.fromfile(files[-2], np.float32).reshape(values.shape)
    sums = np.fromfile(files[-1], np.float32).reshape(sums.shape)

    weights = np.exp(sums[..., 0] - sums[..., 0].max(axis=1, keepdims=True))
    found = (weights[..., None] * values).sum(axis=1) / (weights * sums[..., 1]).sum(axis=1)[:, None]
    seen = slice(*used)
    for row in range(batch * heads):
        of = row // heads, row % heads // share
        scores = k_plain[of][seen] @ q[row]
        exact = np.exp(scores - scores.max())
        np.testing.assert_allclose(found[row], exact / exact.sum() @ v_plain[of][seen], atol=2e-6)

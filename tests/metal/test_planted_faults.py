"""Each kernel with a fault in it: the comparisons must see it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_metal import Driver, Harness, in_parallel

pytestmark = [pytest.mark.build, pytest.mark.slow]


@dataclass(frozen=True)
class Fault:
    what: str
    library: str
    right: str
    wrong: str
    kernel: str  # a pattern in the names of those that are compiled
    command: tuple[str | int, ...]


SET, GET, CPY = (("set_rows", "iso3", 1, 20), ("get_rows", "iso3", 1, 20), ("cpy", "iso3", 1, 20))
VEC = ("flash_attn", "iso3", "iso3", 128, 1, 10)
STORE = ("store", "iso3", 1, 20)
RECENT = ("recent", "iso3", "iso3", 128, 1, 20)
ROWS = "rq_kv_rq3|rq_behind|rq_recent"
FAULTS = [
    Fault(
        "decode: low plane",
        "rq",
        "(2*(i/(N/16)))) & 0x03030303;\n        const uint high",
        "(2*(i/(N/8)))) & 0x03030303;\n        const uint high",
        "_rq3",
        GET,
    ),
    Fault(
        "decode: high plane",
        "rq",
        ">> (i/(N/32)))     & 0x01010101",
        ">> (i/(N/16)))     & 0x01010101",
        "_rq3",
        GET,
    ),
    Fault(
        "decode: bytes of the high plane",
        "rq",
        "xb->qh + 4*(i % (N/32))",
        "xb->qh + 4*(i % (N/64))",
        "_rq3",
        GET,
    ),
    Fault(
        "decode: centroid",
        "rq",
        "ggml_rq3_centroids[4], ggml_rq3_centroids[5]",
        "ggml_rq3_centroids[5], ggml_rq3_centroids[4]",
        "_rq3",
        CPY,
    ),
    Fault(
        "decode: plane at 4 bits",
        "rq",
        "(4*(i/(N/8)))",
        "(4*(i/(N/16)))",
        "_rq4",
        ("get_rows", "iso4", 1, 20),
    ),
    Fault(
        "decode: sign at 2 bits", "rq", "& 1 ? -c : c", "& 1 ? c : -c", "_rq2", ("get_rows", "iso2", 1, 20)
    ),
    Fault("encode: threshold", "rq", ">> 12, 32767u", ">> 11, 32767u", "set_rows", SET),
    Fault(
        "encode: centroid",
        "rq",
        "_centroids[HALF + level]",
        "_centroids[HALF + level - (level > 2)]",
        "set_rows",
        SET,
    ),
    Fault(
        "encode: plane",
        "rq",
        "(enc.index(j + 2*n) & 3) << 4",
        "(enc.index(j + 2*n) & 3) << 6",
        "set_rows",
        SET,
    ),
    Fault(
        "encode: high plane", "rq", "enc.index(j + n*b) >> 2", "enc.index(j + n/2*b) >> 2", "set_rows", SET
    ),
    Fault(
        "encode: rounding of the scale",
        "rq",
        "rest == half_way && (m & 1)",
        "rest == half_way",
        "set_rows",
        ("set_rows", "iso3", 1, 150),
    ),
    Fault(
        "encode: NaN",
        "rq",
        "v > RQ_BITS_INF ? 0 :",
        "v > RQ_BITS_INF ? v :",
        "set_rows",
        ("set_rows", "iso3", 1, 60),
    ),
    Fault("store: mean", "rq", "in[i] - mean[part*n4 + i]", "in[i] - mean[i]", "rq_store_rq3", STORE),
    Fault("store: matrix", "rq", "(uint64_t) part*args.map_part/4", "0", "rq_store_rq3", STORE),
    Fault("store: part of a row", "rq", "args.nb1) + part*nb;", "args.nb1);", "rq_store_rq3", STORE),
    Fault("store: result", "rq", "token*args.n_part + part)", "part)", "rq_store_rq3", STORE),
    Fault("set_rows: block", "rq", "SIZE*ib, y[ib]", "SIZE*(ib/2), y[ib]", "set_rows", SET),
    Fault("get_rows: block", "rq", "x + i/n, i%", "x + (i + 1)/n, i%", "get_rows", GET),
    Fault("cpy: block", "rq", "x + at.i/n", "x + (at.i + 1)/n", "cpy", CPY),
    Fault("cpy: encoded block", "rq", "x + rq_code<block_q>::SIZE*at.i, y[at.i]", "x, y[at.i]", "cpy", CPY),
    Fault("f16 copy: block", "rq", "SIZE/16)*to + k", "SIZE/16)*(to/2) + k", "kv_rq3", VEC),
    Fault(
        "f16 copy: heads with recent rows behind them",
        "rq",
        "*args.rows + i1)*nb",
        "*args.ne1 + i1)*nb",
        ROWS,
        RECENT,
    ),
    Fault("recent rows: place", "rq", "args.first + row)", "args.first + row/2)", ROWS, RECENT),
    Fault(
        "recent rows: zeros behind them",
        "rq",
        "(half4) 0.0h",
        "(half4) as_type<half>((ushort) 0x7e00)",
        ROWS,
        RECENT,
    ),
    Fault(
        "recent rows: those of the batch",
        "rq",
        "(row - n_held)*nb.fresh[0]",
        "0*nb.fresh[0]",
        ROWS,
        RECENT,
    ),
    Fault("recent rows: ALiBi", "rq", "s += slope*(float) m;", "s += (float) m;", ROWS, RECENT),
    Fault("recent rows: capped scores", "rq", "logit_softcap != 0.0f", "logit_softcap < 0", ROWS, RECENT),
    Fault(
        "recent rows: group of heads",
        "rq",
        "ikv = i2/args.group",
        "ikv = i2/args.group*0",
        ROWS,
        RECENT,
    ),
    Fault(
        "recent rows: sum of the cache's parts",
        "rq",
        "part[0]*exp(part[1] - m_all)",
        "part[0]",
        ROWS,
        RECENT,
    ),
    Fault("recent rows: maximum", "rq", "s_cache *= exp(m_cache - m_all);", "", ROWS, RECENT),
    Fault("recent rows: stream", "rq", "(i3%args.ne_mask3)", "0", ROWS, RECENT),
    Fault(
        "vector attention: block",
        "fa_vec_rq",
        "SIZE/4, dequantize_rq_t4, block_v",
        "SIZE/8, dequantize_rq_t4, block_v",
        "rq3_dk128_dv128",
        VEC,
    ),
    Fault(
        "vector attention: plane of V",
        "fa_vec_rq",
        "xb->qs + 4*(i % (N/16))) >> (2*(i/(N/16)))",
        "xb->qs + 4*(i % (N/16))) >> (2*(i/(N/8)))",
        "rq3_dk128_dv128",
        VEC,
    ),
    Fault(
        "matrix attention: block",
        "fa_rq",
        "SIZE/16, dequantize_rq, block_v",
        "SIZE/32, dequantize_rq, block_v",
        "rq3_dk128",
        VEC,
    ),
    Fault(
        "vector attention: blocks of V beside a K in blocks of 64",
        "fa_vec_rq",
        "dequantize_rq_t4, block_v, rq_code<block_v>",
        "dequantize_rq_t4, block_v, rq_code<block_k>",
        "rq3_64_dk192",
        ("flash_attn", "rq3_64", "iso3", "192/128", 1, 10),
    ),
    Fault(
        "matrix attention: centroid",
        "fa_rq",
        "ggml_rq3_centroids[6], ggml_rq3_centroids[7]",
        "ggml_rq3_centroids[7], ggml_rq3_centroids[6]",
        "rq3_dk128",
        VEC,
    ),
]


@pytest.fixture(scope="module")
def faulty(harness: Harness) -> dict[str, Driver]:
    """A driver per fault."""

    def make(number: int, fault: Fault) -> Driver:
        source = harness.sources[fault.library]
        assert fault.right in source, fault.what
        target = harness.folder / f"fault-{number}.o"
        wrong = source.replace(fault.right, fault.wrong)
        # the other kernels of the library stay as they are, but are not needed
        kernel = harness.compile_kernels(
            fault.library, wrong, target, lambda name: bool(re.search(fault.kernel, name))
        )
        return harness.link(Path(f"{target}.driver"), {**harness.kernels(), fault.library: kernel})

    jobs: list[Callable[[], Driver]] = [lambda item=item: make(*item) for item in enumerate(FAULTS)]
    return dict(zip([fault.what for fault in FAULTS], in_parallel(jobs), strict=True))


@pytest.fixture(scope="module")
def sound(driver: Driver) -> dict[tuple[str | int, ...], float]:
    """Errors without a fault, by command."""
    return {command: driver(*command)["error"] for command in {fault.command for fault in FAULTS}}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_fault_is_seen(
    faulty: dict[str, Driver], sound: dict[tuple[str | int, ...], float], fault: Fault
) -> None:
    assert sound[fault.command] < 1e-5
    assert faulty[fault.what](*fault.command)["error"] > 1e-4

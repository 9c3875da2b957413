from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufrq import codec
from ggufrq.errors import UsageError
from ggufrq.kv import KvPair, kv_type, kv_types, parse_kv

NAMES = sorted(kv_types())


@pytest.mark.parametrize(
    ("text", "k", "v", "bits"),
    [
        ("iso3", "iso3", "iso3", 3.125),
        ("iso3/planar4", "iso3", "planar4", 3.625),
        ("rotor2/iso2", "rotor2", "iso2", 2.125),
        ("f16", "f16", "f16", 16),
        ("q8_0/iso3", "q8_0", "iso3", (8.5 + 3.125) / 2),
        (" ISO3 / Q8_0 ", "iso3", "q8_0", (8.5 + 3.125) / 2),
        ("iq4_nl", "iq4_nl", "iq4_nl", 4.5),
        ("q5_1", "q5_1", "q5_1", 6),
    ],
)
def test_parse(text: str, k: str, v: str, bits: float) -> None:
    pair = parse_kv(text)
    assert (pair.k.name, pair.v.name, pair.bits) == (k, v, bits)


@pytest.mark.parametrize(
    ("text", "says", "remedy"),
    [
        ("isso3", "no cache type 'isso3'", "--kv iso3"),
        ("planar5", "no cache type 'planar5'", "--kv planar"),
        ("q8", "no cache type 'q8'", "--kv q8_0"),
        ("iso3/rotr4", "no cache type 'rotr4'", "--kv rotor4"),
        ("xyzzy", "no cache type 'xyzzy'", "--kv iso3"),
        ("", "not a pair", "--kv iso3"),
        ("iso3/", "not a pair", "iso3/planar4"),
        ("/iso3", "not a pair", "iso3/planar4"),
        ("iso3/iso3/iso3", "not a pair", "iso3/planar4"),
    ],
)
def test_refuses(text: str, says: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_kv(text)
    assert says in caught.value.message
    assert remedy in str(caught.value.remedy)


def test_unknown_name_lists_all_types() -> None:
    with pytest.raises(UsageError) as caught:
        kv_type("nothing")
    assert all(name in caught.value.message for name in NAMES)


@given(k=st.sampled_from(NAMES), v=st.sampled_from(NAMES))
def test_name_parses_back(k: str, v: str) -> None:
    pair = KvPair(kv_type(k), kv_type(v))
    assert parse_kv(pair.name) == pair
    assert pair.ours == (k in OURS or v in OURS)


OURS = {t.name for t in codec.cache_types()}


@given(
    k=st.sampled_from(NAMES),
    v=st.sampled_from(NAMES),
    rows=st.integers(0, 10_000),
    width=st.integers(1, 64).map(lambda n: n * 128),
)
def test_bytes_are_bits_times_values(k: str, v: str, rows: int, width: int) -> None:
    pair = KvPair(kv_type(k), kv_type(v))
    values = rows * width
    assert pair.bytes_for(values, values) * 8 == pair.k.bits * values + pair.v.bits * values
    assert pair.bytes_for(values, 0) * 8 == pair.k.bits * values


def test_published_sizes_of_a_27b_model() -> None:
    """16 layers, 4 KV heads of 256: 64 KiB per token in f16, 400 MiB at 32K in three bits."""
    values = 16 * 4 * 256
    assert parse_kv("f16").bytes_for(values, values) == 64 << 10
    assert parse_kv("iso3").bytes_for(values * 32768, values * 32768) == 400 << 20
    assert parse_kv("iso2").bytes_for(values * 32768, values * 32768) == 272 << 20
    assert parse_kv("rotor4").bytes_for(values * 131072, values * 131072) == 2112 << 20


def test_partial_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="64 values do not fill blocks of 128"):
        kv_type("iso3").bytes_for(64)


def test_upstream_types_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for name, kind in kv_types().items():
        if not kind.ours:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
            assert (kind.block, kind.block_bytes) == (block, size), name


def test_ours_are_those_of_the_codec() -> None:
    ours = {name: kind for name, kind in kv_types().items() if kind.ours}
    assert set(ours) == OURS
    for kind in codec.cache_types():
        assert ours[kind.name].bits == kind.bits_per_value == kind.bits + 0.125

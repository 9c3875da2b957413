"""Our kernels against the C code, through the shim."""

from __future__ import annotations

import pytest
from fake_metal import Driver

pytestmark = [pytest.mark.build, pytest.mark.slow]

TYPES = [f"{family}{bits}" for family in ("planar", "iso", "rotor") for bits in (2, 3, 4)]
TYPES += [f"rq{bits}_64" for bits in (2, 3, 4)]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("operation", ["set_rows", "get_rows", "cpy"])
def test_rows_are_those_of_c_to_the_byte(driver: Driver, operation: str, kind: str) -> None:
    """Both directions; rows strided, permuted or of another shape; values that are hard to encode."""
    assert driver(operation, kind, TYPES.index(kind), 150)["error"] == 0


@pytest.mark.parametrize("kind", ["planar2", "iso3", "rotor4", "rq2_64", "rq3_64", "rq4_64"])
def test_rows_that_a_rotation_or_a_profile_turns_before(driver: Driver, kind: str) -> None:
    """Mean, product, order of heads and store in one launch, to the byte where all sums are exact."""
    assert driver("store", kind, TYPES.index(kind), 60)["error"] == 0


@pytest.mark.parametrize("head", [128, 256])
@pytest.mark.parametrize("k, v", [("planar2", "iso2"), ("iso3", "iso3"), ("rotor4", "rotor4")])
def test_flash_attention(driver: Driver, k: str, v: str, head: int) -> None:
    """Vector and matrix kernels and the copy in f16; types of one width may differ."""
    found = driver("flash_attn", k, v, head, 7, 60)
    assert found["error"] < 1e-5
    assert found["cpu_error"] < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_flash_attention_of_heads_that_128_does_not_divide(driver: Driver, bits: int) -> None:
    """K and V in blocks of 64, and K alone."""
    narrow = f"rq{bits}_64"
    cases = [(narrow, "64", 40), (f"rotor{bits}", "192/128", 24), (f"iso{bits}", "320/256", 12)]
    for v, heads, count in cases:
        found = driver("flash_attn", narrow, v, heads, 7, count)
        assert found["error"] < 1e-5, heads
        assert found["cpu_error"] < 1e-3, heads


@pytest.mark.parametrize("kind", ["planar2", "iso3", "rotor4"])
def test_flash_attention_of_heads_of_512(driver: Driver, kind: str) -> None:
    """The vector kernel, and upstream's over a copy in f16."""
    assert driver("flash_attn", kind, kind, 512, 3, 12)["error"] < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_flash_attention_where_v_is_the_first_values_of_k(driver: Driver, bits: int) -> None:
    """MLA: the vector kernel, and upstream's over a copy in f16 of K alone, which 320/256 always take."""
    for heads in ("576/512", "320/256"):
        assert driver("flash_attn", f"rq{bits}_64", f"rq{bits}_64", heads, 3, 12)["error"] < 1e-5, heads


@pytest.mark.parametrize("kind", ["planar2", "iso3", "rotor4"])
def test_flash_attention_one_row_at_a_time(driver: Driver, kind: str) -> None:
    """What upstream's host falls back to."""
    assert driver("flash_attn", kind, kind, 128, 8, 20, 1)["error"] < 1e-5
    assert driver("flash_attn", kind, kind, 256, 9, 10, 1)["error"] < 1e-5


@pytest.mark.parametrize(
    "k, v, heads, count",
    [
        ("planar2", "iso2", "128", 30),
        ("iso3", "iso3", "128", 60),
        ("rotor4", "iso4", "128", 30),
        ("iso3", "rotor3", "256", 20),
        ("rq2_64", "rq2_64", "64", 20),
        ("rq3_64", "rq3_64", "64", 20),
        ("rq4_64", "iso4", "192/128", 20),
        ("rq3_64", "iso3", "320/256", 8),
        ("iso3", "iso3", "512", 8),
        ("q8_0", "q8_0", "128", 40),
        ("q4_0", "q4_0", "128", 40),
    ],
)
def test_newest_and_first_tokens(driver: Driver, k: str, v: str, heads: str, count: int) -> None:
    """Rows in f16 and of this batch in f32: behind the copy in f16, or after the vector kernel."""
    found = driver("recent", k, v, heads, 7, count)
    assert found["error"] < 1e-5
    assert found["cpu_error"] < 1e-3

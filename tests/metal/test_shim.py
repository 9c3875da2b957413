"""The shim is right if upstream's own kernels, which run on many a Mac, agree with the CPU through it."""

from __future__ import annotations

import pytest
from fake_metal import Driver

pytestmark = [pytest.mark.build, pytest.mark.slow]

# Both sides round on their way: errors of f16 and of the order of sums.
ROUNDING = 1e-6
ATTENTION = 1e-5


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("operation", ["set_rows", "get_rows", "cpy"])
def test_rows(driver: Driver, operation: str, kind: str) -> None:
    assert driver(operation, kind, 1, 200)["error"] < ROUNDING


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_flash_attention(driver: Driver, kind: str) -> None:
    """Vector and matrix kernels, with and without a copy in f16, masks, sinks, caps and padding."""
    found = driver("flash_attn", kind, kind, 128, 1, 60)
    assert found["error"] < ATTENTION
    assert found["cpu_error"] < 1e-3  # the CPU rounds Q to eight bits

from __future__ import annotations

import math

import pytest

from ggufrq.report import numbers


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.0184512, 0.00032, "0.0185 ± 0.0003"),
        (0.0184512, 0.00012, "0.01845 ± 0.00012"),
        (13.4812, 0.21, "13.48 ± 0.21"),
        (13.4812, 0.4, "13.5 ± 0.4"),
        (4931.2, 120.3, "4,931 ± 120"),
        (-0.41, 0.16, "−0.41 ± 0.16"),
        (-0.00001, 0.3, "0.0 ± 0.3"),
        (0.5, 0.0, "0.500"),
        (0.5, None, "0.500"),
        (None, 0.1, numbers.NONE),
    ],
)
def test_value_with_error(value: float | None, error: float | None, shown: str) -> None:
    assert numbers.with_error(value, error) == shown


def test_no_more_decimals_than_allowed() -> None:
    assert numbers.with_error(0.0001234, 0.0000012, most=5) == "0.00012 ± 0.00000"


@pytest.mark.parametrize(
    ("ratio", "error", "shown"),
    [
        (1.0168, 0.0062, "+1.7 ± 0.6"),
        (3386 / 292.8, 0.01, "+1,056 ± 12"),
        (0.5, 0.001, "−50.00 ± 0.05"),
        (1.0, 0.0, "0.0"),
    ],
)
def test_how_much_more_it_is(ratio: float, error: float, shown: str) -> None:
    """From the logarithm, as llama-perplexity prints it."""
    assert numbers.change(math.log(ratio), error) == shown


@pytest.mark.parametrize(
    ("share", "error", "signed", "shown"),
    [
        (0.9213, 0.0031, False, "92.1 ± 0.3"),
        (0.0168, 0.0062, True, "+1.7 ± 0.6"),
        (-0.0168, 0.0062, True, "−1.7 ± 0.6"),
        (0.00001, 0.0062, True, "0.0 ± 0.6"),
        (1.0, None, False, "100.0"),
        (None, None, False, numbers.NONE),
    ],
)
def test_percent(share: float | None, error: float | None, signed: bool, shown: str) -> None:
    assert numbers.percent(share, error, signed=signed) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0012345, "0.00123"), (1748.9, "1,749"), (0, "0"), (17.18, "17.2"), (None, "–"), (1e-9, "0.0000000")],
)
def test_significant_digits(value: float | None, shown: str) -> None:
    assert numbers.significant(value) == shown


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (1.8234, 0.031, "1.82 ± 0.03×"),
        (0.1004, 0.0041, "0.100 ± 0.004×"),
        (2.0, 0.0, "2.00×"),
        (3.5, 0.5, "3.5 ± 0.5×"),
    ],
)
def test_ratio(value: float, error: float, shown: str) -> None:
    assert numbers.ratio(value, error) == shown


def test_sizes_and_times() -> None:
    assert [numbers.size(n) for n in (100 << 20, 16 << 30, 2048, 12)] == [
        "100 MiB",
        "16.0 GiB",
        "2.00 KiB",
        "12 B",
    ]
    assert [numbers.duration(s) for s in (42, 200, 3900)] == ["42 s", "3 min", "1 h 05 min"]
    assert [numbers.plain(v) for v in (0.003, 20.0, 1.0, 0.0)] == ["0.003", "20", "1", "0"]

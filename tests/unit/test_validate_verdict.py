from __future__ import annotations

import pytest

from ggufrq.measure.verdict import BETTER, NONE, WORSE, Difference, between, mean_and_error, paired


@pytest.mark.parametrize(
    ("value", "error", "more_is_worse", "verdict"),
    [
        (0.21, 0.1, True, WORSE),
        (0.2, 0.1, True, NONE),  # exactly twice its error
        (0.19, 0.1, True, NONE),
        (-0.21, 0.1, True, BETTER),
        (0.21, 0.1, False, BETTER),
        (-0.21, 0.1, False, WORSE),
        (0.0, 0.0, True, NONE),
        (1e-9, 0.0, True, WORSE),
    ],
)
def test_only_beyond_twice_the_error(value: float, error: float, more_is_worse: bool, verdict: str) -> None:
    assert Difference(value, error).verdict(more_is_worse=more_is_worse) == verdict


def test_errors_of_both_sides_count() -> None:
    found = between(0.5, 0.3, 0.1, 0.4)
    assert found.value == pytest.approx(0.4)
    assert found.error == pytest.approx(0.5)


def test_pairs() -> None:
    assert paired([1.0]) is None
    found = paired([1.0, 2.0, 3.0, 4.0])
    assert found is not None
    assert found.value == 2.5
    assert found.error == pytest.approx(0.6455, abs=1e-4)  # sd 1.2910 over the root of 4
    assert found.verdict(more_is_worse=True) == WORSE  # 2.5 is beyond 3.18 times 0.6455
    few = paired([1.0, 4.0])
    assert few is not None
    assert few.verdict(more_is_worse=True) == NONE  # two values prove nothing: 2.5 +- 1.5


def test_many_pairs_take_the_normal_quantile() -> None:
    found = paired([1.0, 2.0] * 20)
    assert found is not None
    assert found.beyond == 2.0


def test_mean_of_one_has_no_error() -> None:
    assert mean_and_error([0.5]) == (0.5, 0.0)

"""The choice is exact: the same as trying all, and quick where trying all is out of the question."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from ggufrq.search.knapsack import cheapest

OPTIONS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 50)), min_size=1, max_size=3)


@given(
    items=st.lists(OPTIONS, min_size=1, max_size=4),
    step=st.sampled_from([1, 4]),
    unit=st.sampled_from([1.0, 1e-6]),
    capacity=st.integers(-1, 60),
    count=st.integers(1, 5),
)
def test_finds_what_trying_all_finds(
    items: list[list[tuple[int, int]]], step: int, unit: float, capacity: int, count: int
) -> None:
    sizes = [[step * size for size, _ in options] for options in items]
    costs = [[unit * cost for _, cost in options] for options in items]
    found = cheapest(sizes, costs, capacity, count)
    every = [
        sum(costs[i][o] for i, o in enumerate(choice))
        for choice in itertools.product(*(range(len(options)) for options in items))
        if sum(sizes[i][o] for i, o in enumerate(choice)) <= capacity
    ]
    assert [choice.cost for choice in found] == sorted(every)[:count]
    assert len({choice.options for choice in found}) == len(found)
    for choice in found:
        assert choice.size == sum(sizes[i][o] for i, o in enumerate(choice.options)) <= capacity
        assert choice.cost == sum(costs[i][o] for i, o in enumerate(choice.options))


def test_a_large_model_takes_seconds() -> None:
    """300 tensors of a model of 20 billion weights, whose sizes have no step in common that would help."""
    rng = random.Random(1)
    values = [rng.choice((5120 * 17408, 5120 * 6144, 5120 * 1024, 5120 * 48)) for _ in range(300)]
    bits = (84, 110, 136, 144, 176, 210, 272, 512)  # bytes of a block of 256
    sizes = [[count // 256 * size for size in bits] for count in values]
    weight = [count * rng.lognormvariate(0, 1) for count in values]
    costs = [
        [w * 4.0 ** (-size / 32) * rng.lognormvariate(0, 0.1) if size < 512 else 0.0 for size in bits]
        for w in weight
    ]
    capacity = 5 * sum(values) // 8
    (best,) = cheapest(sizes, costs, capacity)
    assert best.size <= capacity
    # The bound of the linear relaxation is at most one item's step away.
    price = max(
        (min(c for c in item) - item[0]) / (size[0] - size[-1])
        for item, size in zip(costs, sizes, strict=True)
    )
    bound = max(
        sum(
            min(c + p * s for c, s in zip(item, size, strict=True))
            for item, size in zip(costs, sizes, strict=True)
        )
        - p * capacity
        for p in (price * 0.9**n for n in range(200))
    )
    assert bound <= best.cost <= 1.01 * bound

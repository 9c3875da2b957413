"""The multiple-choice knapsack: one option for every item, sizes within a capacity, least cost. Exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """The number of the option taken for each item, and what they cost and take together."""

    options: tuple[int, ...]
    cost: float
    size: int


def cheapest(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int, count: int = 1
) -> list[Choice]:
    """The ``count`` cheapest choices whose sizes together are at most ``capacity``, the cheapest first.

    ``sizes[i][j]`` and ``costs[i][j]`` are those of option ``j`` of item ``i``; there may be fewer choices
    than asked for, or none. Dynamic programming over every total size that can occur, in steps of the sizes'
    greatest common divisor: for each the cheapest ways to it through the items so far.
    """
    step = math.gcd(*(size for options in sizes for size in options)) or 1
    states = capacity // step + 1
    if states < 1:
        return []
    best = np.full((states, count), np.inf)
    best[0, 0] = 0.0
    steps: list[np.ndarray] = []
    for item_sizes, item_costs in zip(sizes, costs, strict=True):
        reached = np.full((states, len(item_sizes), count), np.inf)
        for option, (size, cost) in enumerate(zip(item_sizes, item_costs, strict=True)):
            shift = size // step
            if shift < states:
                reached[shift:, option] = best[: states - shift] + cost
        flat = reached.reshape(states, -1)
        order = np.argsort(flat, axis=1, kind="stable")[:, :count]
        best = np.take_along_axis(flat, order, axis=1)
        steps.append(order)
    ends = np.argsort(best, axis=None, kind="stable")[:count]
    return [
        _traced(sizes, steps, step, int(end) // count, int(end) % count, float(best.flat[end]))
        for end in ends
        if math.isfinite(best.flat[end])
    ]


def _traced(
    sizes: Sequence[Sequence[int]], steps: list[np.ndarray], step: int, state: int, rank: int, cost: float
) -> Choice:
    """The choice that led to the ``rank``-th cheapest way to a total of ``state`` steps."""
    size, count = state * step, steps[-1].shape[1] if steps else 1
    options = []
    for item in reversed(range(len(sizes))):
        option, rank = divmod(int(steps[item][state, rank]), count)
        state -= sizes[item][option] // step
        options.append(option)
    return Choice(tuple(reversed(options)), cost, size)

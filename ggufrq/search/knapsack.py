"""The multiple-choice knapsack: one option for every item, sizes within a capacity, least cost. Exact.

Dynamic programming over the pairs of size and cost that can be reached, item by item. A pair is left out when
enough others are no larger and no dearer, and when a bound says that nothing good can come of it: for any
price per byte, each of the items still to come adds at least its cheapest cost-plus-price. The price is that
of the linear relaxation (H. Kellerer, U. Pferschy, D. Pisinger: Knapsack Problems, 2004, chapter 11), with
which few pairs remain even for hundreds of items of a gigabyte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Halvings of the price per byte; more than doubles can tell apart.
_HALVINGS = 100
#: By how much the search widens when fewer choices than asked for are within its bound.
_WIDER = 8.0
#: Beyond this, nothing but the capacity bounds the search.
_WIDEST = 1e6


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
    than asked for, or none.
    """
    items = [
        (np.array(s, dtype=np.int64), np.array(c, dtype=float)) for s, c in zip(sizes, costs, strict=True)
    ]
    if sum(int(s.min()) for s, _ in items) > capacity:
        return []
    price, reached = _price(items, capacity)
    least = sum(float((c + price * s).min()) for s, c in items) - price * capacity
    first = max(reached - least, 1e-9 * abs(reached))
    limit = first
    while True:
        found = [_choice(items, options) for options in _within(items, capacity, count, price, least + limit)]
        # Of the choices that cost at most this none is missing.
        if sum(choice.cost <= least + limit for choice in found) >= count or not math.isfinite(limit):
            return found
        limit = limit * _WIDER if 0 < limit < _WIDEST * first else math.inf


Items = list[tuple[np.ndarray, np.ndarray]]


def _price(items: Items, capacity: int) -> tuple[float, float]:
    """The lowest price per byte at which taking each item's cheapest option fits, and the cost of that
    choice."""

    def at(price: float) -> tuple[int, float]:
        # Of equal options the smaller one
        chosen = [int(np.lexsort((s, c + price * s))[0]) for s, c in items]
        return (
            sum(int(s[o]) for (s, _), o in zip(items, chosen, strict=True)),
            sum(float(c[o]) for (_, c), o in zip(items, chosen, strict=True)),
        )

    size, cost = at(0.0)
    if size <= capacity:
        return 0.0, cost
    spread = max(float(c.max() - c.min()) for _, c in items)
    low, high = 0.0, spread + 1.0  # sizes are whole bytes: at this price every item takes its smallest option
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if at(middle)[0] <= capacity:
            high = middle
        else:
            low = middle
    return high, at(high)[1]


def _within(items: Items, capacity: int, count: int, price: float, limit: float) -> list[tuple[int, ...]]:
    """The options of the ``count`` cheapest choices whose bound does not exceed ``limit``."""
    slack = 1e-12 * (abs(limit) if math.isfinite(limit) else 0.0)
    size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    smallest = np.cumsum([int(s.min()) for s, _ in reversed(items)])[::-1]
    priced = np.cumsum([float((c + price * s).min()) for s, c in reversed(items)])[::-1]
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for i, (s, c) in enumerate(items):
        more_size = int(smallest[i + 1]) if i + 1 < len(items) else 0
        more_cost = float(priced[i + 1]) if i + 1 < len(items) else 0.0
        new_size = (size[:, None] + s[None, :]).ravel()
        new_cost = (cost[:, None] + c[None, :]).ravel()
        bound = new_cost + price * (new_size - capacity) + more_cost
        kept = np.flatnonzero((new_size + more_size <= capacity) & (bound <= limit + slack))
        order = kept[np.lexsort((new_cost[kept], new_size[kept]))]
        order = order[_undominated(new_cost[order], count)]
        size, cost = new_size[order], new_cost[order]
        steps.append((order // len(s), order % len(s)))
    ends = np.argsort(cost, kind="stable")[:count]
    return [_traced(steps, int(end)) for end in ends]


def _undominated(cost: np.ndarray, count: int) -> np.ndarray:
    """Positions, of costs in the order of size, that fewer than ``count`` others make needless.

    Peels off ``count`` layers, each of those that nothing left is below: what remains then has one better
    pair in every layer.
    """
    left = np.arange(len(cost))
    layers = []
    for _ in range(count):
        values = cost[left]
        before = np.concatenate(([np.inf], np.minimum.accumulate(values)[:-1]))
        best = values < before
        layers.append(left[best])
        left = left[~best]
        if not len(left):
            break
    return np.sort(np.concatenate(layers))


def _traced(steps: list[tuple[np.ndarray, np.ndarray]], state: int) -> tuple[int, ...]:
    options = []
    for parents, taken in reversed(steps):
        options.append(int(taken[state]))
        state = int(parents[state])
    return tuple(reversed(options))


def _choice(items: Items, options: tuple[int, ...]) -> Choice:
    pairs = list(zip(items, options, strict=True))
    return Choice(options, sum(float(c[o]) for (_, c), o in pairs), sum(int(s[o]) for (s, _), o in pairs))

"""Choosing by measured cost: what of it is real, and the cheapest assignments within a budget.

An assignment is the number of the option of each unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ggufrq.ggufs.header import pad
from ggufrq.ggufs.tensors import Inventory
from ggufrq.make.quantizer import Forecast
from ggufrq.search.knapsack import cheapest
from ggufrq.search.sensitivity.parts import Option
from ggufrq.search.sensitivity.trials import Measured

Assignment = tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """``size`` bytes of the file at most, or ``bpw`` bits per weight over all tensors."""

    size: int | None = None
    bpw: Fraction | None = None

    @property
    def name(self) -> str:
        """As it goes into names: ``5.25bpw``, ``15gb``."""
        if self.bpw is not None:
            return f"{float(self.bpw):g}bpw"
        assert self.size is not None
        for unit, name in ((10**9, "gb"), (10**6, "mb")):
            if self.size >= unit and (self.size % (unit // 1000) == 0):
                return f"{self.size / unit:g}{name}"
        return f"{self.size}b"

    @property
    def text(self) -> str:
        """For people."""
        return f"{float(self.bpw):g} bits per weight" if self.bpw is not None else f"{self.size:,} bytes"

    def raised(self, over: int, weights: int) -> str:
        """A budget that is so many bytes larger, rounded up, for people."""
        if self.bpw is not None:
            return f"{math.ceil(100 * (self.bpw + Fraction(8 * over, weights))) / 100:g} bits per weight"
        assert self.size is not None
        return f"{self.size + over:,} bytes"

    def counted(self, size: int) -> int:
        """What a tensor of so many bytes counts: in a file each takes whole steps."""
        return size if self.bpw is not None else pad(size)

    def option_bytes(self, option: Option) -> int:
        """What an option counts."""
        return sum(map(self.counted, option.sizes))

    def allows(self, forecast: Forecast) -> bool:
        """Whether a file is within the budget."""
        if self.bpw is not None:
            return forecast.bits <= self.bpw
        assert self.size is not None
        return forecast.file_bytes <= self.size

    def capacity(self, model: Inventory, header: int) -> int:
        """Bytes for the tensors that are quantized, with a header of so many bytes."""
        rest = [tensor.bytes_as(tensor.type) for tensor in model if not tensor.quantizable]
        if self.bpw is not None:
            return math.floor(self.bpw * sum(tensor.values for tensor in model) / 8) - sum(rest)
        assert self.size is not None
        return self.size - header - sum(map(pad, rest))


def real_costs(measured: Sequence[Measured]) -> list[float]:
    """Costs of a unit's options (the smallest first) without what may be chance: a larger option is taken to
    cost less than the smaller ones only when it measured so by more than the standard error of the
    difference, and no option to cost less than nothing."""
    costs: list[float] = []
    best = Measured(math.inf, 0.0, 0.0, 0.0, 0.0)
    for one in measured:
        if math.isinf(best.kld) or best.kld - one.kld > math.hypot(best.kld_err, one.kld_err):
            best = one
            costs.append(max(0.0, one.kld))
        else:
            costs.append(max(0.0, best.kld, one.kld))
    return costs


@dataclass(frozen=True)
class Problem:
    """Sizes and costs by unit and option, and the capacity."""

    sizes: list[list[int]]
    costs: list[list[float]]
    capacity: int

    def size(self, chosen: Assignment) -> int:
        """Bytes of an assignment."""
        return sum(sizes[o] for sizes, o in zip(self.sizes, chosen, strict=True))

    def cost(self, chosen: Assignment) -> float:
        """The sum of the costs of its options."""
        return sum(costs[o] for costs, o in zip(self.costs, chosen, strict=True))

    def best(self, count: int, *, dropped: int = 0) -> list[Assignment]:
        """The cheapest assignments within the capacity, the cheapest first, without the ``dropped`` smallest
        options of each unit (but for its last)."""
        first = [min(dropped, len(unit) - 1) for unit in self.sizes]
        sizes = [unit[f:] for unit, f in zip(self.sizes, first, strict=True)]
        costs = [unit[f:] for unit, f in zip(self.costs, first, strict=True)]
        return [
            tuple(o + f for o, f in zip(choice.options, first, strict=True))
            for choice in cheapest(sizes, costs, self.capacity, count)
        ]

    def useful(self) -> list[list[int]]:
        """Options of each unit that no other one makes needless: cheaper than every smaller one."""
        found = []
        for sizes, costs in zip(self.sizes, self.costs, strict=True):
            kept: list[int] = []
            for o in sorted(range(len(sizes)), key=lambda o: (sizes[o], costs[o])):
                if not kept or costs[o] < costs[kept[-1]]:
                    kept.append(o)
            found.append(kept)
        return found

    def neighbours(self, chosen: Assignment) -> list[Assignment]:
        """Assignments within the capacity that differ by a step up or down of one unit or of two, the
        cheapest first."""
        steps = list(self._steps(chosen))
        room = self.capacity - self.size(chosen)
        found: dict[Assignment, float] = {}
        for i, (unit, option, size, cost) in enumerate(steps):
            if size <= room:
                found[_with(chosen, {unit: option})] = cost
            for other, another, more, gain in steps[i + 1 :]:
                if other != unit and size + more <= room:
                    found[_with(chosen, {unit: option, other: another})] = cost + gain
        return sorted(found, key=lambda assignment: found[assignment])

    def _steps(self, chosen: Assignment) -> Iterator[tuple[int, int, int, float]]:
        for unit, useful in enumerate(self.useful()):
            sizes, costs, now = self.sizes[unit], self.costs[unit], chosen[unit]
            above = [o for o in useful if sizes[o] > sizes[now]][:1]
            below = [o for o in useful if sizes[o] < sizes[now]][-1:]
            for option in (*above, *below):
                yield unit, option, sizes[option] - sizes[now], costs[option] - costs[now]


def search(
    problem: Problem,
    first: Sequence[Assignment],
    measure: Callable[[Sequence[Assignment]], list[Measured]],
    *,
    width: int,
    rounds: int,
) -> dict[Assignment, Measured]:
    """Assignments with what they measured: the ``first`` ones, then, as long as that finds a better one and
    for so many ``rounds``, the ``width`` most promising neighbours of the best."""
    found = dict(zip(first, measure(first), strict=True))
    for _ in range(rounds):
        best = min(found, key=lambda assignment: found[assignment].kld)
        near = [assignment for assignment in problem.neighbours(best) if assignment not in found][:width]
        found |= dict(zip(near, measure(near), strict=True))
        if min(found, key=lambda assignment: found[assignment].kld) == best:
            break
    return found


def start(problem: Problem, best: int, dropped: int) -> list[Assignment]:
    """What is measured first: the ``best`` cheapest, and the cheapest without the coarsest types, one to
    ``dropped`` of them, since the sum of single costs misjudges those most."""
    found = problem.best(best)
    for count in range(1, dropped + 1):
        found += problem.best(1, dropped=count)
    return list(dict.fromkeys(found))


def _with(chosen: Assignment, changes: dict[int, int]) -> Assignment:
    return tuple(changes.get(unit, option) for unit, option in enumerate(chosen))

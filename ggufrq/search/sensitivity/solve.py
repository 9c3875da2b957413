"""Choosing by measured cost: what of it is real, and the cheapest assignments within a budget.

An assignment is the number of the option of each unit.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ggufrq.ggufs.header import pad
from ggufrq.ggufs.placement import EMBEDDINGS, Placement, fitting, movable, on_gpu, placements
from ggufrq.ggufs.tensors import Inventory
from ggufrq.make.quantizer import Forecast
from ggufrq.search.knapsack import cheapest
from ggufrq.search.sensitivity.parts import Option
from ggufrq.search.sensitivity.trials import Measured

Assignment = tuple[int, ...]
#: Of the memory for what may stay with the CPU.
_STEPS = 64


@dataclass(frozen=True)
class Budget:
    """``size`` bytes of the file at most, or ``bpw`` bits per weight over all tensors, or ``rooms``: bytes of
    a GPU's memory and of the machine's, of the first of which ``beside`` are for what is no weights."""

    size: int | None = None
    bpw: Fraction | None = None
    rooms: tuple[int, int] | None = None
    beside: int = 0

    @property
    def name(self) -> str:
        """As it goes into names: ``5.25bpw``, ``15gb``."""
        if self.bpw is not None:
            return f"{float(self.bpw):g}bpw"
        if self.rooms is not None:
            vram, ram = map(_named, self.rooms)
            return f"{vram}-vram-{ram}-ram"
        assert self.size is not None
        return _named(self.size)

    @property
    def text(self) -> str:
        """For people."""
        if self.rooms is not None:
            vram, ram = self.rooms
            return f"{vram:,} bytes of VRAM, {self.beside:,} of them beside the weights, and {ram:,} of RAM"
        return f"{float(self.bpw):g} bits per weight" if self.bpw is not None else f"{self.size:,} bytes"

    def raised(self, over: int, weights: int) -> str:
        """A budget that is so many bytes larger, rounded up, for people."""
        if self.bpw is not None:
            return f"{math.ceil(100 * (self.bpw + Fraction(8 * over, weights))) / 100:g} bits per weight"
        assert self.size is not None
        return f"{self.size + over:,} bytes"

    def counted(self, size: int) -> int:
        """What a tensor of so many bytes counts: in a file each takes whole steps."""
        return size if self.size is None else pad(size)

    def option_bytes(self, option: Option) -> int:
        """What an option counts."""
        return sum(map(self.counted, option.sizes))

    def placed(self, sizes: Mapping[str, int]) -> Placement | None:
        """How tensors of so many bytes by name are placed in the two memories, None where they have no
        room."""
        assert self.rooms is not None
        return fitting(sizes, self.rooms[0] - self.beside, self.rooms[1])

    def allows(self, forecast: Forecast, model: Inventory) -> bool:
        """Whether a file is within the budget."""
        if self.rooms is not None:
            return self.placed({t.name: t.bytes_as(forecast.types[t.name]) for t in model}) is not None
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


def _named(size: int) -> str:
    for unit, name in ((10**9, "gb"), (10**6, "mb")):
        if size >= unit and (size % (unit // 1000) == 0):
            return f"{size / unit:g}{name}"
    return f"{size}b"


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

    def fits(self, chosen: Assignment) -> bool:
        """Whether an assignment is within the capacity."""
        return self.size(chosen) <= self.capacity

    def best(self, count: int, *, dropped: int = 0) -> list[Assignment]:
        """The cheapest assignments within the capacity, the cheapest first, without the ``dropped`` smallest
        options of each unit (but for its last)."""
        return self._best(range(len(self.sizes)), self.sizes, self.capacity, count, dropped)

    def _best(
        self,
        among: Sequence[int],
        sizes: Sequence[Sequence[int]],
        capacity: int,
        count: int,
        dropped: int,
    ) -> list[Assignment]:
        """The cheapest options of some units."""
        first = [min(dropped, len(sizes[unit]) - 1) for unit in among]
        return [
            tuple(o + f for o, f in zip(choice.options, first, strict=True))
            for choice in cheapest(
                [sizes[unit][f:] for unit, f in zip(among, first, strict=True)],
                [self.costs[unit][f:] for unit, f in zip(among, first, strict=True)],
                capacity,
                count,
            )
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
        found: dict[Assignment, float] = {}
        for i, (unit, option, cost) in enumerate(steps):
            found[_with(chosen, {unit: option})] = cost
            for other, another, gain in steps[i + 1 :]:
                if other != unit:
                    found[_with(chosen, {unit: option, other: another})] = cost + gain
        return sorted(filter(self.fits, found), key=lambda assignment: found[assignment])

    def _steps(self, chosen: Assignment) -> Iterator[tuple[int, int, float]]:
        for unit, useful in enumerate(self.useful()):
            sizes, costs, now = self.sizes[unit], self.costs[unit], chosen[unit]
            above = [o for o in useful if sizes[o] > sizes[now]][:1]
            below = [o for o in useful if sizes[o] < sizes[now]][-1:]
            for option in (*above, *below):
                yield unit, option, costs[option] - costs[now]


@dataclass(frozen=True)
class Placed(Problem):
    """A problem with two memories, ``capacity`` being what both have together. ``tensors`` are the bytes by
    name that each option of each unit has, ``fixed`` those of tensors that are not quantized."""

    budget: Budget
    tensors: list[list[Mapping[str, int]]]
    fixed: Mapping[str, int]

    def bytes_of(self, chosen: Assignment) -> dict[str, int]:
        """Bytes of all tensors by name."""
        found = dict(self.fixed)
        for unit, option in zip(self.tensors, chosen, strict=True):
            found |= unit[option]
        return found

    def fits(self, chosen: Assignment) -> bool:
        """Whether there is a placement."""
        return self.budget.placed(self.bytes_of(chosen)) is not None

    def best(self, count: int, *, dropped: int = 0) -> list[Assignment]:
        """As of one capacity: for what may stay with the CPU so many bytes, in steps, and the rest as what is
        left of the GPU's memory allows."""
        smallest = tuple(0 for _ in self.tensors)
        moved = movable(self.bytes_of(smallest))
        units = range(len(self.tensors))
        away = [unit for unit in units if self.tensors[unit][0].keys() & moved]
        here = [unit for unit in units if unit not in away]
        least, most = (sum(f(self.sizes[unit]) for unit in away) for f in (min, max))
        found: dict[Assignment, float] = {}
        for step in range(_STEPS + 1):
            cap = least + (most - least) * step // _STEPS
            for part in self._best(away, self.sizes, cap, 1, dropped):
                start = _with(smallest, dict(zip(away, part, strict=True)))
                for rest in self._rest(start, here, count, dropped):
                    chosen = _with(start, dict(zip(here, rest, strict=True)))
                    if self.fits(chosen):
                        found[chosen] = self.cost(chosen)
        return sorted(found, key=lambda assignment: found[assignment])[:count]

    def _rest(self, start: Assignment, here: Sequence[int], count: int, dropped: int) -> list[Assignment]:
        """The cheapest options of the units that stay on the GPU, next to what is chosen for the others, of
        which as much as it holds is in the other memory; with room there for the largest embeddings that it
        can hold, and for the smallest ones."""
        assert self.budget.rooms is not None
        vram, ram = self.budget.rooms
        sizes = self.bytes_of(start)
        tied = "output.weight" not in sizes
        there = [
            [sum(n for name, n in option.items() if on_gpu(name, tied=tied)) for option in unit]
            for unit in self.tensors
        ]
        # Of each unit by how much its embeddings grow with an option: the other memory has them, too
        grown = [
            [
                sum(option.get(name, 0) - sizes.get(name, 0) for name in EMBEDDINGS & option.keys())
                for option in unit
            ]
            for unit in self.tensors
        ]
        every = placements(sizes)
        free = ram - every[0].ram
        found: list[Assignment] = []
        for most in _largest([set(unit) if any(unit) else {0} for unit in grown], free):
            places = [place for place in every if place.ram + sum(most) <= ram]
            if places:
                others = places[-1].vram - sum(there[unit][start[unit]] for unit in here)
                capacity = vram - self.budget.beside - others
                held = [
                    [size if grows <= bound else capacity + 1 for size, grows in zip(*unit, strict=True)]
                    for *unit, bound in zip(there, grown, most, strict=True)
                ]
                found += self._best(here, held, capacity, count, dropped)
        return found


def _largest(sizes: Sequence[set[int]], room: int) -> set[tuple[int, ...]]:
    """Of choices of one size from each set those in ``room`` that no other one exceeds; and zeros."""
    held = [one for one in itertools.product(*sizes) if sum(one) <= room]
    largest = {
        one for one in held if not any(other != one and all(map(operator.ge, other, one)) for other in held)
    }
    return {*largest, tuple(0 for _ in sizes)}


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

"""The best recipe for a model under a budget of bytes or of bits per weight, by measurement.

1. **Single changes.** One unit (a class of tensors, a class in some layers, or a tensor) is quantized to one
   type while all else stays as it is, and the mean divergence (KLD) from the unquantized model is measured.
   Against an otherwise exact model the change is all that there is to see, with a standard error of a few per
   cent of itself.
2. **Model.** The KLD of a recipe is taken as the sum of those of its single changes. A gain below the
   standard error counts as none.
3. **Choice.** The cheapest recipes by this model within the budget, exactly (``knapsack``), by sizes as
   llama-quantize writes them.
4. **Search.** The sum is an approximation: the cheapest few, the cheapest without the coarsest types, and the
   cheapest by the errors of weights alone (``quick``) are measured as they are, then neighbours of the best
   one (a step up or down of one unit, or of two), as long as that finds a better one.
5. **Proof.** The best by measurement is measured once more on another text, which had no part in the choice,
   beside what ``quick`` chose, and the recipes and types that ggufrq comes with and that are no larger.

With ``Goal.quick``, and where there is no room to measure, the costs of ``quick`` stand for 1 and 2, and
nothing is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from ggufrq.base import log, paths
from ggufrq.base.errors import GgufrqError, UsageError
from ggufrq.base.progress import SILENT, Listener, Part
from ggufrq.build.project import Build
from ggufrq.ggufs.header import pad
from ggufrq.ggufs.placement import Placement
from ggufrq.make import family
from ggufrq.make.plan import Request, Want, needs_imatrix
from ggufrq.make.recipe import Recipe, load, shipped
from ggufrq.make.workshop import Workshop
from ggufrq.measure.weight_quality import WeightSettings
from ggufrq.search.sensitivity import quick, solve
from ggufrq.search.sensitivity.parts import Unit, as_recipe, default_types, units
from ggufrq.search.sensitivity.solve import Assignment, Budget, Placed, Problem
from ggufrq.search.sensitivity.trials import NOTHING, Measured, Trials, say_jobs

#: How many of the cheapest recipes are measured, and how many without the coarsest types.
_BEST, _DROPPED = 4, 3
#: Neighbours that are measured in a round of the search.
_WIDTH = 8


@dataclass(frozen=True)
class Goal:
    """What is asked for: the budget (None: only measure), the types to choose from (None: the default ones),
    what one type is chosen for (``parts.BY``), the texts to choose on and to check on, and how much of each
    is read. After the cheapest recipes so many ``rounds`` of neighbours are measured at most. ``quick``: by
    the errors of weights alone, nothing is measured."""

    budget: Budget | None = None
    types: tuple[str, ...] | None = None
    by: str = "class"
    ranges: int = 4
    text: Path | None = None
    check_text: Path | None = None
    settings: WeightSettings = field(default_factory=lambda: WeightSettings(chunks=16))
    jobs: int | None = None
    rounds: int = 8
    quick: bool = False

    @property
    def texts(self) -> tuple[Path, Path]:
        """To choose on, and to check on."""
        folder = paths.data_dir("texts")
        return self.text or folder / "calibration.txt", self.check_text or folder / "heldout.txt"


@dataclass(frozen=True)
class Candidate:
    """A recipe: its types by name of the tensor, bits per weight, and what it measured; ``predicted`` is the
    sum of its single changes."""

    name: str
    types: Mapping[str, str]
    bits: float
    measured: Measured
    predicted: float | None = None


@dataclass(frozen=True)
class Found:
    """The answer: the recipe, ``bytes`` and ``bits`` per weight of its file, and its types by name of the
    tensor; all recipes that were measured on the text of the choice, the best first; and the answer and what
    ggufrq comes with on the checking text: both empty where nothing was measured. ``chosen`` are the types by
    name of the unit; ``placement`` is where the weights go, for a budget of two memories."""

    recipe: Recipe
    bytes: int
    bits: float
    types: Mapping[str, str]
    tuned: list[Candidate]
    checked: list[Candidate]
    chosen: dict[str, str]
    placement: Placement | None = None


@dataclass(frozen=True)
class Result:
    """Units, what their options measured one at a time, and, with a budget, what was found. ``matrix`` is the
    importance matrix of every measurement. ``estimates`` are what options should cost by the errors of
    weights (``quick``), None where these were not asked; where they stand alone ``singles`` is empty, and
    there is no ``command``."""

    base: str
    folder: Path
    gguf: Path
    matrix: Path | None
    types: tuple[str, ...]
    singles: dict[Unit, list[Measured]]
    found: Found | None
    estimates: dict[Unit, list[float]] | None = None
    command: str = ""
    jobs: int = 0
    threads: int = 0


def analyse(request: Request, build: Build, goal: Goal, listener: Listener = SILENT) -> Result:
    """Measure the parts of ``request.model`` and, with a budget, find the best recipe. Of the request,
    ``wants`` does not count; its matrix is used for every measurement, or one is made as ``ggufrq quantize``
    does. ``listener`` is told how many measurements are still to be made, and of each.

    What an earlier run has measured is taken from it. With a budget and no room on the disk for a file to
    measure, the recipe is that of ``Goal.quick``, which is said. Raises UsageError for a budget that is too
    small or needs nothing quantized, ModelError for a model that is quantized already, and as
    ``Trials.measure``.
    """
    with family.workshop(request, build) as shop:
        return _Analysis(shop, build, goal, listener).run()


class _Analysis:
    def __init__(self, shop: Workshop, build: Build, goal: Goal, listener: Listener) -> None:
        self.shop, self.build, self.goal, self.listener = shop, build, goal, listener
        self.trials = Part(listener)
        self.model = shop.model
        self.types = goal.types or default_types(shop.model)
        self.units = units(shop.model, self.types, goal.by, goal.ranges)
        kinds = [kind for unit in self.units for option in unit.options for kind in option.types.values()]
        # Stands for every recipe: whether it has a matrix, and how large the header is.
        specimen = self._recipe(tuple(0 for _ in self.units), imatrix=any(map(needs_imatrix, kinds)))
        self.capacity = self._capacity(specimen) if goal.budget is not None else 0
        self.matrix = shop.matrix_for(specimen)

    def run(self) -> Result:
        if self.goal.quick:
            return self._by_weights(self.listener)
        text, check_text = self.goal.texts
        with self._trials(text) as trials:
            if self.goal.budget is not None and trials.missing(self._changes):
                try:
                    trials.require_room()
                except GgufrqError as error:
                    log.say(f"{error.message}: nothing is measured, types are chosen as by --quick")
                    self.goal = replace(self.goal, quick=True)
                    return self._by_weights(self.listener)
            say_jobs(trials)
            singles = self._singles(trials)
            found, estimates = None, None
            if self.goal.budget is not None:
                problem, estimates = self._problem(singles), self._estimates(SILENT)
                by_weights = self._cheapest(estimates)
                tuned = self._search(trials, problem, by_weights)
                with self._trials(check_text) as check:
                    found = self._found(problem, tuned, check, by_weights)
            return replace(
                self._result(singles, found, estimates),
                command=trials.command(),
                jobs=trials.jobs,
                threads=trials.threads,
            )

    def _by_weights(self, listener: Listener) -> Result:
        """The result without measurements."""
        estimates, found = self._estimates(listener), None
        if self.goal.budget is not None:
            chosen = self._cheapest(estimates)
            text = f"chosen by the errors of weights, not measured: at most {self.goal.budget.text}"
            found = self._answer(chosen, text)
        return self._result({}, found, estimates)

    def _estimates(self, listener: Listener) -> dict[Unit, list[float]]:
        listener.expect(len(self.model.quantizable))
        return quick.costs(self.model, self.shop.gguf, self.matrix, self.units, self.build, listener=listener)

    def _cheapest(self, estimates: Mapping[Unit, Sequence[float]]) -> Assignment:
        found = self._as_problem([list(estimates[unit]) for unit in self.units]).best(1)
        if not found:
            assert self.goal.budget is not None
            raise UsageError(
                f"no types were found for {self.goal.budget.text}",
                remedy="more of the memory that is short, or smaller types among --types",
            )
        return found[0]

    def _result(
        self,
        singles: dict[Unit, list[Measured]],
        found: Found | None,
        estimates: dict[Unit, list[float]] | None,
    ) -> Result:
        return Result(
            base=self.shop.base,
            folder=self.shop.folder,
            gguf=self.shop.gguf,
            matrix=self.matrix,
            types=self.types,
            singles=singles,
            found=found,
            estimates=estimates,
        )

    @property
    def _changes(self) -> list[Mapping[str, str]]:
        return [option.types for unit in self.units for option in unit.options if not option.exact]

    def _singles(self, trials: Trials) -> dict[Unit, list[Measured]]:
        every = [(unit, option) for unit in self.units for option in unit.options]
        changes = self._changes
        later = 0
        if self.goal.budget is not None:
            later = _BEST + _DROPPED + 1 + min(2, self.goal.rounds) * _WIDTH + len(self._others())
        self._expect(trials.missing(changes), later)
        self.listener.step("one at a time")
        measured = iter(trials.measure(changes))
        singles: dict[Unit, list[Measured]] = {unit: [] for unit in self.units}
        for unit, option in every:
            singles[unit].append(NOTHING if option.exact else next(measured))
        return singles

    def _problem(self, singles: Mapping[Unit, Sequence[Measured]]) -> Problem:
        return self._as_problem([solve.real_costs(singles[unit]) for unit in self.units])

    def _as_problem(self, costs: list[list[float]]) -> Problem:
        assert self.goal.budget is not None
        budget = self.goal.budget
        sizes = [[budget.option_bytes(option) for option in unit.options] for unit in self.units]
        if budget.rooms is None:
            return Problem(sizes, costs, self.capacity)
        tensors: list[list[Mapping[str, int]]] = [
            [dict(zip(option.types, option.sizes, strict=True)) for option in unit.options]
            for unit in self.units
        ]
        fixed = {t.name: t.bytes_as(t.type) for t in self.model if not t.quantizable}
        return Placed(sizes, costs, self.capacity, budget, tensors, fixed)

    def _search(self, trials: Trials, problem: Problem, more: Assignment) -> dict[Assignment, Measured]:
        def measure(chosen: Sequence[Assignment]) -> list[Measured]:
            types = [self._types(assignment) for assignment in chosen]
            self._expect(trials.missing(types), min(1, self.goal.rounds) * _WIDTH + len(self._others()))
            self.listener.step("the best together")
            return trials.measure(types)

        first = list(dict.fromkeys([*solve.start(problem, _BEST, _DROPPED), more]))
        return solve.search(problem, first, measure, width=_WIDTH, rounds=self.goal.rounds)

    def _found(
        self,
        problem: Problem,
        tuned: Mapping[Assignment, Measured],
        check: Trials,
        by_weights: Assignment,
    ) -> Found:
        budget = self.goal.budget
        assert budget is not None
        ordered = sorted(tuned, key=lambda assignment: tuned[assignment].kld)
        best, others = ordered[0], self._others()
        if by_weights != best:
            others = {"--quick": self._types(by_weights), **others}
        types = [self._types(best), *others.values()]
        self._expect(check.missing(types), 0)
        self.listener.step("on the other text")
        on_other = check.measure(types)
        answer = self._answer(
            best,
            f"chosen by measurement: at most {budget.text}, mean KLD "
            f"{on_other[0].kld:.5f} on {check.quality.text.name}",
        )
        names = [answer.recipe.name, *others]
        return replace(
            answer,
            tuned=[
                self._candidate("", self._types(chosen), tuned[chosen], problem.cost(chosen))
                for chosen in ordered
            ],
            checked=[self._candidate(*each) for each in zip(names, types, on_other, strict=True)],
        )

    def _answer(self, chosen: Assignment, description: str) -> Found:
        """The recipe of an assignment, without what was measured."""
        assert self.goal.budget is not None
        types = self._types(chosen)
        recipe = self._recipe(chosen, imatrix=self.matrix is not None, description=description)
        forecast = self.shop.output(Want(recipe.name, recipe)).forecast
        if not self.goal.budget.allows(forecast, self.model) or not types.items() <= forecast.types.items():
            raise GgufrqError(f"{recipe.name} would not become the file that was chosen, or a larger one")
        budget = self.goal.budget
        sizes = {tensor.name: tensor.bytes_as(forecast.types[tensor.name]) for tensor in self.model}
        return Found(
            placement=budget.placed(sizes) if budget.rooms is not None else None,
            recipe=recipe,
            bytes=forecast.file_bytes,
            bits=forecast.bits,
            types=types,
            tuned=[],
            checked=[],
            chosen={
                unit.name: unit.options[option].kind for unit, option in zip(self.units, chosen, strict=True)
            },
        )

    @cache  # noqa: B019 - lives as long as the analysis
    def _others(self) -> dict[str, dict[str, str]]:
        """Types of what ``ggufrq quantize`` makes by itself and the budget allows, by name: the recipes that
        come with it and its default family."""
        budget = self.goal.budget
        assert budget is not None
        found = {}
        for want in (*(Want(name, load(name)) for name in shipped()), *map(Want, family.DEFAULT_TYPES)):
            with contextlib.suppress(UsageError):  # a recipe that knows nothing of this architecture
                forecast = self.shop.output(want).forecast
                if budget.allows(forecast, self.model):
                    names = [tensor.name for tensor in self.model.quantizable]
                    found[want.label] = {name: forecast.types[name] for name in names}
        return found

    def _capacity(self, specimen: Recipe) -> int:
        """Bytes of the budget for the tensors that are quantized."""
        budget = self.goal.budget
        assert budget is not None
        forecast = self.shop.output(Want(specimen.name, specimen)).forecast
        if budget.rooms is not None:
            return self._placed_capacity()
        data = sum(pad(tensor.bytes_as(forecast.types[tensor.name])) for tensor in self.model)
        capacity = budget.capacity(self.model, forecast.file_bytes - data)
        sizes = [[budget.option_bytes(option) for option in unit.options] for unit in self.units]
        over = sum(map(min, sizes)) - capacity
        if over > 0:
            least = budget.raised(over, sum(tensor.values for tensor in self.model))
            raise UsageError(
                f"{budget.text} are too few: in the smallest types the model takes {least}",
                remedy="a larger budget, or smaller --types",
            )
        if sum(map(max, sizes)) <= capacity:
            raise UsageError(
                f"{budget.text} hold the model in its largest types; there is nothing to choose",
                remedy="a smaller budget, or larger --types",
            )
        return capacity

    def _placed_capacity(self) -> int:
        """Bytes of both memories for the tensors that are quantized. Raises UsageError as ``_capacity``."""
        budget = self.goal.budget
        assert budget is not None and budget.rooms is not None
        for option, says, remedy in (
            (0, "are too few for the model in the smallest types", "more memory, or smaller --types"),
            (-1, "hold the model in its largest types; there is nothing to choose", "larger --types"),
        ):
            sizes = {t.name: t.bytes_as(t.type) for t in self.model if not t.quantizable}
            for unit in self.units:
                chosen = unit.options[option]
                sizes |= dict(zip(chosen.types, chosen.sizes, strict=True))
            if (budget.placed(sizes) is None) == (option == 0):
                raise UsageError(f"{budget.text} {says}", remedy=remedy)
        return sum(budget.rooms) - budget.beside

    def _types(self, chosen: Assignment) -> dict[str, str]:
        return {
            name: kind
            for unit, option in zip(self.units, chosen, strict=True)
            for name, kind in unit.options[option].types.items()
        }

    def _recipe(self, chosen: Assignment, *, imatrix: bool, description: str = "") -> Recipe:
        budget = self.goal.budget
        name = "quick" if self.goal.quick else "sensitivity"
        name = name if budget is None else f"{name}-{budget.name}"
        return as_recipe(name, description, self.model, self._types(chosen), imatrix=imatrix)

    def _candidate(
        self, name: str, types: Mapping[str, str], measured: Measured, predicted: float | None = None
    ) -> Candidate:
        every = {tensor.name: types.get(tensor.name, tensor.type) for tensor in self.model}
        return Candidate(name, types, self.model.bits_as(every), measured, predicted)

    def _trials(self, text: Path) -> Trials:
        goal = self.goal
        return Trials(
            self.shop, self.build, self.matrix, text, goal.settings, jobs=goal.jobs, listener=self.trials
        )

    def _expect(self, now: int, later: int) -> None:
        self.listener.expect(self.trials.done + now + later)

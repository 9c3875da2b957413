"""The best bits for each class of weights under a budget, by measurement on mlx's own code.

As ``search.sensitivity`` does it for GGUF files: one class at a time is quantized, the divergence from the
model as it is measured, the cheapest recipes within the budget are measured as they are, then neighbours of
the best one. Nothing is written, and what was measured is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ggufrq.base import log
from ggufrq.base.errors import UsageError
from ggufrq.base.progress import progress
from ggufrq.base.results import ResultStore, results_dir
from ggufrq.make.recipe import Recipe, classes
from ggufrq.mlx import names
from ggufrq.mlx.bits import BITS, OF_BITS, WHOLE
from ggufrq.mlx.fold import calibration, replaced
from ggufrq.mlx.names import GROUP
from ggufrq.search.sensitivity import solve
from ggufrq.search.sensitivity.parts import as_recipe
from ggufrq.search.sensitivity.solve import Assignment, Budget, Problem
from ggufrq.search.sensitivity.trials import NOTHING, Measured

#: The text that is chosen on: so many pieces of so many tokens.
PIECES, TOKENS = 4, 256
_OPTIONS = (*BITS, WHOLE)
_BEST, _DROPPED, _WIDTH, _ROUNDS = 4, 3, 8, 8


def solved(model: Any, tokenizer: Any, budget: Budget, key: str, overhead: int) -> Recipe:
    """The recipe with the least loss whose model is within a budget: bits per weight over all tensors, or
    bytes of all files, ``overhead`` of which are no tensors. ``key`` tells the model from others.

    Raises UsageError for a budget that is too small, or needs nothing quantized.
    """
    search = _Search(model, budget, key, calibration(tokenizer, PIECES, TOKENS), overhead)
    return search.run()


class _Search:
    def __init__(self, model: Any, budget: Budget, key: str, ids: mx.array, overhead: int) -> None:
        self.model, self.budget, self.ids = model, budget, ids
        self.inventory = names.inventory(model)
        self.units = classes(self.inventory)
        self.paths = names.modules(model)
        self.modules = dict(model.named_modules())
        self.store = ResultStore(results_dir())
        self.facts = {"what": "mlx weights", "model": key, "mlx": version("mlx"), "tokens": list(ids.shape)}
        self.exact: mx.array | None = None
        every = {name: self.modules[path].weight for name, path in self.paths.items()}
        chosen = {tensor.name for unit in self.units.values() for tensor in unit}
        rest = sum(x.nbytes for _, x in _parameters(model)) - sum(every[name].nbytes for name in chosen)
        weights = sum(x.size for _, x in _parameters(model))
        self.sizes = [
            [sum(_bytes(every[tensor.name], bits) for tensor in unit) for bits in _OPTIONS]
            for unit in self.units.values()
        ]
        if budget.bpw is not None:
            self.capacity = math.floor(budget.bpw * weights / 8) - rest
        else:
            assert budget.size is not None
            self.capacity = budget.size - rest - overhead
        over = sum(map(min, self.sizes)) - self.capacity
        if over > 0:
            raise UsageError(
                f"{budget.text} are too few: in the fewest bits it takes {budget.raised(over, weights)}",
                remedy="a larger budget",
            )
        if sum(map(max, self.sizes)) <= self.capacity:
            raise UsageError(
                f"{budget.text} hold the model as it is; there is nothing to choose",
                remedy="a smaller budget",
            )

    def run(self) -> Recipe:
        """Measure, and choose."""
        last = len(_OPTIONS) - 1
        singles: list[Assignment] = [
            tuple(option if i == unit else last for i in range(len(self.units)))
            for unit in range(len(self.units))
            for option in range(last)
        ]
        with progress("Measuring", len(singles) + _BEST + _DROPPED + _WIDTH, unit="recipes") as bar:
            measured = self._measure(singles, bar)
            costs = [
                solve.real_costs([*measured[i * last : (i + 1) * last], NOTHING])
                for i in range(len(self.units))
            ]
            problem = Problem(self.sizes, costs, self.capacity)

            def measure(chosen: Sequence[Assignment]) -> list[Measured]:
                bar.expect(bar.done + len(chosen))
                return self._measure(chosen, bar)

            first = solve.start(problem, _BEST, _DROPPED)
            found = solve.search(problem, first, measure, width=_WIDTH, rounds=_ROUNDS)
        best = min(found, key=lambda chosen: found[chosen].kld)
        kld = found[best]
        log.say(f"sensitivity-{self.budget.name}: mean KLD {kld.kld:.5f} ± {kld.kld_err:.5f}")
        types = {name: OF_BITS[bits] for name, bits in self._bits(best).items()}
        said = f"chosen by measurement on mlx: at most {self.budget.text}"
        return as_recipe(f"sensitivity-{self.budget.name}", said, self.inventory, types, imatrix=False)

    def _bits(self, chosen: Assignment) -> dict[str, int]:
        """Bits by name in GGUF."""
        pairs = zip(self.units.values(), chosen, strict=True)
        return {tensor.name: _OPTIONS[option] for unit, option in pairs for tensor in unit}

    def _measure(self, every: Sequence[Assignment], bar: progress) -> list[Measured]:
        found = []
        for chosen in every:
            bits = self._bits(chosen)
            facts = {**self.facts, "bits": {name: n for name, n in bits.items() if n != WHOLE}}
            row = self.store.get(facts)
            if row is None:
                row = self._divergence(bits)
                self.store.put(facts, row)
            found.append(Measured(row["kld"], row["kld_err"], 0.0, 0.0, 0.0))
            bar.advance()
        return found

    def _divergence(self, bits: Mapping[str, int]) -> dict[str, float]:
        if self.exact is None:
            self.exact = self._predictions()
        changed = {
            self.paths[name]: self.modules[self.paths[name]].to_quantized(group_size=GROUP, bits=n)
            for name, n in bits.items()
            if n != WHOLE
        }
        with replaced(self.model, changed):
            now = self._predictions()
        each = (mx.exp(self.exact) * (self.exact - now)).sum(axis=-1)
        error = mx.sqrt(mx.var(each) / each.size)
        return {"kld": float(each.mean().item()), "kld_err": float(error.item())}

    def _predictions(self) -> mx.array:
        """Log-probabilities [pieces, tokens, vocabulary]."""
        logits = self.model(self.ids).astype(mx.float32)
        found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(found)
        return found


def _parameters(model: Any) -> list[tuple[str, mx.array]]:
    found: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return found


def _bytes(weight: mx.array, bits: int) -> int:
    """Bytes of a weight in so many bits, with a scale and a bias for each group."""
    if bits == WHOLE:
        return int(weight.nbytes)
    return int(weight.size * bits // 8 + 2 * weight.itemsize * (weight.size // GROUP))

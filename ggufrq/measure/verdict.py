"""When a difference is one: only beyond twice its standard error is anything called better or worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WORSE, BETTER, NONE = "worse", "better", "no difference seen"
#: Mean divergences (nats per token) up to which a loss is called so, and what is beyond: there Gemma 3 270M
#: and Qwen2.5-Coder-1.5B are lost (docs/real-models.md).
LOSSES = ((0.002, "next to none"), (0.01, "small"), (0.05, "moderate"), (0.3, "large"))
RUINOUS = "ruinous"
#: Standard errors that a difference has to exceed: about 95 % of chance lies within.
BEYOND = 2.0
#: Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom, used where errors come from few
#: values; beyond these, BEYOND.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


@dataclass(frozen=True)
class Difference:
    """A difference with its standard error; ``beyond`` times that is what chance may do."""

    value: float
    error: float
    beyond: float = BEYOND

    def verdict(self, *, more_is_worse: bool) -> str:
        """``worse``, ``better``, or ``no difference seen``."""
        if abs(self.value) <= self.beyond * self.error:
            return NONE
        return WORSE if (self.value > 0) == more_is_worse else BETTER


def loss_in_words(kld: float) -> str:
    """What a mean divergence comes to: ``next to none`` to ``ruinous``."""
    return next((words for most, words in LOSSES if kld <= most), RUINOUS)


def between(a: float, a_error: float, b: float, b_error: float) -> Difference:
    """``a - b`` with both errors. Errors of runs over the same text go together, so that this one is rather
    too large than too small."""
    return Difference(a - b, math.hypot(a_error, b_error))


def paired(differences: Sequence[float]) -> Difference | None:
    """The mean of differences taken pair by pair; None for fewer than two, which have no error."""
    n = len(differences)
    if n < 2:
        return None
    mean = sum(differences) / n
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return Difference(mean, error, _STUDENT[n - 2] if n - 2 < len(_STUDENT) else BEYOND)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is 0."""
    mean = sum(values) / len(values)
    spread = paired(values)
    return mean, spread.error if spread is not None else 0.0

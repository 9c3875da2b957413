"""A family for mlx-lm: a model in several bits and by recipes, a folder each, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ggufrq.base import log
from ggufrq.make.recipe import Recipe
from ggufrq.make.record import require_free
from ggufrq.mlx import weights
from ggufrq.mlx.weights import Made, Request
from ggufrq.models.resolve import resolve
from ggufrq.search.sensitivity.solve import Budget


def requests(request: Request, whats: Sequence[int | Recipe | Budget]) -> list[Request]:
    """A request for each of ``whats``, else like ``request``, whose folder, or NAME-mlx, holds them all."""
    folder = request.out or Path(f"{resolve(request.model).name}-mlx")
    each = [replace(request, what=what) for what in whats]
    return [replace(one, out=folder / one.name) for one in each]


def quantize(family: Sequence[Request]) -> list[Made]:
    """Make them one after the other; those that are there already are kept, as ``weights.quantize`` does.

    What can be planned is planned before anything is made, so that one that cannot be had, or a disk that is
    too small for all, is told first. Raises as ``weights.quantize``, GgufrqError for the disk.
    """
    folder = family[0].folder.parent
    plans = [weights.plan(one) for one in family if not isinstance(one.what, Budget)]
    todo = [plan for plan in plans if not (folder / plan.name).exists()]
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    require_free(there, sum(plan.bytes for plan in todo), folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, one in enumerate(family, 1):
        log.say(f"{one.name}, {number} of {len(family)}")
        made.append(weights.quantize(one))
    return made

"""Runs a plan, and gives its result as one dict. What is known from an earlier run is not done again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ggufrq.base import paths
from ggufrq.base.errors import ToolError
from ggufrq.base.progress import progress
from ggufrq.base.results import file_sha256
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.drive.cache_check import CacheError, held_cases
from ggufrq.drive.profiles import settle_cases
from ggufrq.ggufs.files import model_header
from ggufrq.measure.divergence import subject_of
from ggufrq.measure.kept import Row
from ggufrq.measure.validate.assemble import Facts, Taken, assemble
from ggufrq.measure.validate.check import Check, cache_check, unmeasured
from ggufrq.measure.validate.pieces import Unit, Workshop
from ggufrq.measure.validate.plan import ValidationPlan, within


def validate(
    plan: ValidationPlan, build: Build, *, out: Path | None = None, fresh: bool = False
) -> dict[str, Any]:
    """Run what the plan says, and return the result (``assemble`` describes it).

    Raw logs go to ``out/logs`` (None: the cache). A case that fails is told of in the result, and the others
    go on. Raises ToolError when the base fails, UsageError and ModelError for what cannot be measured at all.
    """
    facts = look(plan)
    plan = within(plan, facts.n_ctx_train)
    longest = max(*plan.settings.ctx, plan.settings.server_ctx)
    cases = held_cases(plan.cases, facts.model.path)
    plan = replace(plan, cases=tuple(settle_cases(cases, facts.model.path, longest, build)))
    logs = (out or paths.logs_dir() / f"validate-{facts.model.name}") / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (
        progress("Validating", unit="tokens") as bar,
        Workshop(
            plan,
            facts.model,
            build,
            logs,
            bar,
            fresh=fresh,
        ) as work,
    ):
        taken = _run(work, bar)
    return assemble(plan, facts, build, taken)


def look(plan: ValidationPlan) -> Facts:
    """What there is to know of the plan's model. Raises ModelError."""
    model = subject_of(plan.model)
    header = model_header(model.path)
    arch = str(header.values.get("general.architecture", ""))
    longest = header.values.get(f"{arch}.context_length")
    return Facts(
        model,
        arch,
        sum(tensor.values for tensor in header.tensors),
        int(longest) if isinstance(longest, int) else None,
        file_sha256(plan.text),
    )


def _run(work: Workshop, bar: progress) -> Taken:
    units = work.units()
    rows: dict[Unit, Row] = {}
    failures: dict[Case, str] = {}
    checks: list[Check] = []
    if not work.fresh:
        rows = {unit: row for unit in units if (row := work.kept(unit)) is not None}
    bar.update(0, total=sum(unit.tokens for unit in units if unit not in rows))
    planned = 0
    for unit in units:
        if unit in rows:
            _old_log(work, unit)
            continue
        planned += unit.tokens
        if unit.case is None or unit.case not in failures:
            try:
                rows[unit] = work.take(unit)
            except ToolError as error:
                if unit.case == work.plan.base:
                    raise
                if unit.case is None:
                    checks.append(unmeasured(unit.section, error.message))
                    continue
                failures[unit.case] = error.message
                if isinstance(error, CacheError):
                    checks.append(cache_check(unit.case, error.message, ok=False))
        bar.update(planned)  # what failed is not left to do either
    return Taken(rows, failures, checks, work.logs)


def _old_log(work: Workshop, unit: Unit) -> None:
    """Beside the report lie the logs of all that is in it, those of earlier runs too."""
    kept, here = work.results.log(unit.facts), work.logs / f"{unit.name}.log"
    if kept is not None and not here.is_file():
        paths.atomic_write(here, kept.read_bytes())

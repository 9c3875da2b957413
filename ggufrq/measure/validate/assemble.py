"""The result of a validation as one dict of plain values: what ``report.json`` holds and the report shows.

Its parts: ``subject``, ``machine``, ``text``, ``settings``; ``cases``, each with its sections (None where not
measured) and verdicts against the base; ``comparisons`` between the other cases; ``checks`` of the build;
``notes``; ``commands`` and ``again`` to repeat it all; ``logs``. Shares are 0 to 1, divergences and
log-probabilities in nats, sizes in bytes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

from ggufrq import __version__
from ggufrq.base import machine
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.ggufs.files import file_bytes
from ggufrq.measure.divergence import Subject
from ggufrq.measure.kept import Row
from ggufrq.measure.validate import compare
from ggufrq.measure.validate.check import Check, cache_check
from ggufrq.measure.validate.pieces import Unit
from ggufrq.measure.validate.plan import ValidationPlan
from ggufrq.measure.verdict import between

FORMAT = 1


@dataclass(frozen=True)
class Facts:
    """The model as its file describes it."""

    model: Subject
    arch: str
    parameters: int
    n_ctx_train: int | None
    text_sha256: str


@dataclass(frozen=True)
class Taken:
    """What was measured: rows by unit, why cases failed, checks that failed on the way, where logs lie."""

    rows: dict[Unit, Row]
    failures: dict[Case, str]
    checks: list[Check]
    logs: Path

    def of(self, section: str, case: Case | None = None) -> list[Row]:
        """Rows of a section, of one case, with the names of their logs."""
        return [
            {**row, "log": f"logs/{unit.name}.log"}
            for unit, row in self.rows.items()
            if (unit.section, unit.case) == (section, case)
        ]

    def one(self, section: str, case: Case | None = None) -> Row | None:
        """The only row of a section, or None."""
        return next(iter(self.of(section, case)), None)


def assemble(plan: ValidationPlan, facts: Facts, build: Build, taken: Taken) -> dict[str, Any]:
    """The result; see above."""
    cases = [_case(plan, case, taken, facts) for case in plan.cases]
    checks = [*_checks(plan, taken), *taken.checks]
    settings = asdict(plan.settings)
    model = facts.model
    return {
        "format": FORMAT,
        "ggufrq": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(sum(row.get("seconds", 0.0) for row in taken.rows.values()), 1),
        "subject": {
            "name": model.name,
            "file": model.path.name,
            "sha256": model.sha256,
            "weights": model.weights,
            "file_bytes": file_bytes(model.path),
            "arch": facts.arch,
            "parameters": facts.parameters,
            "n_ctx_train": facts.n_ctx_train,
            "kv_layers": model.shape.layers if model.shape else None,
            "k_values": model.shape.k_values if model.shape else None,
            "v_values": model.shape.v_values if model.shape else None,
        },
        "machine": {
            "cpu": build.manifest.get("cpu") or platform.processor(),
            "cores": os.cpu_count(),
            "system": machine.system(),
            "llama_cpp": build.manifest.get("llama_cpp", {}).get("commit"),
            "patch_set": build.manifest.get("patch_set"),
            "build": build.key,
        },
        "text": {"file": plan.text.name, "sha256": facts.text_sha256},
        "settings": {**settings, "sections": list(plan.sections)},
        "base": plan.base.name,
        "cases": cases,
        "comparisons": list(_comparisons(cases)),
        "checks": checks,
        "notes": compare.notes(cases, checks, facts.n_ctx_train, model.shape is not None),
        "commands": list(_commands(taken)),
        "again": plan.again,
        "logs": sorted(f"logs/{path.name}" for path in taken.logs.glob("*.log")),
    }


def failed(result: dict[str, Any]) -> list[str]:
    """One sentence for each check that failed and each case that could not be measured."""
    told = [
        f"{check['case'] or 'build'}: {check['check']}: {check['what']}: {check['found']} "
        f"(expected {check['expected']})"
        for check in result["checks"]
        if not check["ok"]
    ]
    known = {check["found"] for check in result["checks"]}
    errors = [case for case in result["cases"] if case["error"] and case["error"] not in known]
    return told + [f"{case['name']}: {case['error']}" for case in errors]


def _case(plan: ValidationPlan, case: Case, taken: Taken, facts: Facts) -> dict[str, Any]:
    base = plan.base
    quality = sorted(taken.of("quality", case), key=lambda row: int(row["ctx"]))
    served = [row for name in ("greedy", "needle", "retrieval", "sanity") if (row := taken.one(name, case))]
    speed = taken.one("speed")
    memory = _memory(quality, served, facts)
    pairs = {name: (taken.one(name, case), taken.one(name, base)) for name in compare.SECTIONS}
    noise = {row["ctx"]: (row["kld_mean"], row["kld_mean_err"]) for row in taken.of("quality", base)}
    return {
        "name": case.name,
        "spec": case.spec,
        "type_k": case.pair.k.name,
        "type_v": case.pair.v.name,
        "mode": next((row["mode"] for row in [*quality, *served]), None),
        "profile": case.plan.file.name if case.plan.file is not None else None,
        "profile_source": next((row.get("profile_source") for row in quality), None),
        "recent": case.plan.recent,
        "first": case.plan.first,
        "layers": case.plan.name.partition("; ")[2] or None,
        "environment": case.shown(),
        "ours": case.ours,
        "is_base": case == base,
        "bits_per_value": memory["bits_per_value"] if memory else None,
        "error": taken.failures.get(case),
        "memory": memory,
        "quality": [_quality(row, noise.get(row["ctx"]), case == base) for row in quality] or None,
        **{
            name: compare.SECTIONS[name](mine, theirs, is_base=case == base) if mine and theirs else None
            for name, (mine, theirs) in pairs.items()
        },
        "speed": speed["cases"].get(case.name) if speed else None,
    }


def _memory(quality: list[Row], served: list[Row], facts: Facts) -> dict[str, Any] | None:
    found = quality[-1] if quality else served[0]["memory"] if served else None
    if found is None:
        return None
    size, tokens, bits = found["cache_bytes"], found["cache_tokens"], found["bits_per_value"]
    return {
        "cache_bytes": size,
        "cache_tokens": tokens,
        "bytes_per_token": size / tokens if size else None,
        "bits_per_value": bits,
        "of_f16": bits / 16 if bits else None,
        "recurrent_mib": found["recurrent_mib"],
    }


_QUALITY = (
    "ctx", "chunks", "scored", "ppl", "ppl_err", "ppl_base", "ln_ratio", "ln_ratio_err", "kld_mean",
    "kld_mean_err", "kld_median", "kld_p99", "kld_p999", "kld_max", "same_top", "same_top_err", "command",
    "log", "seconds",
)  # fmt: skip


def _quality(row: Row, noise: tuple[float, float] | None, is_base: bool) -> dict[str, Any]:
    """A divergence is judged against the base's own, run against itself: what rounding alone does."""
    found = {name: row[name] for name in _QUALITY}
    ppl = kld = None
    if not is_base and noise is not None:
        ppl = between(row["ln_ratio"], row["ln_ratio_err"], 0.0, 0.0).verdict(more_is_worse=True)
        kld = between(row["kld_mean"], row["kld_mean_err"], *noise).verdict(more_is_worse=True)
    return {**found, "verdict_ppl": ppl, "verdict_kld": kld}


def _comparisons(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    measured = [case for case in cases if case["quality"] and not case["is_base"]]
    for a, b in combinations(measured, 2):
        theirs = {row["ctx"]: row for row in b["quality"]}
        for row in a["quality"]:
            other = theirs.get(row["ctx"])
            if other is None:
                continue
            found = between(row["kld_mean"], row["kld_mean_err"], other["kld_mean"], other["kld_mean_err"])
            yield {
                "a": a["name"],
                "b": b["name"],
                "ctx": row["ctx"],
                "figure": "kld_mean",
                "difference": found.value,
                "error": found.error,
                "verdict": found.verdict(more_is_worse=True),
            }


def _checks(plan: ValidationPlan, taken: Taken) -> list[Check]:
    found: list[Check] = []
    for row in (taken.one("code"), taken.one("loss")):
        found += row["checks"] if row else []
    for case in plan.cases:
        rows = taken.of("quality", case)
        if rows:
            sizes = ", ".join(
                f"{row['cache_bytes']:,} bytes for {row['cache_tokens']:,} tokens" for row in rows
            )
            kinds = f"{rows[0]['type_k']}/{rows[0]['type_v']}, rotation {rows[0]['mode']}"
            found.append(cache_check(case, f"{kinds}, {sizes}", ok=True))
    return found


def _commands(taken: Taken) -> list[str]:
    every: list[str] = []
    for row in taken.rows.values():
        every += [row["base_command"]] if "base_command" in row else []
        every += [row["command"]] if "command" in row else []
        every += row.get("commands", [])
        for case in row.get("cases", {}).values():
            every += case.get("commands", [])
    return list(dict.fromkeys(every))

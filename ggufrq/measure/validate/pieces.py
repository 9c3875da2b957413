"""The pieces that a validation is made of: each with all that it depends on, so that it is done once."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ggufrq.base import texts
from ggufrq.base.progress import Listener, Part
from ggufrq.base.results import ResultStore, file_sha256, results_dir
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.measure.base_run import Scored
from ggufrq.measure.divergence import Divergences, Subject
from ggufrq.measure.kept import Row
from ggufrq.measure.validate import check, generation
from ggufrq.measure.validate.client import Client, Served, serving
from ggufrq.measure.validate.plan import SERVED, ValidationPlan, ValidationSettings

_VERSION = 2

_ASK: dict[str, Callable[[Client, str, ValidationSettings, Listener], Row]] = {
    "greedy": generation.greedy,
    "needle": generation.needle,
    "retrieval": generation.retrieval,
    "sanity": generation.sanity,
}
#: Settings that a section depends on, beside the seed and the context of the server.
_DEPENDS = {
    "greedy": ("greedy_prompts", "greedy_prompt_tokens", "greedy_tokens"),
    "needle": ("needle_ctx", "needle_depths", "needle_repeats"),
    "retrieval": ("retrieval_ctx", "retrieval_keys"),
    "sanity": ("sanity_prompts", "sanity_tokens", "greedy_prompt_tokens"),
}


@dataclass(frozen=True)
class Unit:
    """``section`` of ``case`` (None: of the whole run). ``tokens`` is about how much work it is, ``name``
    that of its log; ``key`` tells units of a section and case apart (the context)."""

    section: str
    case: Case | None
    facts: dict[str, Any] = field(hash=False)
    tokens: int
    name: str
    key: int = 0


@dataclass
class Workshop:
    """Does units, with ``fresh`` as if none of their parts were known. ``logs`` is where the raw logs go;
    ``listener`` is told how it goes on, in tokens."""

    plan: ValidationPlan
    model: Subject
    build: Build
    logs: Path
    listener: Listener
    fresh: bool = False
    results: ResultStore = field(default_factory=lambda: ResultStore(results_dir()))

    def __post_init__(self) -> None:
        self._text_sha256 = file_sha256(self.plan.text)
        self._stack = ExitStack()
        self._server: tuple[Case, Served] | None = None
        self._servers = ExitStack()
        self._runs: dict[int, Divergences] = {}

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.close()
        self._stack.close()

    def units(self) -> list[Unit]:
        """All units of the plan, in the order in which they are best done."""
        plan, s, found = self.plan, self.plan.settings, list[Unit]()
        ours = [case for case in plan.cases if case.ours]
        if "check" in plan.sections and check.types_of(ours):
            runs = check.loss_runs(ours)
            shared = {"version": _VERSION, "specification": check.specification()}
            facts = {
                **shared,
                "what": "loss",
                "runs": [self._check_runs().facts(case) for case in runs],
                "limits": [check.LEAST, check.MARGIN],
            }
            types = {
                **shared,
                "what": "code",
                "types": check.types_of(ours),
                "build": self.build.key,
            }
            found.append(Unit("code", None, types, 0, "check-code"))
            tokens = s.check_ctx * s.check_chunks * len(runs)
            found.append(Unit("loss", None, facts, tokens, "check-loss"))
        if "quality" in plan.sections:
            for ctx in s.ctx:
                for case in plan.cases:
                    facts = self._quality_runs(ctx).facts(case)
                    name = f"quality-{_file_name(case)}-{ctx}"
                    found.append(Unit("quality", case, facts, ctx * s.chunks, name, ctx))
        for case in plan.cases:
            for section in SERVED:
                if section in plan.sections:
                    name = f"server-{_file_name(case)}"
                    found.append(
                        Unit(section, case, self._served_facts(section, case), _tokens(section, s), name)
                    )
        if "speed" in plan.sections:
            found.append(self._speed_unit())
        return found

    def kept(self, unit: Unit) -> Row | None:
        """The result of an earlier run, or None."""
        return self.results.get(unit.facts)

    def take(self, unit: Unit) -> Row:
        """Do a unit now, and keep its result."""
        if unit.section in SERVED:
            return self._ask(unit)
        self._servers.close()
        log = self.logs / f"{unit.name}.log"
        log.unlink(missing_ok=True)  # programs add to it
        if unit.section == "quality":
            assert unit.case is not None
            return self._quality(unit, unit.case, log)
        if unit.section == "speed":
            row = self._speed(unit, log)
        elif unit.section == "code":
            self.listener.step("self-check: the build's codes and attention against the specification")
            row = {"checks": check.probe(self.build, unit.facts["types"], log)}
        else:
            row = self._losses(unit, log)
        self.results.put(unit.facts, row, log)
        return row

    def _quality(self, unit: Unit, case: Case, log: Path) -> Row:
        texts = Part(self.listener, unit.key)
        return self._quality_runs(unit.key).take(case, log=log, listener=texts)

    def _losses(self, unit: Unit, log: Path) -> Row:
        ours = [case for case in self.plan.cases if case.ours]
        runs, cases = self._check_runs(), check.loss_runs(ours)
        listener = Part(self.listener, unit.tokens // len(cases))
        checks = check.losses(runs, ours, listener, log, fresh=self.fresh)
        commands = [runs.command(case) for case in cases]
        return {"checks": checks, "commands": [runs.command(runs.base, divergence=False), *commands]}

    def _ask(self, unit: Unit) -> Row:
        case = unit.case
        assert case is not None
        log = self.logs / f"{unit.name}.log"
        if self._server is None or self._server[0] != case:
            self._servers.close()
            self.listener.step(f"{case.name}: starting a server")
            s = self.plan.settings
            served = self._servers.enter_context(
                serving(case, self.model, self.build, n_ctx=s.server_ctx, threads=s.threads, log=log)
            )
            self._servers.callback(self._forget)
            self._server = case, served
        served = self._server[1]
        self.listener.step(f"{case.name}: {unit.section}")
        text = texts.read(self.plan.text)
        began = time.monotonic()
        row = _ASK[unit.section](served.client, text, self.plan.settings, self.listener)
        row = {**row, "memory": served.memory, "mode": served.mode, "command": served.command}
        row["seconds"] = round(time.monotonic() - began, 1)
        self.results.put(unit.facts, row, log)
        return row

    def _forget(self) -> None:
        self._server = None

    def _served_facts(self, section: str, case: Case) -> dict[str, Any]:
        settings = asdict(self.plan.settings)
        return {
            "version": _VERSION,
            "what": section,
            "model": self.model.sha256,
            "build": self.build.key,
            "text": self._text_sha256,
            "case": case.facts(),
            "seed": settings["seed"],
            "threads": settings["threads"],
            "ctx": self.plan.settings.server_ctx,
            **{name: settings[name] for name in _DEPENDS[section]},
        }

    def _quality_runs(self, ctx: int) -> Divergences:
        if ctx not in self._runs:
            s = self.plan.settings
            # one text at a time: the logits of several at once take gigabytes on a large vocabulary
            scored = Scored(ctx, s.chunks, together=1, threads=s.threads)
            self._runs[ctx] = self._stack.enter_context(
                Divergences(self.model, self.build, self.plan.text, scored, base=self.plan.base)
            )
        return self._runs[ctx]

    def _check_runs(self) -> Divergences:
        if 0 not in self._runs:
            s = self.plan.settings
            scored = Scored(s.check_ctx, s.check_chunks, threads=s.threads)
            self._runs[0] = self._stack.enter_context(
                Divergences(self.model, self.build, self.plan.text, scored)
            )
        return self._runs[0]

    def _speed_unit(self) -> Unit:
        from ggufrq.measure.validate import speed

        s = self.plan.settings
        settings = speed.SpeedSettings(
            s.speed_depths, s.speed_prompt, s.speed_generate, s.speed_rounds, s.threads
        )
        facts = {
            "version": _VERSION,
            "what": "speed",
            "model": self.model.sha256,
            "build": self.build.key,
            "cases": [case.facts() for case in self.plan.cases],
            "settings": asdict(settings),
        }
        steps = speed.speed_steps(self.plan.cases, settings)
        each = s.speed_prompt + s.speed_generate + max(s.speed_depths) // 2
        return Unit("speed", None, facts, steps * each, "speed")

    def _speed(self, unit: Unit, log: Path) -> Row:
        from ggufrq.measure.validate import speed

        settings = speed.SpeedSettings(**unit.facts["settings"])
        found = speed.measure_speed(
            self.model.path,
            self.plan.cases,
            self.build,
            settings,
            log=log,
            listener=Part(self.listener, unit.tokens // speed.speed_steps(self.plan.cases, settings)),
        )
        return {"cases": found}


def _tokens(section: str, s: ValidationSettings) -> int:
    return {
        "greedy": s.greedy_prompts * (s.greedy_prompt_tokens + s.greedy_tokens),
        "needle": sum(s.needle_ctx) * len(s.needle_depths) * s.needle_repeats,
        "retrieval": s.retrieval_ctx,
        "sanity": s.sanity_prompts * (s.greedy_prompt_tokens + s.sanity_tokens),
    }[section]


def _file_name(case: Case) -> str:
    """The case's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in case.name)

"""What is measured against what: types of a cache, and whatever else decides how llama.cpp keeps it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggufrq.base.errors import UsageError
from ggufrq.base.results import file_sha256
from ggufrq.cache.kv import PROFILE_VARIABLE, KvPair, KvPlan, Sought, parse_plan

#: Chooses the rotation of the patched llama.cpp.
MODE_VARIABLE = "LLAMA_RQ_MODE"
#: How it scales a block, and what that may be other than usual: least squares, or the norm as published.
SCALE_VARIABLE = "LLAMA_RQ_SCALE"
SCALES = ("lsq", "norm")
#: What ``MODE_VARIABLE`` may be, also K/V apart: ``full/block``.
MODES = ("full", "block", "hadamard", "none")
_CASE = re.compile(r"(?P<types>[^:;+]+)(?P<modes>(?::[^:;+]+)*)(?P<marks>(?:\+[^:;+]+)*)(?P<layers>;.*)?")
_EXACT = re.compile(r"(recent|first)(\d{1,5})")


@dataclass(frozen=True)
class Case:
    """The types of a cache layer by layer, and the rotation mode and the scale where they are not the usual
    ones."""

    plan: KvPlan
    mode: str | None = None
    scale: str | None = None

    @property
    def pair(self) -> KvPair:
        """The types of all layers that are not named apart."""
        return self.plan.base

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return " ".join(self._words()) + self._layers()

    @property
    def spec(self) -> str:
        """As it is written on the command line."""
        return ":".join(self._words()).replace(":+", "+") + self._layers()

    @property
    def ours(self) -> bool:
        """Whether it takes the patched llama.cpp."""
        return self.plan.ours

    def environment(self) -> dict[str, str | None]:
        """Variables for llama.cpp's programs; None unsets one that the user may have set."""
        return {
            MODE_VARIABLE: self.mode,
            SCALE_VARIABLE: self.scale,
            # upstream's rotation of its own types has no other switch
            "LLAMA_ATTN_ROT_DISABLE": "1" if self.mode == "none" else None,
            **self.plan.environment(),
        }

    def shown(self) -> dict[str, str]:
        """The variables that are set, with files by their names alone."""
        file = self.plan.file
        named = {} if file is None else {PROFILE_VARIABLE: file.name}
        return {name: value for name, value in {**self.environment(), **named}.items() if value}

    def facts(self) -> dict[str, Any]:
        """What results of this case depend on, beside the model and the settings."""
        facts: dict[str, Any] = {"k": self.pair.k.name, "v": self.pair.v.name, "mode": self.mode}
        if self.scale:
            facts["scale"] = self.scale
        if self.plan.file is not None:
            facts["profile"] = file_sha256(self.plan.file)
        if self.plan.layered:
            facts["layers"] = self.plan.name
        exact = {"recent": self.plan.recent, "first": self.plan.first}
        facts |= {name: tokens for name, tokens in exact.items() if tokens}
        return facts

    def _words(self) -> list[str]:
        return [word for word in (self.pair.name, self.mode, self.scale, *self.plan.marks) if word]

    def _layers(self) -> str:
        return self.plan.name[len(self.pair.name) :] if self.plan.layered else ""


def parse_case(text: str, profile: Path | Sought | None = None) -> Case:
    """``iso3``, ``iso3/planar4``; with a rotation mode and a scale ``iso3:block``, ``iso3:block:norm``; with
    layers that differ ``iso3; 0-1:q8_0``; with a profile ``iso3+profile`` (``profile``, or the model's); with
    the first token and the newest 32 in f16 ``iso3+first1+recent32``; ``iso3+plain`` with none of these.

    Raises UsageError.
    """
    return _parse(text, profile)[0]


def parse_cases(
    text: str, profile: Path | Sought | None = None, recent: int | None = 0, first: int | None = 0
) -> list[Case]:
    """Cases with commas between, as ``iso3,iso4; 0,-1:q8_0,f16``; each once.

    A profile is for the cases that are written with ``+profile``, or when none is, for all with K in a type
    of ours that are not ``+plain``; ``recent`` newest and ``first`` tokens likewise for those with K or V in
    one, None being as many as usual where no case is written with some. Raises UsageError.
    """
    parts = [part for part in re.split(r",\s*(?![\s\d-])", text) if part.strip()]
    parsed = [_parse(part, profile) for part in parts]
    if any(case.plan.profile for case, _ in parsed):
        profile = None
    written = [(case.plan.recent, case.plan.first) for case, _ in parsed]
    if any(map(any, written)):
        recent, first = recent or 0, first or 0
    recent = 0 if any(newest for newest, _ in written) else recent
    first = 0 if any(oldest for _, oldest in written) else first

    def completed(case: Case) -> Case:
        plan = case.plan
        if profile is not None and plan.k_ours:
            plan = plan.with_profile(profile)
        if plan.rotated:
            plan = plan.with_wished(plan.recent or recent, plan.first or first)
        return replace(case, plan=plan)

    return list(dict.fromkeys(case if plain else completed(case) for case, plain in parsed))


def _parse(text: str, profile: Path | Sought | None) -> tuple[Case, bool]:
    """A case, and whether it is marked as plain."""
    found = _CASE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"'{text}' is not a case", remedy="iso3, iso3:block, iso3/planar4 or 'iso3; 0:q8_0'")
    modes = [mode.strip() for mode in found["modes"].split(":")[1:]]
    scale = modes.pop() if modes and modes[-1] in SCALES else None
    if len(modes) > 1:
        raise UsageError(f"'{':'.join(modes)}' is no rotation mode", remedy=f"one of {', '.join(MODES)}")
    plan = parse_plan(found["types"] + (found["layers"] or ""))
    marks = [mark.strip() for mark in found["marks"].split("+")[1:]]
    exact = {"recent": 0, "first": 0}
    for mark in marks:
        tokens = _EXACT.fullmatch(mark)
        if mark in ("profile", "calib"):
            plan = plan.with_profile(profile or Sought.AUTO)
        elif tokens is not None:
            exact[tokens[1]] = int(tokens[2])
        elif mark != "plain" or len(marks) > 1:
            raise UsageError(
                f"'+{'+'.join(marks)}' is nothing that a cache can have",
                remedy="iso3+profile, iso3+first1+recent32, or iso3+plain",
            )
    return Case(plan.with_exact(**exact), modes[0] if modes else None, scale), "plain" in marks


def assignments(environment: Mapping[str, str | None]) -> str:
    """Variables as they stand in front of a command line, with a blank behind."""
    return "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items() if value)

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
from ggufrq.cache.kv import KvPair, KvPlan, parse_plan

#: Chooses the rotation of the patched llama.cpp.
MODE_VARIABLE = "LLAMA_RQ_MODE"
#: How it scales a block, and what that may be other than usual: least squares, or the norm as published.
SCALE_VARIABLE = "LLAMA_RQ_SCALE"
SCALES = ("lsq", "norm")
#: What ``MODE_VARIABLE`` may be, also K/V apart: ``full/block``.
MODES = ("full", "block", "hadamard", "none")
_CASE = re.compile(
    r"(?P<types>[^:;+]+)(?P<marks>(?::[^:;+]+)*)(?P<calib>\+calib)?(?:\+recent(?P<recent>\d{1,5}))?"
    r"\s*(?P<layers>;.*)?"
)


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

    def facts(self) -> dict[str, Any]:
        """What results of this case depend on, beside the model and the settings."""
        facts: dict[str, Any] = {"k": self.pair.k.name, "v": self.pair.v.name, "mode": self.mode}
        if self.scale:
            facts["scale"] = self.scale
        if self.plan.calib is not None:
            facts["calib"] = file_sha256(self.plan.calib)
        if self.plan.layered:
            facts["layers"] = self.plan.name
        if self.plan.recent:
            facts["recent"] = self.plan.recent
        return facts

    def _words(self) -> list[str]:
        calib = "+calib" if self.plan.calib is not None else None
        recent = f"+recent{self.plan.recent}" if self.plan.recent else None
        return [word for word in (self.pair.name, self.mode, self.scale, calib, recent) if word]

    def _layers(self) -> str:
        return self.plan.name[len(self.pair.name) :] if self.plan.layered else ""


def parse_case(text: str, calib: Path | None = None) -> Case:
    """``iso3``, ``iso3/planar4``; with a rotation mode and a scale ``iso3:block``, ``iso3:block:norm``; with
    layers that differ ``iso3; 0-1:q8_0``; with the calibration file ``calib`` ``iso3+calib``; with the newest
    32 tokens in f16 ``iso3+recent32``.

    Raises UsageError.
    """
    found = _CASE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"'{text}' is not a case", remedy="iso3, iso3:block, iso3/planar4 or 'iso3; 0:q8_0'")
    marks = [mark.strip() for mark in found["marks"].split(":")[1:]]
    scale = marks.pop() if marks and marks[-1] in SCALES else None
    if len(marks) > 1:
        raise UsageError(f"'{':'.join(marks)}' is no rotation mode", remedy=f"one of {', '.join(MODES)}")
    if found["calib"] and calib is None:
        raise UsageError(f"'{text}' wants a calibration file", remedy="--kv-calib FILE")
    plan = parse_plan(found["types"] + (found["layers"] or ""))
    if found["calib"]:
        plan = plan.calibrated(calib)
    plan = plan.with_recent(int(found["recent"] or 0))
    return Case(plan, marks[0] if marks else None, scale)


def parse_cases(text: str, calib: Path | None = None, recent: int = 0) -> list[Case]:
    """Cases with commas between, as ``iso3,iso4; 0,-1:q8_0,f16``; each once.

    A calibration file is for the cases that are written with ``+calib``, or when none is, for all with K in a
    type of ours; ``recent`` newest tokens likewise for those with K or V in one. Raises UsageError.
    """
    parts = [part for part in re.split(r",\s*(?![\s\d-])", text) if part.strip()]
    cases = [parse_case(part, calib) for part in parts]
    if calib is not None and not any(case.plan.calib for case in cases):
        cases = [replace(c, plan=c.plan.calibrated(calib)) if c.plan.k_ours else c for c in cases]
    if recent and not any(case.plan.recent for case in cases):
        cases = [replace(c, plan=c.plan.with_recent(recent)) if c.plan.rotated else c for c in cases]
    return list(dict.fromkeys(cases))


def assignments(environment: Mapping[str, str | None]) -> str:
    """Variables as they stand in front of a command line, with a blank behind."""
    return "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items() if value)

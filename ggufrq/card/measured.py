"""Measurements of a family: those that were kept, and those that are made now."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.base import log, paths, texts
from ggufrq.base.errors import ModelError, ToolError
from ggufrq.base.paths import read_json
from ggufrq.build.project import Build
from ggufrq.card.facts import Facts
from ggufrq.measure.kept import Row
from ggufrq.measure.validate.assemble import FORMAT, failed
from ggufrq.measure.validate.plan import make_plan
from ggufrq.measure.weight_quality import WeightQuality, WeightSettings

#: What is measured of the caches; the last is what the family is about.
CASES = ("q8_0", "q4_0", "iso4", "iso3")
_SECTIONS = ("check", "quality", "speed")
#: How weights are measured, usually and with ``quick``.
_USUAL, _QUICK = WeightSettings(), WeightSettings(n_ctx=512, chunks=2)


@dataclass(frozen=True)
class Measured:
    """Rows of weight quality by file name, results of ``ggufrq validate`` (of files of this family only), and
    the name of the file that weights were compared with."""

    weights: Mapping[str, Row]
    results: tuple[dict[str, Any], ...]
    reference: str = ""


def find(facts: Facts, build: Build, reports: Sequence[Path] = ()) -> Measured:
    """What was measured before: weights by this build, caches in ``reports`` and in the folders of the
    family (``*/report.json``). Raises ModelError for a report that is given and is none of this family."""
    return Measured(_kept_weights(facts, build), tuple(_results(facts, reports)), _reference_name(facts))


def measure(facts: Facts, build: Build, *, quick: bool = False) -> None:
    """Measure all models against the one in 16 bits, and caches on the smallest, into the folder of the
    family. What is known is not measured again. Raises ToolError."""
    reference = _reference(facts)
    if reference is None:
        log.say("there is no model in 16 bits to compare with: weights are not measured")
    else:
        settings = _QUICK if quick else _USUAL
        with WeightQuality(reference, build, settings=settings) as quality:
            for file in facts.models:
                log.say(f"measuring {file.name} against {reference.name}")
                quality.row(file.path)
    _measure_caches(facts, build, quick=quick)


def _measure_caches(facts: Facts, build: Build, *, quick: bool) -> None:
    from ggufrq.cache.kv import Sought, kv_types
    from ggufrq.measure.validate.validation import validate
    from ggufrq.report import html

    cases = ",".join(name for name in CASES if facts.takes(kv_types()[name]))
    file = facts.smallest
    again = ["ggufrq", "validate", file.path.name, "--kv", cases, "--sections", ",".join(_SECTIONS)]
    plan = make_plan(
        str(file.path),
        kv=cases,
        profile=Sought.AUTO,
        recent=None,
        first=None,
        sections=_SECTIONS,
        quick=quick,
        again=shlex.join([*again, *(["--quick"] if quick else [])]),
    )
    out = facts.folder / f"validate-{file.path.stem}"
    result = validate(plan, build, out=out)
    wrong = failed(result)
    if wrong:
        raise ToolError("\n".join(["caches could not be measured", *wrong]), remedy=f"see {out / 'logs'}")
    text = texts.to_json(result, indent=1, allow_nan=False) + "\n"
    paths.atomic_write(out / "report.json", text)
    paths.atomic_write(out / "report.html", html.render(result))


def _kept_weights(facts: Facts, build: Build) -> dict[str, Row]:
    reference = _reference(facts)
    if reference is None:
        return {}
    rows: dict[str, Row] = {}
    for settings in (_USUAL, _QUICK):
        with WeightQuality(reference, build, settings=settings) as quality:
            found = {file.name: row for file in facts.models if (row := quality.kept(file.path))}
        if len(found) > len(rows):
            rows = found
        if len(found) == len(facts.models):
            break
    return rows


def _reference(facts: Facts) -> Path | None:
    """The model in 16 bits: of the family's files or, when it is not part of the card, beside them."""
    for file in facts.files:
        if file.is_reference:
            return file.path
    for kind in ("BF16", "F16", "F32"):
        path = facts.folder / f"{facts.base}-{kind}.gguf"
        if path.is_file():
            return path
    return None


def _reference_name(facts: Facts) -> str:
    reference = _reference(facts)
    return reference.stem.removeprefix(f"{facts.base}-") if reference is not None else ""


def _results(facts: Facts, reports: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """One result per file of the family, the newest, in the order of the files; none with a failed check."""
    ours = {sha256: file.name for file in facts.files for sha256 in file.sha256}
    newest: dict[str, dict[str, Any]] = {}
    for path in [*reports, *sorted(facts.folder.glob("*/report.json"))]:
        result = read_json(path) or {}
        sha256 = result.get("subject", {}).get("sha256")
        why = ""
        if result.get("format") != FORMAT or sha256 not in ours:
            why = "it is no report on a file of this family as it is now"
        elif failed(result):
            why = f"its run failed: {failed(result)[0]}"
        if why and path in reports:
            raise ModelError(f"{path}: {why}", remedy=f"ggufrq validate {facts.smallest.path}")
        if why:
            log.say(f"{path} is left out: {why}")
        elif ours[sha256] not in newest or result["date"] > newest[ours[sha256]]["date"]:
            newest[ours[sha256]] = result
    for file in facts.files:
        if file.name in newest:
            yield newest[file.name]

"""The section of a card that says which cache to take at which memory, from what ``ggufrq advise`` has
measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ggufrq.advise import ladder
from ggufrq.base import paths
from ggufrq.build.project import Build
from ggufrq.cache.cases import parse_cases
from ggufrq.cache.kv import Sought, parse_plan
from ggufrq.card.facts import CardFile, Facts
from ggufrq.card.files import MEMORIES, SPARE, needed, usual_tokens
from ggufrq.card.markdown import code, section, table
from ggufrq.drive.cache_check import held_cases
from ggufrq.measure.divergence import subject_of
from ggufrq.measure.verdict import RUINOUS
from ggufrq.report import numbers

Data = Mapping[str, Any]
_TITLE = "Which cache at which memory"


def measure(facts: Facts, build: Build, *, quick: bool = False) -> None:
    """Measure the usual caches on the smallest model, unless they were. Raises ToolError."""
    if facts.shape is None or ladder.kept(facts.smallest.path, build) is not None:
        return
    ladder.climb(
        subject_of(str(facts.smallest.path)),
        held_cases(parse_cases(ladder.DEFAULT_KV, Sought.AUTO, None, None), facts.smallest.path),
        build,
        ladder.Wishes(usual_tokens(facts)),
        paths.data_dir("texts") / "heldout.txt",
        chunks=1 if quick else 2,
        log=paths.logs_dir() / "advise.log",
    )


def caches(facts: Facts, advice: Data | None) -> str:
    """For each usual size of memory and each file the cache that loses least of those that fit. ``advice`` is
    what was measured, see ``ladder.kept``."""
    if facts.shape is None:
        return ""
    if advice is None:
        command = code(f"ggufrq advise {facts.smallest.path.name}")
        return section(_TITLE, f"Not measured on this model yet: {command} does, and so does --measure.")
    rungs = [rung for rung in advice["rungs"] if rung["cache"] is not None and rung["words"] != RUINOUS]
    rungs.sort(key=lambda rung: (rung["kld"] or 0.0, rung["bits"]))
    lines = list(_lines(facts, rungs, advice["loss"]))
    head = ("Memory", "Context", *(code(file.recipe or file.type) for file in facts.models))
    scored = advice["scored"]
    dropped = [rung["kv"] for rung in advice["rungs"] if rung["words"] == RUINOUS]
    note = (
        "In each cell what `--kv` takes: of the caches measured the one that loses least and fits beside the "
        f"weights, with {100 * SPARE:.0f} % left for compute buffers. `*`: its mean KLD is above "
        f"{advice['loss']:g}."
    )
    note += f" Left out as ruinous on this model: {', '.join(map(code, dropped))}." if dropped else ""
    how = (
        f"Mean KLD from the run with an f16 cache, on {advice['model']} in {advice['weights']}: "
        f"{scored['chunks']} × {scored['n_ctx']:,} tokens of {code(advice['text'])}, "
        f"{advice['date'][:10]}; {code(f'ggufrq advise {facts.smallest.path.name}')}."
    )
    measured = table(
        ("Cache", "Bits", "Mean KLD, nats", "Loss"), [_rung(rung) for rung in advice["rungs"]], "lrrl"
    )
    return section(_TITLE, table(head, lines, "rr" + "l" * len(facts.models)), note, measured, how)


def _lines(facts: Facts, rungs: Sequence[Data], loss: float) -> Iterator[tuple[str, ...]]:
    """A line for each memory and context at which something changes."""
    usual = usual_tokens(facts)
    for tokens in dict.fromkeys((usual, facts.n_ctx or usual)):
        before: list[str] = []
        for gigabytes in MEMORIES:
            cells = [_cell(facts, file, rungs, tokens, gigabytes * 1e9, loss) for file in facts.models]
            if cells != before and any(cells):
                yield (f"{gigabytes} GB", f"{tokens:,}", *(cell or "–" for cell in cells))
            before = cells


def _cell(facts: Facts, file: CardFile, rungs: Sequence[Data], tokens: int, room: float, loss: float) -> str:
    """The best cache of a file in so many bytes, empty when none fits."""
    for rung in rungs:
        if needed(facts, file, parse_plan(rung["kv"]).as_usual(), tokens) <= room:
            return code(rung["kv"]) + ("*" if (rung["kld"] or 0.0) > loss else "")
    return ""


def _rung(rung: Data) -> tuple[str, str, str, str]:
    if rung["bits"] is None:
        return code(rung["kv"]), "–", "–", "cannot be used on this model"
    kld = "–" if rung["kld"] is None else numbers.with_error(rung["kld"], rung["kld_err"], most=6)
    return code(rung["kv"]), f"{rung['bits']:.4g}", kld, rung["words"] or "none"

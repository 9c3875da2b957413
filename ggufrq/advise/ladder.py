"""A ladder of caches on one model: what each takes and what it loses, measured on a held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ToolError
from ggufrq.base.progress import SILENT, Listener, Part
from ggufrq.base.results import ResultStore, results_dir
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.drive.profiles import settle_cases
from ggufrq.ggufs.files import model_headers
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.ggufs.memory_shape import memory_shape
from ggufrq.measure.base_run import Scored
from ggufrq.measure.divergence import F16, Divergences, Subject
from ggufrq.measure.kept import Row, kept_or_taken
from ggufrq.measure.verdict import BEYOND, loss_in_words
from ggufrq.memory.cells import ContextSettings
from ggufrq.memory.compute import DryRun
from ggufrq.memory.estimate import Memory
from ggufrq.tools.logs import is_of_heads
from ggufrq.tools.perplexity import NoNumbers

#: The rungs unless others are asked for.
DEFAULT_KV = "q8_0,iso5,q4_0,iso4,iso3,iso2"
#: Tokens of a text that is scored, of which the second half counts.
TEXT_TOKENS = 1024
#: Mean divergence (nats) that is accepted unless told otherwise.
LOSS = 0.03
_VERSION = 1

Data = dict[str, Any]


@dataclass(frozen=True)
class Wishes:
    """What a cache is wanted for: a context of ``ctx`` tokens, a mean divergence of at most ``loss``, and
    with ``budget`` the whole model in so many bytes, for which it may lose more."""

    ctx: int
    loss: float = LOSS
    budget: int | None = None


@dataclass(frozen=True)
class Rung:
    """A cache: ``kv`` as ``--kv`` takes it, ``title`` with all that was on; bits per value and bytes at the
    context, with the profile, and ``total`` with weights and buffers, ``exact`` when llama.cpp itself has
    said these; mean divergence with its standard error (None for f16, which the others are measured against)
    and what it comes to in words; ``largest`` is the longest context in the memory that was named, None when
    not even the shortest has room. ``why_not``: the model cannot have it."""

    kv: str
    title: str
    bits: float | None = None
    cache: int | None = None
    total: int | None = None
    exact: bool = True
    kld: float | None = None
    kld_err: float | None = None
    words: str = ""
    largest: int | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class Ladder:
    """The rungs, f16 first, and the recommended one; ``rows`` are the measurements by title."""

    model: str
    weights: str
    wishes: Wishes
    rungs: tuple[Rung, ...]
    best: Rung | None
    scored: Scored
    text: str
    rows: Mapping[str, Row]

    def as_data(self) -> Data:
        """As plain values, for JSON and to be kept."""
        return {
            "model": self.model,
            "weights": self.weights,
            **asdict(self.wishes),
            "text": self.text,
            "scored": asdict(self.scored),
            "recommended": self.best.kv if self.best else None,
            "rungs": [asdict(rung) for rung in self.rungs],
            "commands": {title: row["command"] for title, row in self.rows.items()},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def climb(
    model: Subject,
    cases: Sequence[Case],
    build: Build,
    wishes: Wishes,
    text: Path,
    *,
    chunks: int = 2,
    threads: int | None = None,
    fresh: bool = False,
    log: Path | None = None,
    listener: Listener = SILENT,
) -> Ladder:
    """Measure the cases on ``chunks`` parts of ``text``, and recommend one. What is known from an earlier run
    is not measured again, unless ``fresh``; ``listener`` is told of each case. The profile is that of
    ``wishes.ctx``. The result is kept, see ``kept``.

    Raises ModelError for a model whose cache is not known, ToolError when a measurement fails.
    """
    headers = model_headers(model.path)
    shape = memory_shape(headers)
    settled = settle_cases([case for case in cases if case != F16], model.path, wishes.ctx, build)
    scored = Scored(min(TEXT_TOKENS, shape.native), chunks, together=1, threads=threads)
    rungs, rows = [], dict[str, Row]()
    with DryRun(headers, build, log) as dry, Divergences(model, build, text, scored) as runs:
        memory = Memory(shape, shape.weight_bytes, dry.buffers, gpu=build.lacks_five_bits)
        take = partial(runs.take, log=log, listener=Part(listener, 0))
        for case in (F16, *settled):
            rung = _sized(case, memory, wishes)
            if rung.why_not is None and case != F16:
                try:
                    row = kept_or_taken(case, runs.kept, take, fresh=fresh, listener=listener)
                    rung = _measured(rung, row)
                    rows[case.name] = row
                except ToolError as error:
                    of_the_cache = isinstance(error, NoNumbers) or is_of_heads(error.message)
                    if not (runs.has_base and of_the_cache):
                        raise
                    rung = Rung(rung.kv, rung.title, why_not=f"{rung.title}: {error.message}")
            rungs.append(rung)
    found = Ladder(
        model.name, model.weights, wishes, tuple(rungs), best_of(rungs, wishes), scored, text.name, rows
    )
    ResultStore(results_dir()).put(_facts(model.path, build), found.as_data())
    return found


def best_of(rungs: Sequence[Rung], wishes: Wishes) -> Rung | None:
    """The smallest cache whose loss, with twice its error, is not above the one accepted; or with a memory
    to fit into the one that loses least of those that do, None when none does."""
    usable = [rung for rung in rungs if rung.cache is not None and rung.total is not None]
    if wishes.budget is not None:
        fitting = [rung for rung in usable if (rung.total or 0) <= wishes.budget]
        return min(fitting, key=lambda rung: (rung.kld or 0.0, rung.cache), default=None)
    good = [rung for rung in usable if (rung.kld or 0.0) + BEYOND * (rung.kld_err or 0.0) <= wishes.loss]
    return min(good, key=lambda rung: (rung.cache, rung.kld or 0.0), default=None)


def kept(model: Path, build: Build) -> Data | None:
    """What was found for a GGUF model, or for another quantization of it, by this build: ``Ladder.as_data``
    of the last time; None when there is nothing."""
    return ResultStore(results_dir()).get(_facts(model, build))


def _facts(model: Path, build: Build) -> Data:
    return {"version": _VERSION, "what": "advice", "model": fingerprint(model), "build": build.key}


def _sized(case: Case, memory: Memory, wishes: Wishes) -> Rung:
    """What a case takes at the context."""
    settings = ContextSettings(wishes.ctx)
    found, plain = (memory.estimate(plan, settings) for plan in (case.plan, F16.plan))
    if found.why_not is not None:
        return Rung(case.plan.name, case.name, why_not=found.why_not)
    fit = None if wishes.budget is None else memory.fit(case.plan, wishes.budget).estimate
    return Rung(
        case.plan.name,
        case.name,
        bits=16 * (found.k + found.v + found.exact_tokens) / (plain.k + plain.v),
        cache=found.cache,
        total=found.total,
        exact=found.exact,
        largest=fit.ctx if fit is not None else None,
    )


def _measured(rung: Rung, row: Row) -> Rung:
    kld = max(float(row["kld_mean"]), 0.0)
    return replace(rung, kld=kld, kld_err=float(row["kld_mean_err"]), words=loss_in_words(kld))

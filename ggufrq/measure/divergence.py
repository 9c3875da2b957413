"""How far a cache moves a model: perplexity and Kullback-Leibler divergence against a base run, by
llama-perplexity.

K is quantized from the first token on; types, sizes and rotations are read from the log of the very run that
was scored. Results are kept by all that they depend on.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ggufrq.base.progress import SILENT, Listener, Part
from ggufrq.base.results import ResultStore, file_sha256, results_dir
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, assignments
from ggufrq.cache.kv import parse_plan
from ggufrq.drive.cache_check import check_context, mode_of
from ggufrq.ggufs.files import content_hash
from ggufrq.ggufs.kv_shape import KvShape, find_kv_shape
from ggufrq.make.ready import model_file, weights_of
from ggufrq.measure.base_run import BaseRun, Scored
from ggufrq.measure.kept import Row, kept_or_taken
from ggufrq.models.resolve import resolve
from ggufrq.tools import perplexity
from ggufrq.tools.logs import Context

_VERSION = 2
#: How far the perplexity of the base may be off when it is read from the base's file.
_ROUNDING = 1e-4
#: What everything is compared with unless said otherwise.
F16 = Case(parse_plan("f16"))


@dataclass(frozen=True)
class Subject:
    """A model file under measurement: its name, file, content hash, the label of its weights, and the shape
    of its cache where that can be told."""

    name: str
    path: Path
    sha256: str
    weights: str
    shape: KvShape | None


def subject_of(model: str) -> Subject:
    """MODEL to measure, all its shards. Raises ModelError."""
    path = model_file(model)
    return Subject(resolve(model).name, path, content_hash(path), weights_of(model), find_kv_shape(path))


class Divergences:
    """Runs against one base run on one model and text. ``close`` removes the base run's file."""

    def __init__(
        self,
        model: Subject,
        build: Build,
        text: Path,
        scored: Scored,
        *,
        base: Case = F16,
    ) -> None:
        self.model = model
        self.build = build
        self.text = text
        self.scored = scored
        self.base = base
        self.results = ResultStore(results_dir())
        self.text_sha256 = file_sha256(text)
        file = self.results.folder / f"base-{os.getpid()}-{id(self)}-{model.sha256[:12]}.bin"
        self._runs = BaseRun(build, text, file, _ROUNDING)

    def __enter__(self) -> Divergences:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file of the base run."""
        self._runs.close()

    @property
    def has_base(self) -> bool:
        """Whether the base was run here, and as it should be."""
        return self._runs.ppl is not None

    def facts(self, case: Case) -> dict[str, Any]:
        """All that the row of a case depends on."""
        return {
            "version": _VERSION,
            "what": "divergence",
            "model": self.model.sha256,
            "build": self.build.key,
            "text": self.text_sha256,
            "scored": asdict(self.scored),
            "base": self.base.facts(),
            "case": case.facts(),
            "cores": os.cpu_count(),
        }

    def kept(self, case: Case) -> Row | None:
        """The row of an earlier run, or None."""
        return self.results.get(self.facts(case))

    def take(
        self,
        case: Case,
        *,
        log: Path | None = None,
        listener: Listener = SILENT,
    ) -> Row:
        """Run a case (and first the base, if it has not been run yet), and keep its row. ``listener`` is told
        what is being done and how many of the case's texts are scored.

        Raises ToolError when the tool fails or gives no result, CacheError when the cache was not kept as
        asked for.
        """
        path, scored = self.model.path, self.scored
        if self._runs.ppl is None:
            listener.step(f"{self.base.name}: base run")
            first = self._runs.make(path, self.base, scored, log=log)
            self._check(self.base, first.context)
            self._runs.accept(first)
        listener.step(f"{case.name}: perplexity")
        found, seconds = self._runs.compare(case.name, path, case, scored, log=log, listener=listener)
        size = self._check(case, found.context)
        row = self._row(case, found, size, seconds)
        self.results.put(self.facts(case), row, log)
        return row

    def command(self, case: Case, *, divergence: bool = True) -> str:
        """The command line of a run, with files by their names alone."""
        by_arguments = case.plan.environment()  # as options they are in the arguments
        variables = {k: v for k, v in case.environment().items() if k not in by_arguments}
        args = self._runs.arguments(self.model.path, case, self.scored, divergence=divergence)
        names = {file: file.name for file in (self.model.path, case.plan.file) if file is not None}
        shown = self._runs.shown(args, names)
        return assignments(variables) + shlex.join(shown)

    def _check(self, case: Case, context: Context) -> int | None:
        return check_context(case, context, self.model.path, self.model.shape, self.scored.tokens)

    def _row(self, case: Case, found: perplexity.Divergence, size: int | None, seconds: float) -> Row:
        shape, tokens = self.model.shape, found.context.tokens
        figures = asdict(found)
        for name in ("context", "n_ctx"):
            del figures[name]
        return {
            "case": case.name,
            "type_k": case.pair.k.name,
            "type_v": case.pair.v.name,
            "mode": mode_of(found.context),
            "bits_per_value": bits_of(case, shape, size, tokens),
            "cache_bytes": size,
            "cache_tokens": tokens,
            "recurrent_mib": found.context.recurrent_mib,
            "profile_source": found.context.profile.source if found.context.profile else None,
            "ctx": found.n_ctx,
            "scored": found.chunks * (found.n_ctx - found.n_ctx // 2 - 1),
            **figures,
            "base_command": self.command(self.base, divergence=False),
            "command": self.command(case),
            "seconds": round(seconds, 1),
        }


def bits_of(case: Case, shape: KvShape | None, size: int | None, tokens: int) -> float | None:
    """Bits per value of a cache of ``size`` bytes; those of the types when the model's shape is not known."""
    if shape is not None and size is not None:
        return shape.bits_for(size, tokens)
    return None if case.plan.layered or case.plan.recent or case.plan.first else case.pair.bits


def divergences(
    model: Subject,
    cases: Iterable[Case],
    build: Build,
    text: Path,
    scored: Scored,
    *,
    base: Case = F16,
    fresh: bool = False,
    log: Path | None = None,
    listener: Listener = SILENT,
) -> list[Row]:
    """One row per case, without speed; ``listener`` is told of each. Raises as ``Divergences.take``."""
    with Divergences(model, build, text, scored, base=base) as runs:
        take = partial(runs.take, log=log, listener=Part(listener, 0))
        return [kept_or_taken(case, runs.kept, take, fresh=fresh, listener=listener) for case in cases]

"""How far a cache moves a model: perplexity and Kullback-Leibler divergence against a base run, by
llama-perplexity.

K is quantized from the first token on; types, sizes and rotations are read from the log of the very run that
was scored. Results are kept by all that they depend on.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggufrq.base import proc
from ggufrq.base.errors import ToolError
from ggufrq.base.results import ResultStore, file_sha256, results_dir
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, assignments
from ggufrq.cache.kv import parse_plan
from ggufrq.drive.cache_check import check_context, mode_of
from ggufrq.ggufs.kv_shape import KvShape
from ggufrq.tools import perplexity
from ggufrq.tools.logs import Context, Result, retried

_VERSION = 2
#: What everything is compared with unless said otherwise.
F16 = Case(parse_plan("f16"))

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model file under measurement: its name, file, content hash, the label of its weights, and the shape
    of its cache where that can be told."""

    name: str
    path: Path
    sha256: str
    weights: str
    shape: KvShape | None


@dataclass(frozen=True)
class Scored:
    """What is scored: ``chunks`` texts of ``n_ctx`` tokens, the second half of each; all in one batch, or
    ``together`` of them."""

    n_ctx: int
    chunks: int
    together: int | None = None
    threads: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.n_ctx * (self.together or self.chunks)


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
        self._file = self.results.folder / f"base-{os.getpid()}-{id(self)}-{model.sha256[:12]}.bin"
        self._base_ppl: float | None = None

    def __enter__(self) -> Divergences:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file of the base run."""
        self._file.unlink(missing_ok=True)
        self._base_ppl = None

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
        on_step: Callable[[str], None] | None = None,
        on_text: Callable[[int], None] | None = None,
    ) -> Row:
        """Run a case (and first the base, if it has not been run yet), and keep its row. ``on_step`` is told
        what is being done, ``on_text`` how many of the case's texts are scored.

        Raises ToolError when the tool fails or gives no result, CacheError when the cache was not kept as
        asked for.
        """
        say = on_step or (lambda _: None)
        if self._base_ppl is None:
            say(f"{self.base.name}: base run")
            args = self._arguments(self.base, divergence=False)
            env = self.base.environment()
            first, _ = run_tool(
                self.build, "llama-perplexity", args, perplexity.parse_perplexity, env=env, log=log
            )
            self._check(self.base, first.context)
            self._base_ppl = first.ppl
        say(f"{case.name}: perplexity")
        args = self._arguments(case, divergence=True)
        env = case.environment()
        found, seconds = run_tool(
            self.build,
            "llama-perplexity",
            args,
            perplexity.parse_divergence,
            env=env,
            log=log,
            on_stdout=_counting(on_text),
        )
        size = self._check(case, found.context)
        if abs(found.ppl_base / self._base_ppl - 1) > 1e-4:
            raise ToolError(
                f"the base run had perplexity {self._base_ppl}, but {case.name} was compared with "
                f"{found.ppl_base}"
            )
        row = self._row(case, found, size, seconds)
        self.results.put(self.facts(case), row, log)
        return row

    def command(self, case: Case, *, divergence: bool = True) -> str:
        """The command line of a run, with files by their names alone."""
        by_arguments = case.plan.environment()  # as options they are in the arguments
        variables = {k: v for k, v in case.environment().items() if k not in by_arguments}
        names = {
            str(self.model.path): self.model.path.name,
            str(self.text): self.text.name,
            str(self._file): "base.bin",
            **({} if case.plan.file is None else {str(case.plan.file): case.plan.file.name}),
        }
        args = [names.get(arg, arg) for arg in self._arguments(case, divergence=divergence)]
        return assignments(variables) + shlex.join(["llama-perplexity", *args])

    def _arguments(self, case: Case, *, divergence: bool) -> list[str]:
        return perplexity.arguments(
            self.model.path,
            self.text,
            case.plan,
            self._file,
            n_ctx=self.scored.n_ctx,
            chunks=self.scored.chunks,
            together=self.scored.together,
            threads=self.scored.threads,
            divergence=divergence,
        )

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
    on_row: Callable[[Row, bool], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> list[Row]:
    """One row per case, without speed. ``on_row`` gets each row and whether it was kept from an earlier run;
    ``on_step`` what is being done. Raises as ``Divergences.take``."""
    rows = []
    with Divergences(model, build, text, scored, base=base) as runs:
        for case in cases:
            row = None if fresh else runs.kept(case)
            known = row is not None
            if row is None:
                row = runs.take(case, log=log, on_step=on_step)
            rows.append(row)
            if on_row is not None:
                on_row(row, known)
    return rows


def _counting(on_text: Callable[[int], None] | None) -> Callable[[str], None] | None:
    """Reads how many texts are scored from what llama-perplexity prints, piece by piece."""
    if on_text is None:
        return None
    printed = ""

    def read(piece: str) -> None:
        nonlocal printed
        printed += piece
        on_text(perplexity.chunks_done(printed))

    return read


def run_tool(
    build: Build,
    tool: str,
    args: list[str],
    parse: Callable[[str, str], Result],
    *,
    env: Mapping[str, str | None],
    log: Path | None = None,
    on_stdout: Callable[[str], None] | None = None,
) -> tuple[Result, float]:
    """The result of a tool as ``parse`` reads it from stdout and stderr, and the seconds it took.

    Runs it again when only the end of its output is missing. Raises ToolError.
    """
    command: list[str | Path] = [build.tool(tool), *args]

    def attempt() -> tuple[Result, float]:
        done = proc.run(command, env=env, log=log, check=False, on_stdout=on_stdout)
        if done.rc != 0:
            raise ToolError(proc.failure_message(done), remedy=f"see {log}" if log else None)
        return parse(done.stdout, done.stderr), done.seconds

    return retried(attempt)

"""Runs of llama-perplexity against a base run, for what caches cost and what quantized weights do.

The base run writes the log-probabilities of a text into a (large) file, and every other run is compared with
it: another cache on the same model, or other weights with the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.tools import perplexity
from ggufrq.tools.logs import Result, ended, retried


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


@dataclass
class BaseRun:
    """Runs over one text, one of which is the base; ``file`` is where its log-probabilities go until
    ``close``. A perplexity that another run reads from there may differ from the base's by the share
    ``rounding``."""

    build: Build
    text: Path
    file: Path
    rounding: float
    ppl: float | None = None

    def close(self) -> None:
        """Remove the file."""
        self.file.unlink(missing_ok=True)
        self.ppl = None

    def make(self, model: Path, case: Case, scored: Scored, *, log: Path | None) -> perplexity.Perplexity:
        """Run the base; others are compared with it from when ``accept`` is told of its perplexity."""
        args = self.arguments(model, case, scored, divergence=False)
        try:
            found, _ = self._run(args, case, perplexity.parse_perplexity, log=log)
        except perplexity.NoNumbers:
            raise perplexity.NoNumbers(
                f"the base that all is compared with computes no numbers: the perplexity of {model.name} "
                f"with its cache in {case.name} is NaN or infinite",
                remedy=f"its weights may be damaged: ggufrq quantize {model.name} looks at each of them",
            ) from None
        return found

    def accept(self, found: perplexity.Perplexity) -> None:
        """The base run was as it should be."""
        self.ppl = found.ppl

    def compare(
        self,
        name: str,
        model: Path,
        case: Case,
        scored: Scored,
        *,
        log: Path | None,
        see: Path | None = None,
        listener: Listener = SILENT,
    ) -> tuple[perplexity.Divergence, float]:
        """Run a model with a cache against the base: what came out, and the seconds it took. ``listener`` is
        told how many texts are scored; ``see`` is where the log is found afterwards, if not at ``log``.

        Raises ToolError, also when it was compared with another run than the base."""
        assert self.ppl is not None
        args = self.arguments(model, case, scored, divergence=True)
        parse = perplexity.parse_divergence
        found, seconds = self._run(args, case, parse, log=log, see=see, on_stdout=_counting(listener))
        if abs(found.ppl_base / self.ppl - 1) > self.rounding:
            raise ToolError(
                f"the base run had perplexity {self.ppl}, but {name} was compared with {found.ppl_base}"
            )
        return found, seconds

    def arguments(self, model: Path, case: Case, scored: Scored, *, divergence: bool) -> list[str]:
        """What llama-perplexity is run with; for the base without ``divergence``."""
        return perplexity.arguments(
            model,
            self.text,
            case.plan,
            self.file,
            n_ctx=scored.n_ctx,
            chunks=scored.chunks,
            together=scored.together,
            threads=scored.threads,
            divergence=divergence,
        )

    def shown(self, args: list[str], names: Mapping[Path, str]) -> list[str]:
        """Arguments with files by their names alone, or by those in ``names``."""
        shown = {str(self.text): self.text.name, str(self.file): "base.bin"}
        shown |= {str(path): name for path, name in names.items()}
        return ["llama-perplexity", *(shown.get(arg, arg) for arg in args)]

    def _run(
        self,
        args: list[str],
        case: Case,
        parse: Callable[[str, str], Result],
        *,
        log: Path | None,
        see: Path | None = None,
        on_stdout: Callable[[str], None] | None = None,
    ) -> tuple[Result, float]:
        env = case.environment()
        return run_tool(
            self.build, "llama-perplexity", args, parse, env=env, log=log, see=see, on_stdout=on_stdout
        )


def _counting(listener: Listener) -> Callable[[str], None]:
    """Reads how many texts are scored from what llama-perplexity prints, piece by piece."""
    printed = ""

    def read(piece: str) -> None:
        nonlocal printed
        printed += piece
        listener.reach(perplexity.chunks_done(printed))

    return read


def run_tool(
    build: Build,
    tool: str,
    args: list[str],
    parse: Callable[[str, str], Result],
    *,
    env: Mapping[str, str | None],
    log: Path | None = None,
    see: Path | None = None,
    on_stdout: Callable[[str], None] | None = None,
) -> tuple[Result, float]:
    """The result of a tool as ``parse`` reads it from stdout and stderr, and the seconds it took. ``see`` is
    where the log is found afterwards, if not at ``log``.

    Runs it again when only the end of its output is missing. Raises ToolError.
    """
    command: list[str | Path] = [build.tool(tool), *args]
    found = see or log

    def attempt() -> tuple[Result, float]:
        done = proc.run(command, env=env, log=log, check=False, on_stdout=on_stdout)
        if done.rc != 0:
            raise ToolError(ended(done), remedy=f"see {found}" if found else None)
        return parse(done.stdout, done.stderr), done.seconds

    return retried(attempt)

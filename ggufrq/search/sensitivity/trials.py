"""Measures recipes: makes each file, compares it with the unquantized model, and removes it. Results are kept
by all that they depend on, so that nothing is measured twice and a run that was stopped goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.base import log, machine, parallel, paths
from ggufrq.base.progress import SILENT, Listener
from ggufrq.base.results import ResultStore, file_sha256, results_dir
from ggufrq.build.project import Build
from ggufrq.ggufs.tensors import is_float
from ggufrq.make import quantizer
from ggufrq.make.record import require_free
from ggufrq.make.workshop import Workshop
from ggufrq.measure.weight_quality import WeightQuality, WeightSettings

#: Up to this size of the 16-bit model each measurement has one thread, and several run at once: with so
#: little work threads wait for each other, and on a busy machine most of the time.
_SMALL = 1 << 30
_VERSION = 1
#: The log of all measurements, by name.
LOG = "sensitivity.log"


@dataclass(frozen=True)
class Measured:
    """Mean KLD with its standard error, and its 99.9th percentile, in nats; perplexity; and how often the
    likeliest token is the same."""

    kld: float
    kld_err: float
    kld_p999: float
    ppl: float
    same_top: float


NOTHING = Measured(0.0, 0.0, 0.0, 0.0, 1.0)


class Trials:
    """Measurements of one model on one text. Types are given by name of the tensor; tensors that are not
    named stay as they are. A context manager that removes the file of the reference run."""

    def __init__(
        self,
        shop: Workshop,
        build: Build,
        matrix: Path | None,
        text: Path,
        settings: WeightSettings,
        *,
        jobs: int | None = None,
        listener: Listener = SILENT,
    ) -> None:
        self.shop = shop
        self.build = build
        self.matrix = matrix
        self._same = {tensor.name: tensor.type for tensor in shop.model}
        self._bytes = shop.model.bytes_as(self._same)
        small = self._bytes < _SMALL
        self.jobs = jobs or (machine.cores() if small else 1)
        self.listener = listener
        self.log = paths.logs_dir() / LOG
        self._logging = threading.Lock()
        self.threads = 1 if small else max(1, machine.cores() // self.jobs)
        self.quality = WeightQuality(
            shop.gguf, build, text=text, settings=settings, threads=self.threads, log=self.log
        )
        self.results = ResultStore(results_dir())
        self._facts = {
            "version": _VERSION,
            "what": "weights",
            "quality": self.quality.facts,
            "imatrix": file_sha256(matrix) if matrix is not None else "",
        }

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.quality.close()

    def missing(self, every: Sequence[Mapping[str, str]]) -> int:
        """How many of these have not been measured."""
        return len({self.results.path(self._key(types)) for types in every if self._kept(types) is None})

    def require_room(self) -> None:
        """Raise GgufrqError when the disk has no room for the file of a measurement."""
        require_free(self.shop.folder, self._bytes, "measuring")

    def measure(self, every: Sequence[Mapping[str, str]]) -> list[Measured]:
        """What each of these costs, in order; measured, or kept from an earlier run. Raises ToolError,
        ModelError, and GgufrqError when there is no room for a file."""
        todo = {self.results.path(self._key(types)): types for types in every if self._kept(types) is None}
        if todo:
            jobs = min(self.jobs, len(todo))
            require_free(self.shop.folder, jobs * self._bytes, "measuring")
            self.quality.make_base()
            for _ in parallel.each(self._take, list(todo.values()), jobs):
                self.listener.advance()
        found = [self._kept(types) for types in every]
        return [Measured(**row) for row in found if row is not None]

    def command(self) -> str:
        """The command of a measurement, with files by their names alone."""
        return self.quality.command(self.shop.gguf, "FILE.gguf")

    def _take(self, types: Mapping[str, str]) -> None:
        planned = {**self._same, **types}
        job = quantizer.Job(self.shop.gguf, self._label(planned), planned, self.matrix)
        making = self.shop.work.record.making
        with self._own_log() as own, making(f"{self.shop.base}-trial.gguf") as file:
            quantizer.make(job, file, self.build, planned, log=own)
            row = self.quality.measure(file, log=own)
        facts = {name: row[name] for name in ("kld_mean", "kld_mean_err", "kld_p999", "ppl", "same_top")}
        facts = {name.replace("_mean", ""): value for name, value in facts.items()}
        self.results.put(self._key(types), facts)

    def _label(self, types: Mapping[str, str]) -> str:
        """What llama-quantize is told to make: with a float type it would not look at those of tensors."""
        if all(map(is_float, types.values())):
            return "Q8_0"
        return quantizer.label(types, {tensor.name: tensor.values for tensor in self.shop.model})

    @contextmanager
    def _own_log(self) -> Iterator[Path]:
        """A log of one measurement's own, since several run at once; it is added to the log of all."""
        with self.shop.work.record.making(f"{self.shop.base}-trial.log") as own:
            try:
                yield own
            finally:
                if own.is_file():
                    with self._logging, self.log.open("ab") as every:
                        every.write(own.read_bytes())

    def _key(self, types: Mapping[str, str]) -> dict[str, Any]:
        changed = {name: kind for name, kind in types.items() if self._same[name] != kind}
        return {**self._facts, "types": changed}

    def _kept(self, types: Mapping[str, str]) -> dict[str, Any] | None:
        return self.results.get(self._key(types))


def say_jobs(trials: Trials) -> None:
    """Tell how many measurements run at once."""
    if trials.jobs > 1:
        log.say(f"{trials.jobs} measurements at once, threads of each: {trials.threads}")

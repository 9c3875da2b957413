"""What quantized weights cost in quality: perplexity, and divergence from the 16-bit model.

Every figure is llama-perplexity's. The cache is f16 in every run, so that all loss is the weights'. Rows are
kept by the content of all that they depend on, so that nothing is measured twice and a run that was stopped
goes on.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from ggufrq.base import paths
from ggufrq.base.errors import ModelError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.base.results import ResultStore, file_sha256
from ggufrq.build.project import Build
from ggufrq.ggufs.files import content_hash, model_header, read_model
from ggufrq.measure.base_run import BaseRun, Scored
from ggufrq.measure.divergence import F16
from ggufrq.measure.kept import Row, kept_or_taken

_VERSION = 2
#: Bytes of logits that one batch may hold; the base file takes half as much per token.
_BATCH_BYTES = 1 << 30
#: The base file keeps log-probabilities in 16 bits, so that a perplexity from it differs a little.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class WeightSettings:
    """``chunks`` texts of ``n_ctx`` tokens; the second half of each is scored."""

    n_ctx: int = 512
    chunks: int = 8


def measure_weights(
    reference: Path,
    files: Sequence[Path],
    build: Build,
    *,
    text: Path | None = None,
    settings: WeightSettings | None = None,
    threads: int | None = None,
    log: Path | None = None,
    listener: Listener = SILENT,
) -> list[Row]:
    """One row per file, in order, each against ``reference`` (the model in 16 bits).

    ``text`` is the held-out text that comes with ggufrq when none is given; ``listener`` is told of each row.
    Raises ModelError or ToolError.
    """
    with WeightQuality(reference, build, text=text, settings=settings, threads=threads, log=log) as quality:
        return [kept_or_taken(file, quality.kept, quality.take, listener=listener) for file in files]


class WeightQuality:
    """Measures one file after the other against the same reference, whose run is made once, when it is first
    needed. A context manager that removes the (large) base file. ``threads`` is all cores when None; on a
    busy machine fewer are faster."""

    def __init__(
        self,
        reference: Path,
        build: Build,
        *,
        text: Path | None = None,
        settings: WeightSettings | None = None,
        threads: int | None = None,
        log: Path | None = None,
    ) -> None:
        self.reference = reference
        self.threads = threads
        self.build = build
        self.text = text or paths.data_dir("texts") / "heldout.txt"
        self.settings = settings or WeightSettings()
        self.log = log or paths.logs_dir() / "weight-quality.log"
        self.results = ResultStore(paths.own_dir("weight-quality"))
        self.facts = {
            "version": _VERSION,
            "reference": content_hash(reference),
            "text": file_sha256(self.text),
            "build": build.key,
            "settings": asdict(self.settings),
            "cores": os.cpu_count(),
        }
        base = self.results.path({**self.facts, "base": os.getpid()}).with_suffix(".bin")
        self.runs = BaseRun(build, self.text, base, _ROUNDING)
        self._hashes: dict[tuple[Path, int, int], str] = {}

    def __enter__(self) -> WeightQuality:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the base file."""
        self.runs.close()

    def kept(self, file: Path) -> Row | None:
        """The row of an earlier run over a file with this content, None when there is none."""
        row = self.results.get(self._facts(file))
        return None if row is None else {**row, "file": file.name}

    def row(self, file: Path) -> Row:
        """Measure a file, or give what is kept: ``bytes``, ``bits`` per weight, ``ppl``, ``ppl_err``,
        ``ppl_base``, ``kld_mean``, ``kld_mean_err``, ``kld_p999`` (nats) and ``same_top`` (a share)."""
        return kept_or_taken(file, self.kept, self.take)

    def take(self, file: Path) -> Row:
        """As ``row``, measured in any case."""
        row = {"sha256": self._hash(file), **self.measure(file)}
        self.results.put(self._facts(file), row)
        return {**row, "file": file.name}

    def measure(self, file: Path, *, log: Path | None = None) -> Row:
        """As ``take``, and kept nowhere; ``log`` when not that of all."""
        facts = read_model(file)
        self.make_base()
        found, _ = self.runs.compare(
            file.name, file, F16, self._scored(file), log=log or self.log, see=self.log
        )
        return {
            "file": file.name,
            "bytes": facts.file_bytes,
            "bits": facts.bits,
            "file_type": facts.file_type,
            "ppl": found.ppl,
            "ppl_err": found.ppl_err,
            "ppl_base": found.ppl_base,
            "kld_mean": found.kld_mean,
            "kld_mean_err": found.kld_mean_err,
            "kld_p999": found.kld_p999,
            "kld_p99": found.kld_p99,
            "same_top": found.same_top,
            "meta": {
                **self.facts,
                "llama_cpp": self.build.manifest.get("llama_cpp", {}).get("commit"),
                "patch_set": self.build.manifest.get("patch_set"),
                "text_name": self.text.name,
            },
        }

    def make_base(self) -> None:
        """Run the reference, if that has not been done: before several files are measured at once."""
        if self.runs.ppl is None:
            scored = self._scored(self.reference)
            self.runs.accept(self.runs.make(self.reference, F16, scored, log=self.log))

    def command(self, model: Path, name: str) -> str:
        """What llama-perplexity is run with on a file, which is called ``name`` there."""
        args = self.runs.arguments(model, F16, self._scored(model), divergence=True)
        return shlex.join(self.runs.shown(args, {model: name}))

    def _scored(self, model: Path) -> Scored:
        s = self.settings
        return Scored(s.n_ctx, s.chunks, self._together(model), self.threads)

    def _together(self, model: Path) -> int:
        """How many chunks go into one batch: its logits must fit into memory."""
        tokens = model_header(model).values.get("tokenizer.ggml.tokens")
        if not tokens:
            raise ModelError(f"{model.name} has no vocabulary; nothing can be measured on text")
        return max(1, min(self.settings.chunks, _BATCH_BYTES // (4 * len(tokens) * self.settings.n_ctx)))

    def _hash(self, file: Path) -> str:
        found = file.stat()
        key = (file, found.st_size, found.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = content_hash(file)
        return self._hashes[key]

    def _facts(self, file: Path) -> Row:
        return {**self.facts, "file": self._hash(file)}

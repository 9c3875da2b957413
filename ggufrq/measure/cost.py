"""What a cache type costs on a model: bytes, speed, perplexity, and divergence from a run with an f16 cache.

Every figure is llama.cpp's own. Results are kept by all that they depend on, so that nothing is measured
twice and a run that was stopped goes on.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ggufrq import __version__
from ggufrq.base.errors import ToolError
from ggufrq.base.progress import SILENT, Listener, Part
from ggufrq.base.results import ResultStore, results_dir
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, assignments
from ggufrq.cache.kv import kv_types, parse_plan
from ggufrq.drive.profiles import settle_cases
from ggufrq.ggufs.files import content_hash
from ggufrq.ggufs.kv_shape import kv_shape
from ggufrq.measure.base_run import Scored, run_tool
from ggufrq.measure.divergence import Divergences, Subject
from ggufrq.measure.kept import Row, kept_or_taken
from ggufrq.tools import bench

_VERSION = 2


@dataclass(frozen=True)
class CostSettings:
    """``chunks`` texts of ``n_ctx`` tokens for perplexity, all in one batch; prefill of ``prompt`` and decode
    of ``generate`` tokens behind ``depth`` tokens for speed."""

    n_ctx: int = 2048
    chunks: int = 4
    prompt: int = 512
    generate: int = 64
    depth: int = 1024
    repetitions: int = 3


def default_cases() -> list[Case]:
    """f16, q8_0, q4_0, our types of 2 to 4 bits, and iso3 with the rotation as it was published."""
    names = ["f16", "q8_0", "q4_0", *(t.name for t in kv_types().values() if t.ours and t.bits < 5)]
    return [*(Case(parse_plan(name)) for name in names), Case(parse_plan("iso3"), "block")]


def subject(name: str, path: Path, weights: str) -> Subject:
    """A model file to measure. Raises ModelError when the shape of its cache cannot be told."""
    return Subject(name, path, content_hash(path), weights, kv_shape(path))


def measure(
    model: Subject,
    cases: Iterable[Case],
    build: Build,
    text: Path,
    settings: CostSettings,
    *,
    fresh: bool = False,
    log: Path | None = None,
    listener: Listener = SILENT,
) -> list[Row]:
    """One row per case; ``listener`` is told of each.

    Raises ToolError when a tool fails, or when the cache was not kept in the types asked for or not of the
    size that they must have.
    """
    with Divergences(model, build, text, Scored(settings.n_ctx, settings.chunks)) as runs:
        settled = settle_cases(cases, model.path, settings.n_ctx, build)
        work = _Measurement(runs, settings, log, listener)
        return [kept_or_taken(case, work.kept, work.take, fresh=fresh, listener=listener) for case in settled]


class _Measurement:
    def __init__(
        self, runs: Divergences, settings: CostSettings, log: Path | None, listener: Listener
    ) -> None:
        self.runs = runs
        self.model = runs.model
        self.settings = settings
        self.log = log
        self.listener = Part(listener, 0)  # what is counted are whole rows
        self.results = ResultStore(results_dir())

    def kept(self, case: Case) -> Row | None:
        row = self.results.get(self._facts(case))
        return None if row is None else {**row, "model": self.model.name}

    def take(self, case: Case) -> Row:
        quality = self.runs.take(case, log=self.log, listener=self.listener)
        self.listener.step(f"{case.name}: speed")
        s = self.settings
        args = bench.arguments(
            self.model.path,
            case.pair,
            prompt=s.prompt,
            generate=s.generate,
            depth=s.depth,
            repetitions=s.repetitions,
        )
        env = case.environment()
        speed, seconds = run_tool(self.runs.build, "llama-bench", args, bench.parse, env=env, log=self.log)
        if (speed.type_k, speed.type_v) != (case.pair.k.name, case.pair.v.name):
            raise ToolError(f"llama-bench measured {speed.type_k}/{speed.type_v} instead of {case.pair.name}")
        shown = [self.model.path.name if arg == str(self.model.path) else arg for arg in args]
        bench_command = assignments(case.shown()) + shlex.join(["llama-bench", *shown])
        row = {
            "model": self.model.name,
            "type_k": case.pair.k.name,
            "type_v": case.pair.v.name,
            "mode": quality["mode"],
            "marks": list(case.plan.marks),
            "bits_per_value": quality["bits_per_value"],
            "cache_bytes": quality["cache_bytes"],
            "cache_tokens": quality["cache_tokens"],
            "prefill_tps": round(speed.prefill, 2),
            "decode_tps": round(speed.decode, 2),
            "ppl": quality["ppl"],
            "ppl_err": quality["ppl_err"],
            "kld_mean": quality["kld_mean"],
            "kld_mean_err": quality["kld_mean_err"],
            "kld_p999": quality["kld_p999"],
            "same_top": quality["same_top"],
            "meta": self._meta(quality, bench_command, speed, quality["seconds"] + seconds),
        }
        self.results.put(self._facts(case), row)
        return row

    def _facts(self, case: Case) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "what": "measurement",
            "quality": self.runs.facts(case),
            "settings": asdict(self.settings),
        }

    def _meta(self, quality: Row, bench_command: str, speed: bench.Speed, seconds: float) -> dict[str, Any]:
        build = self.runs.build
        return {
            "ggufrq": __version__,
            "llama_cpp": build.manifest.get("llama_cpp", {}).get("commit"),
            "patch_set": build.manifest.get("patch_set"),
            "build": build.key,
            "cpu": build.manifest.get("cpu") or speed.cpu,
            "threads": speed.threads,
            "weights": self.model.weights,
            "model_sha256": self.model.sha256,
            "text_sha256": self.runs.text_sha256,
            **asdict(self.settings),
            "base_command": quality["base_command"],
            "commands": [quality["command"], bench_command],
            "seconds": round(seconds, 1),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

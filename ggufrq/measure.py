"""What a cache type costs on a model: bytes, speed, perplexity, and divergence from a run with an f16 cache.

Every figure is llama.cpp's own. Results are kept by all that they depend on, so that nothing is measured
twice and a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ggufrq import __version__, paths, proc
from ggufrq.build import Build
from ggufrq.errors import ToolError
from ggufrq.kv import KvPair, kv_types, parse_kv
from ggufrq.memory import KvShape, kv_shape
from ggufrq.tools import bench, perplexity
from ggufrq.tools.logs import Context, Result, retried, uses

#: Chooses the rotation of the patched llama.cpp.
MODE_VARIABLE = "LLAMA_RQ_MODE"
_VERSION = 1


@dataclass(frozen=True)
class Case:
    """A pair of cache types, and the rotation mode when it is not the usual one."""

    pair: KvPair
    mode: str | None = None

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.pair.name} {self.mode}" if self.mode else self.pair.name


@dataclass(frozen=True)
class Settings:
    """``chunks`` texts of ``n_ctx`` tokens for perplexity, all in one batch; prefill of ``prompt`` and decode
    of ``generate`` tokens behind ``depth`` tokens for speed."""

    n_ctx: int = 2048
    chunks: int = 4
    prompt: int = 512
    generate: int = 64
    depth: int = 1024
    repetitions: int = 3


@dataclass(frozen=True)
class Subject:
    """A model file under measurement: its name, file, content hash, and the label of its weights."""

    name: str
    path: Path
    sha256: str
    weights: str
    shape: KvShape


Row = dict[str, Any]


def default_cases() -> list[Case]:
    """f16, q8_0, q4_0, our nine types, and iso3 with the rotation as it was published."""
    names = ["f16", "q8_0", "q4_0", *(t.name for t in kv_types().values() if t.ours)]
    return [*(Case(parse_kv(name)) for name in names), Case(parse_kv("iso3"), "block")]


def parse_case(text: str) -> Case:
    """``iso3``, ``iso3/planar4``, or with a rotation mode ``iso3:block``. Raises UsageError."""
    name, _, mode = text.partition(":")
    return Case(parse_kv(name), mode or None)


def subject(name: str, path: Path, weights: str) -> Subject:
    """A model file to measure. Raises ModelError when the shape of its cache cannot be told."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Subject(name, path, digest.hexdigest(), weights, kv_shape(path))


def measure(
    model: Subject,
    cases: Iterable[Case],
    build: Build,
    text: Path,
    settings: Settings,
    *,
    fresh: bool = False,
    log: Path | None = None,
    on_row: Callable[[Row, bool], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> list[Row]:
    """One row per case. ``on_row`` gets each row and whether it was kept from an earlier run; ``on_step``
    what is being done.

    Raises ToolError when a tool fails, or when the cache was not kept in the types asked for or not of the
    size that they must have.
    """
    work = _Measurement(model, build, text, settings, log, on_step or (lambda _: None))
    rows = []
    try:
        for case in cases:
            row = None if fresh else work.kept(case)
            kept = row is not None
            if row is None:
                row = work.take(case)
            rows.append(row)
            if on_row is not None:
                on_row(row, kept)
    finally:
        work.close()
    return rows


class _Measurement:
    def __init__(
        self,
        model: Subject,
        build: Build,
        text: Path,
        settings: Settings,
        log: Path | None,
        on_step: Callable[[str], None],
    ) -> None:
        self.model = model
        self.build = build
        self.text = text
        self.text_sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
        self.settings = settings
        self.log = log
        self.on_step = on_step
        self.folder = paths.cache_dir() / "measurements"
        self.folder.mkdir(exist_ok=True)
        self.base = self.folder / f"base-{os.getpid()}-{model.sha256[:12]}.bin"
        self.base_ppl: float | None = None
        self.base_command = ""

    def close(self) -> None:
        self.base.unlink(missing_ok=True)

    def kept(self, case: Case) -> Row | None:
        try:
            stored = json.loads(self._path(case).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        row = stored.get("row") if isinstance(stored, dict) else None
        if not isinstance(row, dict):
            return None
        return {**row, "model": self.model.name}

    def take(self, case: Case) -> Row:
        self._make_base()
        self.on_step(f"{case.name}: perplexity")
        args = self._perplexity(case.pair, divergence=True)
        quality, took = self._run("llama-perplexity", args, case, perplexity.parse_divergence)
        self._check(case, quality.context)
        if self.base_ppl is None or abs(quality.ppl_base / self.base_ppl - 1) > 1e-4:
            raise ToolError(
                f"the base run had perplexity {self.base_ppl}, but {case.name} was compared with "
                f"{quality.ppl_base}"
            )
        self.on_step(f"{case.name}: speed")
        s = self.settings
        bench_args = bench.arguments(
            self.model.path,
            case.pair,
            prompt=s.prompt,
            generate=s.generate,
            depth=s.depth,
            repetitions=s.repetitions,
        )
        speed, timed = self._run("llama-bench", bench_args, case, bench.parse)
        if (speed.type_k, speed.type_v) != (case.pair.k.name, case.pair.v.name):
            raise ToolError(f"llama-bench measured {speed.type_k}/{speed.type_v} instead of {case.pair.name}")
        size = quality.context.kv_bytes
        assert size is not None  # _check
        row = {
            "model": self.model.name,
            "type_k": case.pair.k.name,
            "type_v": case.pair.v.name,
            "mode": _mode(quality.context),
            "bits_per_value": self.model.shape.bits_for(size, quality.context.tokens),
            "cache_bytes": size,
            "cache_tokens": quality.context.tokens,
            "prefill_tps": round(speed.prefill, 2),
            "decode_tps": round(speed.decode, 2),
            "ppl": quality.ppl,
            "ppl_err": quality.ppl_err,
            "kld_mean": quality.kld_mean,
            "kld_mean_err": quality.kld_mean_err,
            "kld_p999": quality.kld_p999,
            "same_top": quality.same_top,
            "meta": self._meta(case, args, bench_args, speed, took + timed),
        }
        paths.atomic_write(self._path(case), json.dumps({"row": row}, indent=1) + "\n")
        return row

    def _make_base(self) -> None:
        if self.base_ppl is not None:
            return
        self.on_step("the run with an f16 cache that all are compared with")
        base = Case(parse_kv("f16"))
        args = self._perplexity(base.pair, divergence=False)
        result, _ = self._run("llama-perplexity", args, base, perplexity.parse_perplexity)
        self._check(base, result.context)
        self.base_command = shlex.join(["llama-perplexity", *self._short(args)])
        self.base_ppl = result.ppl

    def _perplexity(self, pair: KvPair, *, divergence: bool) -> list[str]:
        return perplexity.arguments(
            self.model.path,
            self.text,
            pair,
            self.base,
            n_ctx=self.settings.n_ctx,
            chunks=self.settings.chunks,
            divergence=divergence,
        )

    def _run(
        self, tool: str, args: list[str], case: Case, parse: Callable[[str, str], Result]
    ) -> tuple[Result, float]:
        """The result of a tool, and the seconds it took."""
        environment = {MODE_VARIABLE: case.mode, "LLAMA_ATTN_ROT_DISABLE": None}
        command: list[str | Path] = [self.build.tool(tool), *args]

        def attempt() -> tuple[Result, float]:
            done = proc.run(command, env=environment, log=self.log, check=False)
            if done.rc != 0:
                raise ToolError(proc.failure_message(done), remedy=f"see {self.log}" if self.log else None)
            return parse(done.stdout, done.stderr), done.seconds

        return retried(attempt)

    def _check(self, case: Case, context: Context) -> None:
        """K and V really were kept in these types, from the first token on, and in as many bytes as they must
        take."""
        pair, tokens = case.pair, self.settings.n_ctx * self.settings.chunks
        if not uses(context, pair):
            raise ToolError(
                f"llama.cpp did not keep the cache in {pair.name} but in {context.k_types}/{context.v_types}"
            )
        expected = self.model.shape.bytes_for(pair, tokens)
        if context.tokens != tokens or context.kv_bytes != expected:
            raise ToolError(
                f"a {pair.name} cache of {tokens} tokens takes {expected} bytes, but llama.cpp reports "
                f"{context.kv_bytes} for {context.tokens}"
            )
        for side, kind in (("K", pair.k), ("V", pair.v)):
            if not kind.ours:
                continue
            rotation = context.rotations.get(side)
            if rotation is None or rotation.type != kind.name or (case.mode and rotation.mode != case.mode):
                raise ToolError(f"llama.cpp did not rotate {side} as {case.name} asks for: {rotation}")

    def _path(self, case: Case) -> Path:
        facts = {
            "version": _VERSION,
            "model": self.model.sha256,
            "build": self.build.key,
            "text": self.text_sha256,
            "settings": asdict(self.settings),
            "k": case.pair.k.name,
            "v": case.pair.v.name,
            "mode": case.mode,
            "cores": os.cpu_count(),
        }
        return self.folder / (
            hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32] + ".json"
        )

    def _meta(
        self, case: Case, args: list[str], bench_args: list[str], speed: bench.Speed, seconds: float
    ) -> dict[str, Any]:
        prefix = f"{MODE_VARIABLE}={case.mode} " if case.mode else ""
        return {
            "ggufrq": __version__,
            "llama_cpp": self.build.manifest.get("llama_cpp", {}).get("commit"),
            "patch_set": self.build.manifest.get("patch_set"),
            "build": self.build.key,
            "cpu": self.build.manifest.get("cpu") or speed.cpu,
            "threads": speed.threads,
            "weights": self.model.weights,
            "model_sha256": self.model.sha256,
            "text_sha256": self.text_sha256,
            **asdict(self.settings),
            "base_command": self.base_command,
            "commands": [
                prefix + shlex.join(["llama-perplexity", *self._short(args)]),
                prefix + shlex.join(["llama-bench", *self._short(bench_args)]),
            ],
            "seconds": round(seconds, 1),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _short(self, args: list[str]) -> list[str]:
        """Arguments with files by their names alone."""
        names = {
            str(self.model.path): self.model.path.name,
            str(self.text): self.text.name,
            str(self.base): "base.bin",
        }
        return [names.get(arg, arg) for arg in args]


def _mode(context: Context) -> str:
    """How K and V were rotated, from the log."""
    sides = []
    for side, upstream in (("K", context.upstream_rotates_k), ("V", context.upstream_rotates_v)):
        rotation = context.rotations.get(side)
        sides.append(rotation.mode if rotation else "hadamard" if upstream else "none")
    return sides[0] if sides[0] == sides[1] else "/".join(sides)

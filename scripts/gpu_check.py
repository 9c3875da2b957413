"""Check and measure the CUDA kernels on a machine with an NVIDIA card that is at hand for minutes.

    python scripts/gpu_check.py pack gpu-check.tar.xz   # where there is a finished build for CUDA
    python3 scripts/gpu_check.py run gpu-check.tar.xz --work DIR --results DIR --budget 540
    python3 scripts/gpu_check.py report DIR             # the tables of docs/cuda.md

`run` takes, in this order: device (driver, speed of a copy), ops (test-backend-ops of our types), kld (the
card against the CPU on the embedded models, with and without our fusions), speed (llama-bench on random
weights), attention (the kernel alone), ncu (that kernel under Nsight Compute). Each has its own share of
--budget; what it cuts off comes again at the end, if there is time. A result is in DIR/STEP.json as soon as
it is there, and is not taken again: run the same command once more to go on. It exits with 0 when all is
measured, 1 when something is wrong, 3 when the time is up, 4 without a card. Nothing is compiled there; it
takes Python 3.10 with numpy, and cuBLAS.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

DONE, WRONG, CUT, NO_DEVICE = 0, 1, 3, 4

#: Seconds that a program needs to be ended and its result to be written.
SLACK = 5.0


@dataclass(frozen=True)
class Cache:
    """A cache to measure: its name in tables, its types, and newest tokens in f16."""

    name: str
    types: str
    newest: int = 0

    @property
    def env(self) -> dict[str, str | None]:
        return {"LLAMA_RQ_RECENT": str(self.newest) if self.newest else None}


#: By importance where the time is short: f16 first, which the others are held against.
CACHES = (
    Cache("f16", "f16"),
    Cache("iso3", "iso3"),
    Cache("q8_0", "q8_0"),
    Cache("q4_0", "q4_0"),
    Cache("iso4", "iso4"),
    Cache("iso3, newest 32", "iso3", 32),
)
COLUMNS = ("f16", "q8_0", "q4_0", "iso3", "iso4", "iso3, newest 32")
KLD_TYPES = ("f16", "iso3", "q8_0", "iso4", "q4_0", "iso2", "iso3/iso4", "q8_0/iso3")

#: planar3, iso3 and rotor3 differ in the rotation alone: one family first, the others when time is left
OPS = {
    "rotations": ("MUL_MAT_RQ", "family=1"),
    "set_rows": ("SET_ROWS", "iso"),
    "attention": (
        "FLASH_ATTN_EXT",
        "type_K=(f16|q8_0|iso.),type_V=iso|type_K=iso.,type_V=(f16|q8_0)|recent=.*type_K=q",
    ),
    "get_rows": ("GET_ROWS", "iso"),
    "cpy": ("CPY,CONT,DUP", "iso"),
    "heads of 64": ("FLASH_ATTN_EXT,GET_ROWS,CPY", "rq[234]_64"),
    "attention, other families": ("FLASH_ATTN_EXT", "type_[KV]=(planar|rotor)"),
    "the rest of other families": ("MUL_MAT_RQ,SET_ROWS,GET_ROWS,CPY,CONT,DUP", "family=[02]|planar|rotor"),
}


@dataclass(frozen=True)
class Shape:
    """A model of random Q4_0 weights with layers like those of a real one."""

    name: str
    arch: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 4096


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    shape: Shape
    depths: tuple[int, ...]
    prompt: int
    generate: int
    context: int
    chunks: int
    attention: tuple[tuple[int, int, int], ...]  # head_dim, heads of a group, rows; what matters most first
    types: tuple[str, ...] = ("f16", "iso3", "q8_0", "q4_0", "iso4", "iso2")  # of the attention alone
    ops: tuple[str, ...] = tuple(OPS)
    kld: tuple[str, ...] = KLD_TYPES


#: Eight layers of Llama 3.1 8B, at 131,072 tokens an f16 cache of 4 GiB; a vocabulary that does not count.
FULL = Sizes(
    Shape("llama-3.1-8b-like", "llama", 8, 4096, 14336, 32, 8, 128),
    (0, 8192, 32768, 131072),
    512,
    128,
    2048,
    2,
    ((128, 4, 131072), (128, 4, 32768), (256, 8, 131072), (512, 8, 131072)),
)
#: The same programs with the same arguments, where seconds must do: all but the card.
REHEARSAL = Sizes(
    Shape("small", "llama", 2, 256, 512, 8, 2, 128),
    (0, 256),
    32,
    8,
    256,
    1,
    ((128, 4, 4096),),
    ("iso3",),
    ("rotations", "set_rows"),
    ("f16", "iso3"),
)


class NoDevice(Exception):
    """All is there but a card; says what the driver answered."""


class NotStarting(Exception):
    """A program of the bundle does not start: nothing can be measured."""


class Cut(Exception):
    """The time of a step, or all of it, was up before a program ended."""


# ---- run ----


@dataclass(frozen=True)
class Unit:
    """What is measured at a time: its name in the step's file, a generous guess of its seconds."""

    name: str
    needs: float
    measure: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """A file of results, and its share of the budget."""

    name: str
    seconds: float
    units: Callable[[Run], Iterator[Unit]]


class Run:
    """The unpacked bundle, the results so far, and the time that is left."""

    def __init__(
        self,
        work: Path,
        results: Path,
        budget: float,
        *,
        libraries: list[Path] | None = None,
        backend: str = "CUDA0",
        sizes: Sizes = FULL,
    ) -> None:
        self.root = work / "gpu-check"
        self.work = work
        self.results = results
        self.budget = budget
        self.deadline = monotonic() + budget
        self.limit = self.deadline  # of the unit that is being measured
        self.backend = backend
        self.sizes = sizes
        results.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = json.loads((self.root / "bundle.json").read_text())
        self.libraries = libraries if libraries is not None else []

    def left(self) -> float:
        return self.deadline - SLACK - monotonic()

    def step(self, step: Step, seconds: float) -> bool:
        """Measure what is missing of a step in so many seconds; whether it now has all its units."""
        path = self.results / f"{step.name}.json"
        kept = read_step(path, self.facts["patch_set"])
        units: dict[str, Any] = kept["units"]
        end = monotonic() + min(seconds, self.left())
        for unit in step.units(self):
            if unit.name in units and "cut" not in units[unit.name]:
                continue
            left = end - monotonic()
            if left < unit.needs:
                print(
                    f"{step.name}: {unit.name} waits, {unit.needs:.0f} s do not fit into {max(0, left):.0f}"
                )
                return False
            # what takes four times its guess hangs: it must not take the time of all others
            self.limit = monotonic() + min(left, 4 * unit.needs)
            before = units.get(unit.name, {})
            started = monotonic()
            try:
                result = unit.measure()
            except (NoDevice, NotStarting):
                raise
            except Cut:
                seconds_taken = round(monotonic() - started, 1)
                hangs = "cut" in before or monotonic() - started > 3.9 * unit.needs
                result = {"failed": f"no end after {seconds_taken} s"} if hangs else {"cut": seconds_taken}
            except Exception as error:  # a result as any other: the next one may be right
                result = {"failed": f"{type(error).__name__}: {error}"}
            units[unit.name] = {"seconds": round(monotonic() - started, 1), **result}
            write_json(path, kept)
            words = result.get("failed") or ("cut off" if "cut" in result else brief(result))
            print(f"{step.name}: {unit.name}: {words} ({units[unit.name]['seconds']} s)", flush=True)
        return not any("cut" in found for found in units.values())

    def tool(
        self, name: str, *arguments: str | Path, env: dict[str, str | None] | None = None, check: bool = True
    ) -> Any:
        """Run a program of the bundle to its end. Raises Cut when the time of the unit is up before, and with
        ``check`` RuntimeError with its last lines when it fails."""
        done = self.run([self.root / "bin" / name, *arguments], env)
        if check and done.rc != 0:
            raise wrong(done)
        return done

    def run(self, command: list[str | Path], env: dict[str, str | None] | None = None) -> Any:
        from ggufrq.base import proc
        from ggufrq.base.errors import ToolError

        left = self.limit - monotonic()
        try:
            return proc.run(command, check=False, timeout=max(0.1, left), env={**self.env(), **(env or {})})
        except ToolError:
            if monotonic() < self.limit:
                raise
            raise Cut(str(command[0])) from None

    def env(self) -> dict[str, str | None]:
        """Where programs find what is not in the bundle."""
        places = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {"LD_LIBRARY_PATH": ":".join(places) or None, "LLAMA_RQ_RECENT": None, "LLAMA_RQ_FIRST": None}


def read_step(path: Path, patch_set: str) -> dict[str, Any]:
    """Results of a step so far. Raises SystemExit when they are of other patches."""
    if not path.is_file():
        return {"step": path.stem, "patch_set": patch_set, "units": {}}
    kept: dict[str, Any] = json.loads(path.read_text())
    if kept["patch_set"] != patch_set:
        raise SystemExit(
            f"error: {path} is of patch set {kept['patch_set'][:8]}, the bundle of {patch_set[:8]}\n"
            "  try: another folder for --results"
        )
    return kept


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)


def brief(result: dict[str, Any]) -> str:
    """The figures of a result that tell most."""
    words = [
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.items()
        if name in {"passed", "of", "kld_mean", "prefill", "decode", "copy", "held", "name", "driver"}
    ]
    return ", ".join(words) or "done"


def wrong(done: Any) -> RuntimeError:
    """The error for a program that did not do what it was asked for: its last lines."""
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
    return RuntimeError(f"exit status {done.rc}: " + " / ".join(line.strip() for line in said)[-800:])


def parsed(parse: Callable[[str, str], Any], done: Any) -> Any:
    """What a program printed. Some exit with 0 where they failed: then its last lines are in the error."""
    try:
        return parse(done.stdout, done.stderr)
    except Exception as error:
        raise RuntimeError(f"{error}; {wrong(done)}") from error


# ---- device ----


def device(run: Run) -> Iterator[Unit]:
    """Card, driver, and what a copy within its memory reaches; first of all that every program starts."""

    def starts() -> dict[str, Any]:
        for program, argument in (
            ("test-backend-ops", "--list-ops"),
            ("llama-bench", "--list-devices"),
            ("llama-perplexity", "--list-devices"),
        ):
            done = run.tool(program, argument, check=False)
            if done.rc != 0:
                raise NotStarting(f"{program} does not start: {wrong(done)}")
        return {"lists": [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]}

    def card() -> dict[str, Any]:
        runtime = next((run.root / "bin").glob("libcudart.so.*"), None)
        if run.sizes is REHEARSAL:
            return {"name": "none, a rehearsal", "driver": "none", "copy": math.nan}
        if runtime is None:
            raise NoDevice("the bundle is of a build without CUDA")
        done = run.run([sys.executable, Path(__file__).resolve(), "probe", runtime])
        if done.rc != 0:
            raise wrong(done)
        found: dict[str, Any] = json.loads(done.stdout)
        if "no_device" in found:
            raise NoDevice(found["no_device"])
        if shutil.which("nvidia-smi"):
            fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem")
            query = f"--query-gpu={','.join(fields)}"
            smi = run.run(["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", "0"])
            values = [value.strip() for value in smi.stdout.split(",")]
            found.update(
                zip(("name", "driver", "memory_mib", "max_sm_mhz", "max_mem_mhz"), values, strict=False)
            )
        return found

    yield Unit("programs", 5, starts)
    yield Unit("card", 5, card)


def probe(runtime: Path) -> dict[str, Any]:
    """What CUDA's runtime says of the first card; "copy": GB/s, read and written, of 4 GiB within it."""
    cuda = ctypes.CDLL(str(runtime))
    cuda.cudaGetErrorString.restype = ctypes.c_char_p

    def call(name: str, *arguments: Any) -> None:
        status = getattr(cuda, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: {cuda.cudaGetErrorString(status).decode()}")

    def number(name: str, *arguments: Any) -> int:
        value = ctypes.c_int()
        call(name, ctypes.byref(value), *arguments)
        return value.value

    try:
        cards = number("cudaGetDeviceCount")
    except RuntimeError as error:
        return {"no_device": str(error)}
    if cards == 0:
        return {"no_device": "the driver shows none"}
    call("cudaSetDevice", 0)
    size = ctypes.c_size_t(4 << 30)
    buffers = [ctypes.c_void_p(), ctypes.c_void_p()]
    events = [ctypes.c_void_p(), ctypes.c_void_p()]
    for buffer in buffers:
        call("cudaMalloc", ctypes.byref(buffer), size)
    for event in events:
        call("cudaEventCreate", ctypes.byref(event))
    best = 0.0
    for _ in range(10):
        call("cudaEventRecord", events[0], None)
        call("cudaMemcpyAsync", buffers[0], buffers[1], size, 3, None)
        call("cudaEventRecord", events[1], None)
        call("cudaEventSynchronize", events[1])
        milliseconds = ctypes.c_float()
        call("cudaEventElapsedTime", ctypes.byref(milliseconds), events[0], events[1])
        best = max(best, 2 * size.value / milliseconds.value / 1e6)
    major, minor = (number("cudaDeviceGetAttribute", what, 0) for what in (75, 76))
    return {
        "cuda": number("cudaDriverGetVersion"),
        "runtime": number("cudaRuntimeGetVersion"),
        "capability": f"{major}.{minor}",
        "multiprocessors": number("cudaDeviceGetAttribute", 16, 0),
        "copy": round(best, 1),
    }


# ---- ops ----


def ops(run: Run) -> Iterator[Unit]:
    """Our types in every operation, against the CPU."""

    def measure(op: str, params: str) -> dict[str, Any]:
        done = run.tool(
            "test-backend-ops", "test", "-b", run.backend, "-o", op, "-p", params, "-j", "8", check=False
        )
        found = parse_test(done.stdout)
        if found["of"] == 0:
            raise RuntimeError(f"no case was run: {wrong(done)}")
        if done.rc != 0 and not found["failures"]:
            raise wrong(done)
        return found

    for name in run.sizes.ops:
        yield Unit(name, 15, partial(measure, *OPS[name]))


def parse_test(text: str) -> dict[str, Any]:
    """How many cases of `test-backend-ops test` passed, which failed, and how many the device does not do."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    passed = re.search(r"(\d+)/(\d+) tests passed", "\n".join(lines))
    return {
        "passed": int(passed[1]) if passed else 0,
        "of": int(passed[2]) if passed else 0,
        "not_supported": sum("not supported" in line for line in lines),
        "failures": [line.strip() for line in lines if "(" in line and "FAIL" in line][:50],
    }


# ---- kld ----


def kld(run: Run) -> Iterator[Unit]:
    """The same caches on the card and on the CPU, against the CPU with an f16 cache."""
    from ggufrq.cache.kv import parse_plan
    from ggufrq.tools import perplexity

    def once(model: str, types: str, where: str, *, divergence: bool) -> Any:
        arguments = perplexity.arguments(
            run.root / f"{model}.gguf",
            run.root / "heldout.txt",
            parse_plan(types),
            run.work / f"{model}.logits",
            n_ctx=run.sizes.context,
            chunks=run.sizes.chunks,
            divergence=divergence,
        )
        place = ["--device", "none"] if where == "cpu" else ["-ngl", "99"]
        env: dict[str, str | None] = {"GGML_CUDA_DISABLE_FUSION": "1" if where == "unfused" else None}
        return run.tool("llama-perplexity", *arguments, *place, env=env)

    def measure(model: str, types: str, where: str) -> dict[str, Any]:
        if not (run.work / f"{model}.logits.whole").is_file():  # a run that was cut leaves half of them
            done = once(model, "f16", "cpu", divergence=False)
            parsed(perplexity.parse_perplexity, done)
            (run.work / f"{model}.logits.whole").touch()
        done = once(model, types, where, divergence=True)
        found = asdict(parsed(perplexity.parse_divergence, done))
        return {"model": model, "cache": types, "where": where, **found}

    for types in run.sizes.kld:
        for model in run.facts["models"]:
            # "unfused": rotations and stores one by one, which their one launch must not differ from
            for where in ("cuda", "cpu", *(("unfused",) if types.startswith("iso") else ())):
                yield Unit(f"{model}, {types}, {where}", 6, partial(measure, model, types, where))


# ---- speed ----


def speed(run: Run) -> Iterator[Unit]:
    """llama-bench, the caches in turns, so that ratios are of one time."""
    from ggufrq.cache.kv import parse_kv
    from ggufrq.tools import bench

    sizes = run.sizes

    def arguments(cache: Cache, depth: int, prompt: int, generate: int, repetitions: int) -> list[str]:
        model = run.work / f"{sizes.shape.name}.gguf"
        if not model.is_file():
            write_model(model, sizes.shape)
        return bench.arguments(
            model,
            parse_kv(cache.types),
            prompt=prompt,
            generate=generate,
            depth=depth,
            repetitions=repetitions,
            verbose=cache.newest > 0,
        )

    def holds(cache: Cache) -> dict[str, Any]:
        done = run.tool("llama-bench", *arguments(cache, 0, 16, 1, 1), "-ngl", "99", env=cache.env)
        found = re.search(r"llama_rq: the newest .* tokens (are not held in f16: .*|in f16: .*)", done.stderr)
        if found is None:
            raise RuntimeError("the log does not say whether the newest tokens are held")
        refused = found[1].startswith("are not held")
        return {"held": not refused, "why": found[1].partition(": ")[2] if refused else ""}

    def measure(cache: Cache, depth: int, turn: int) -> dict[str, Any]:
        repetitions = 3 if depth < 100000 else 2
        command = arguments(cache, depth, sizes.prompt, sizes.generate, repetitions)
        done = run.tool("llama-bench", *command, "-ngl", "99", env=cache.env)
        found = asdict(parsed(bench.parse, done))
        return {"cache": cache.name, "turn": turn, **found}

    newest = next(cache for cache in CACHES if cache.newest)
    yield Unit(f"{newest.name}: held", 15, partial(holds, newest))
    held = read_step(run.results / "speed.json", run.facts["patch_set"])["units"].get(
        f"{newest.name}: held", {}
    )

    for depth in sizes.depths:
        for turn in (1, 2):
            for cache in CACHES:
                if cache.newest and not held.get("held"):
                    continue
                if turn == 2 and depth > 100000 and cache.name not in {"f16", "iso3"}:
                    continue
                needs = 6 if depth < 10000 else 10 if depth < 100000 else 25
                name = f"{cache.name}, {depth}, turn {turn}"
                yield Unit(name, needs, partial(measure, cache, depth, turn))


def write_model(path: Path, shape: Shape) -> None:
    """A GGUF of that shape, without a tokenizer; Q4_0 blocks of one scale and random values."""
    rng = random.Random(1)
    scale = struct.pack("<e", 0.004)
    pool = b"".join(scale + rng.randbytes(16) for _ in range(1 << 18))

    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (shape.width, shape.vocabulary)),
        ("output.weight", (shape.width, shape.vocabulary)),
        ("output_norm.weight", (shape.width,)),
    ]
    for i in range(shape.layers):
        base = f"blk.{i}."
        tensors += [
            (base + "attn_norm.weight", (shape.width,)),
            (base + "attn_q.weight", (shape.width, q_width)),
            (base + "attn_k.weight", (shape.width, kv_width)),
            (base + "attn_v.weight", (shape.width, kv_width)),
            (base + "attn_output.weight", (q_width, shape.width)),
            (base + "ffn_norm.weight", (shape.width,)),
            (base + "ffn_gate.weight", (shape.width, shape.ffn)),
            (base + "ffn_up.weight", (shape.width, shape.ffn)),
            (base + "ffn_down.weight", (shape.ffn, shape.width)),
        ]

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def size(dims: tuple[int, ...]) -> int:
        count = dims[0] * (dims[1] if len(dims) > 1 else 1)
        return 4 * count if len(dims) == 1 else count // 32 * 18

    integers = {
        "context_length": 262144,
        "embedding_length": shape.width,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.vocabulary,
    }
    pairs = [text(f"{shape.arch}.{name}") + struct.pack("<II", 4, value) for name, value in integers.items()]
    pairs.append(text(f"{shape.arch}.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    for name, value in (("general.architecture", shape.arch), ("tokenizer.ggml.model", "no_vocab")):
        pairs.append(text(name) + struct.pack("<I", 8) + text(value))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    at = 0
    for name, dims in tensors:
        kind = 0 if len(dims) == 1 else 2  # F32, Q4_0
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
        at += -(-size(dims) // 32) * 32
    with path.with_suffix(".tmp").open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for _, dims in tensors:
            left = size(dims)
            if len(dims) == 1:
                file.write(struct.pack("<f", 1.0) * dims[0])
            else:
                for begin in range(0, left, len(pool)):
                    file.write(pool[: min(len(pool), left - begin)])
            file.write(bytes(-left % 32))
    path.with_suffix(".tmp").replace(path)


# ---- attention, ncu ----


def attention(run: Run) -> Iterator[Unit]:
    """The attention of one query alone, by test-backend-ops perf."""

    def measure(pattern: str) -> dict[str, Any]:
        done = run.tool("test-backend-ops", "perf", "-b", run.backend, "-o", "FLASH_ATTN_EXT", "-p", pattern)
        rows = parse_perf(done.stdout)
        if not rows:
            raise RuntimeError(f"no case was run: {wrong(done)}")
        return {"rows": rows}

    for dim, group, kv in run.sizes.attention:
        for name in run.sizes.types:
            pattern = attention_case(name, dim, group, kv)
            yield Unit(f"{name}, head_dim {dim}, {kv} rows", 10, partial(measure, pattern))


def attention_case(name: str, dim: int, group: int, kv: int) -> str:
    """A pattern for the case of `test-backend-ops perf` with one query over so many rows."""
    return rf"hsk={dim},.*nr23=.{group},1.,kv={kv},nb=1,.*type_K={name},type_V={name},permute=.0,2,1,3."


def parse_perf(text: str) -> list[dict[str, Any]]:
    """Cases of `test-backend-ops perf`, with their parameters and microseconds per run."""
    rows = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        found = re.match(r"\s*FLASH_ATTN_EXT\((.*)\):\s+\d+ runs -\s+([\d.]+) us/run", line)
        if found:
            pairs = re.findall(r"(\w+)=(\[[^\]]*\]|[^,]*)", found[1])
            rows.append({**dict(pairs), "us": float(found[2])})
    return rows


#: Of Nsight Compute: what a row of the report says.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of its peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors, % of their peak",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, % of what fits",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_shared_mem": "blocks that shared memory allows",
}


def ncu(run: Run) -> Iterator[Unit]:
    """The decode kernel of iso3 under Nsight Compute, where that is."""
    program = shutil.which("ncu") or next(map(str, Path("/opt/nvidia/nsight-compute").glob("*/ncu")), None)
    if program is None:
        return

    def measure() -> dict[str, Any]:
        pattern = attention_case("iso3", *run.sizes.attention[0])
        command = [
            program,
            "--csv",
            "--page",
            "raw",
            "--metrics",
            ",".join(METRICS),
            "--clock-control",
            "none",
        ]
        command += ["-k", "regex:ggml_cuda_rq_flash_attn_kernel", "-s", "2", "-c", "1", "--kill", "yes"]
        command += [str(run.root / "bin" / "test-backend-ops"), "perf", "-b", run.backend]
        done = run.run([*command, "-o", "FLASH_ATTN_EXT", "-p", pattern])
        found = parse_ncu(done.stdout)
        if not found:
            raise wrong(done)
        return {"metrics": found}

    yield Unit("iso3, 131072", 25, measure)


def parse_ncu(text: str) -> dict[str, str]:
    """Values with their units from `ncu --csv --page raw`: a line of names, one of units, one of values."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return {}
    names, units, values = rows[:3]
    return {
        METRICS[name]: f"{value} {unit}".strip()
        for name, unit, value in zip(names, units, values, strict=False)
        if name in METRICS
    }


STEPS = (
    Step("device", 20, device),
    Step("ops", 90, ops),
    Step("kld", 100, kld),
    Step("speed", 230, speed),
    Step("attention", 60, attention),
    Step("ncu", 40, ncu),
)


def run_steps(run: Run, steps: tuple[Step, ...]) -> int:
    """Go through the steps, each within its share; then, with what is left, through what these cut off."""
    whole = sum(step.seconds for step in STEPS)
    (run.results / "device.json").unlink(
        missing_ok=True
    )  # takes seconds, and it may be another machine by now
    for last in (False, True):
        complete = True
        for step in steps:
            complete &= run.step(step, math.inf if last else step.seconds * max(1.0, run.budget / whole))
        if complete:
            break
    kept = [read_step(run.results / f"{step.name}.json", run.facts["patch_set"])["units"] for step in steps]
    failed = [
        name for units in kept for name, unit in units.items() if unit.get("failed") or unit.get("failures")
    ]
    if failed:
        print("wrong or without a result: " + "; ".join(failed))
        return WRONG
    if not complete:
        print("the time is up; run the same command again to go on")
        return CUT
    return DONE


# ---- the bundle, where it is run ----


def unpack(bundle: Path, work: Path) -> None:
    """Unpack the bundle, or take what was unpacked of it before, and see that every file is whole. Raises
    SystemExit."""
    root, mark = work / "gpu-check", work / "gpu-check.sha256"
    there = (root / "bundle.json").is_file()
    if bundle.is_file():
        digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
        if there and not (mark.is_file() and mark.read_text() == digest):
            raise SystemExit(f"error: {root} is not of {bundle}\n  try: another folder for --work")
        if not there:
            work.mkdir(parents=True, exist_ok=True)
            with tarfile.open(bundle) as tar:
                tar.extractall(work, filter="data")
            mark.write_text(digest)
    elif not there:
        raise SystemExit(
            f"error: there is no bundle {bundle}\n  try: python scripts/gpu_check.py pack {bundle}"
        )
    for name, digest in json.loads((root / "bundle.json").read_text())["files"].items():
        path = root / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"error: {path} is not as it was packed\n  try: another folder for --work")


def find_libraries(names: list[str], given: list[Path]) -> list[Path]:
    """The folders that hold libraries which the bundle leaves to this machine: cuBLAS. Raises SystemExit."""
    places = [*given, *map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))]
    places += [Path(os.environ[name], "lib64") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places += [*Path("/usr/local").glob("cuda*/lib64"), *Path("/usr/local").glob("cuda*/targets/*/lib")]
    places += [folder for package in map(Path, sys.path) for folder in package.glob("nvidia/*/lib")]
    found = list(given)
    for name in names:
        folder = next((place for place in places if (place / name).is_file()), None)
        if folder is None and not _loads(name):
            raise SystemExit(
                f"error: {name} was not found on this machine, and is too large to bring along\n"
                "  try: --libraries DIR, the folder of a CUDA toolkit or of NVIDIA's wheels that holds it"
            )
        if folder is not None and folder not in found:
            found.append(folder)
    return found


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def same_processor(facts: dict[str, Any]) -> None:
    """Raises SystemExit where the programs would end at an instruction that this processor does not have."""
    from ggufrq.base.machine import processor

    lacks = sorted(set(facts["flags"]) - set(processor().flags))
    if lacks:
        raise SystemExit(
            f"error: the programs are for {facts['cpu']}; {processor().name} lacks {', '.join(lacks)}\n"
            "  try: a bundle of a build with --no-native"
        )


def start(args: argparse.Namespace) -> int:
    began = monotonic()
    names = args.steps.split(",")
    unknown = [name for name in names if name not in {step.name for step in STEPS}]
    if unknown:
        raise SystemExit(
            f"error: there is no step {unknown[0]!r}\n  try: --steps {','.join(step.name for step in STEPS)}"
        )
    unpack(args.bundle, args.work)
    sys.path.insert(0, str(args.work / "gpu-check"))
    os.environ.setdefault("GGUFRQ_CACHE", str(args.work / "cache"))
    facts = json.loads((args.work / "gpu-check" / "bundle.json").read_text())
    same_processor(facts)
    run = Run(
        args.work,
        args.results,
        args.budget - (monotonic() - began),
        libraries=find_libraries(facts["left"], args.libraries),
        backend=args.backend,
        sizes=REHEARSAL if args.rehearse else FULL,
    )
    try:
        status = run_steps(run, tuple(step for step in STEPS if step.name in names))
    except NotStarting as said:
        print(f"error: {said}")
        return WRONG
    except NoDevice as said:
        print(f"no device: {said}")
        return NO_DEVICE
    print(f"{monotonic() - began:.0f} s\n\n{report(args.results)}")
    return status


# ---- report ----

NOT_MEASURED = "not measured"

#: Bits per value of K and V together with their scales.
_BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "iso2": 2.125, "iso3": 3.125, "iso4": 4.125}


def report(results: Path) -> str:
    """The tables of docs/cuda.md from what there is; the rest is "not measured"."""
    units = {
        step.name: json.loads(path.read_text())["units"]
        for step in STEPS
        if (path := results / f"{step.name}.json").is_file()
    }
    parts = [*_machine(units.get("device", {})), *_main_table(units), "", *_ops_table(units.get("ops", {}))]
    for name, unit in units.get("ncu", {}).items():
        if "metrics" in unit:
            parts += [
                "",
                f"Nsight Compute, {name}: " + ", ".join(f"{k} {v}" for k, v in unit["metrics"].items()),
            ]
    failed = [
        f"- {step}, {name}: {unit['failed']}"
        for step, found in units.items()
        for name, unit in found.items()
        if unit.get("failed")
    ]
    return "\n".join([*parts, *(["", "Without a result:", *failed] if failed else [])])


def _machine(device: dict[str, Any]) -> list[str]:
    card = device.get("card", {})
    if "copy" not in card:
        return []
    copy = f"a copy within its memory: {card['copy']} GB/s read and written"
    return [f"{card.get('name', 'a card')}, driver {card.get('driver', card.get('cuda'))}; {copy}", ""]


def _row(label: str, cells: list[str | None]) -> str:
    return f"| {label} | " + " | ".join(cell or NOT_MEASURED for cell in cells) + " |"


def _main_table(units: dict[str, Any]) -> list[str]:
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        _row(f"{what} at depth {depth:,}, t/s", _speed_cells(units.get("speed", {}), what, depth))
        for what in ("decode", "prefill")
        for depth in FULL.depths
    ]
    rows = [row for unit in units.get("attention", {}).values() for row in unit.get("rows", [])]
    copy = units.get("device", {}).get("card", {}).get("copy")
    for dim, group, kv in FULL.attention:
        label = f"attention alone at {kv:,}, head_dim {dim}, GB/s of the cache"
        lines.append(_row(label, _attention_cells(rows, dim, group, kv, copy)))
    found = [unit for unit in units.get("kld", {}).values() if "kld_mean" in unit]
    models = sorted({unit["model"] for unit in found}) or ["docs-qwen3-8m", "docs-qwen3.5-8m"]
    for model in models:
        for where, label in (("cuda", "CUDA"), ("unfused", "CUDA, not fused"), ("cpu", "CPU")):
            means = {u["cache"]: u["kld_mean"] for u in found if u["model"] == model and u["where"] == where}
            cells = [f"{abs(means[name]):.6f}" if name in means else None for name in COLUMNS]
            lines.append(_row(f"KLD from f16 on the CPU, {model}: {label}", cells))
    return lines


def _speed_cells(units: dict[str, Any], what: str, depth: int) -> list[str | None]:
    runs = [unit for unit in units.values() if "turn" in unit and unit["depth"] == depth]
    by_turn = {(unit["cache"], unit["turn"]): unit[what] for unit in runs}
    cells: list[str | None] = []
    for column in COLUMNS:
        mine = {turn: value for (name, turn), value in by_turn.items() if name == column}
        ratios = [value / by_turn["f16", turn] for turn, value in mine.items() if ("f16", turn) in by_turn]
        if not mine:
            held = units.get(f"{column}: held", {})
            cells.append(f"not held: {held['why']}" if held.get("held") is False else None)
        elif column == "f16" or not ratios:
            cells.append(f"{mean(mine.values()):.1f}")
        else:
            cells.append(f"{mean(mine.values()):.1f} ({mean(ratios):.2f}×)")
    return cells


def _attention_cells(
    rows: list[dict[str, Any]], dim: int, group: int, kv: int, copy: float | None
) -> list[str | None]:
    us = {
        row["type_K"]: row["us"]
        for row in rows
        if (row["hsk"], row["nr23"], row["kv"], row["nb"]) == (str(dim), f"[{group},1]", str(kv), "1")
    }
    cells: list[str | None] = []
    for column in COLUMNS:
        if column not in us:
            cells.append(None)
            continue
        heads = 32 // group
        speed = 2 * heads * kv * dim * _BITS[column] / 8 / us[column] / 1e3
        times = f", {us['f16'] / us[column]:.2f}×" if "f16" in us and column != "f16" else ""
        cells.append(f"{speed:.0f} ({100 * speed / copy:.0f} %{times})" if copy else f"{speed:.0f}")
    return cells


def _ops_table(units: dict[str, Any]) -> list[str]:
    lines = ["| `test-backend-ops` | passed | not supported |", "|---|---|---|"]
    for name in OPS:
        unit = units.get(name, {})
        passed = f"{unit['passed']} of {unit['of']}" if "of" in unit else None
        lines.append(_row(name, [passed, str(unit["not_supported"]) if "of" in unit else None]))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the bundle and prove that it is complete")
    packing.add_argument("out", type=Path)
    packing.add_argument(
        "--build", type=Path, help="the folder of a build; the newest for CUDA of these patches"
    )
    packing.add_argument("--architecture", type=int, default=90, help="of the card, as in sm_90")
    running = commands.add_parser("run", help="measure, as far as the time goes")
    running.add_argument("bundle", type=Path)
    running.add_argument("--work", type=Path, required=True, help="a folder with 2 GB of room")
    running.add_argument("--results", type=Path, required=True, help="a JSON file per step; keep it")
    running.add_argument("--budget", type=float, default=540.0, help="seconds, all together")
    running.add_argument("--steps", default=",".join(step.name for step in STEPS))
    running.add_argument("--libraries", type=Path, action="append", default=[], help="a folder with cuBLAS")
    running.add_argument("--backend", default="CUDA0", help="the device, as test-backend-ops names it")
    running.add_argument(
        "--rehearse", action="store_true", help="the same programs on little, without a card"
    )
    reporting = commands.add_parser("report", help="the tables of docs/cuda.md")
    reporting.add_argument("results", type=Path)
    probing = commands.add_parser("probe", help="what `run` starts to ask the driver")
    probing.add_argument("runtime", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        import gpu_bundle

        from ggufrq.base.errors import GgufrqError

        try:
            gpu_bundle.pack(args.out, args.build, args.architecture)
        except GgufrqError as error:
            remedy = f"\n  try: {error.remedy}" if error.remedy else ""
            print(f"error: {error.message}{remedy}", file=sys.stderr)
            return WRONG
        return DONE
    if args.command == "report":
        print(report(args.results))
        return DONE
    if args.command == "probe":
        print(json.dumps(probe(args.runtime)))
        return DONE
    return start(args)


if __name__ == "__main__":
    sys.exit(main())

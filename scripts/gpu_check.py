"""Check and measure the CUDA kernels on a machine with an NVIDIA card, a CUDA toolkit and no network.

    python scripts/gpu_check.py pack gpu-check.tar.xz   # where ggufrq is set up: source, models, packages
    python3 scripts/gpu_check.py run gpu-check.tar.xz --work DIR --results DIR --minutes 9
    python3 scripts/gpu_check.py report DIR             # the tables of docs/cuda.md

`run` goes through build, ops (test-backend-ops of our types against the CPU), kld (the CUDA build against
the CPU on the embedded models), attention (the kernel alone) and speed (llama-bench, random weights) unit by
unit, keeps the result of each as JSON and begins no unit that it may not finish within --minutes: run it
again to go on. It needs Python 3.10 with numpy, CMake, Ninja and a C++ compiler; the rest is in the bundle.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

TARGETS = ("test-backend-ops", "llama-bench", "llama-perplexity")
#: Pure Python packages that ggufrq.tools needs; `pack` takes their wheels along.
PACKAGES = ("filelock", "markdown-it-py", "mdurl", "platformdirs", "pygments", "rich")
#: Of llama.cpp's tree what these targets do not need.
LEFT_OUT = ("models", "docs", "media", "examples", "benches", ".git", "*.gguf")

TYPES = ("f16", "iso3", "planar3", "iso4", "q8_0", "q4_0")
DEPTHS = (0, 8192, 32768, 131072)
KLD_TYPES = ("q8_0", "iso2", "iso3", "iso4", "planar3", "rotor3", "iso3/planar4", "q8_0/iso3", "iso4/f16")
OPS = {
    "rotations": ("MUL_MAT_RQ", ".*"),
    "set_rows": ("SET_ROWS", "type=(planar|iso|rotor)"),
    "get_rows": ("GET_ROWS", "type=(planar|iso|rotor)"),
    "cpy": ("CPY,CONT,DUP", "(planar|iso|rotor)"),
    "attention": ("FLASH_ATTN_EXT", "type_[KV]=(planar|iso|rotor)"),
}


@dataclass(frozen=True)
class Shape:
    """A model of random Q4_0 weights whose attention is that of a real one."""

    name: str
    arch: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 128256


SHAPES = (
    Shape("llama-3.1-8b-like", "llama", 32, 4096, 14336, 32, 8, 128),
    # the 16 attention layers of Qwen3.5-27B with their FFN; its 48 linear layers have no KV cache
    Shape("qwen3.5-27b-attention-like", "qwen3", 16, 5120, 17408, 24, 4, 256),
)


# ---- pack ----


def pack(out: Path) -> None:
    """Write the bundle: patched source, ggufrq, packages, models, text, CMake's definitions."""
    import ggufrq
    from ggufrq.base import paths
    from ggufrq.build import cmake_files
    from ggufrq.models.convert import convert
    from ggufrq.models.resolve import embedded_models
    from ggufrq.patchset import patches
    from ggufrq.patchset.series import default_patch_set
    from ggufrq.source import obtain
    from ggufrq.source.pin import load_pin

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        root = Path(scratch) / "gpu-check"
        tree = obtain.pristine(load_pin())
        shutil.copytree(tree, root / "src", symlinks=True, ignore=shutil.ignore_patterns(".git"))
        patch_set = default_patch_set()
        patches.apply(patch_set, root / "src", what="llama.cpp")
        for name in LEFT_OUT:
            for path in (root / "src").glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(
            Path(ggufrq.__file__).parent,
            root / "ggufrq",
            ignore=shutil.ignore_patterns("data", "__pycache__"),
        )
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", root / "site", *PACKAGES], check=True)
        quantizers = sorted(paths.builds_dir().glob("*/obj/bin/llama-quantize"))
        for name, folder in embedded_models().items():
            f16 = convert(folder, Path(scratch) / f"{name}.gguf", root / "src")
            if quantizers:  # of any build: Q8_0 halves the bundle
                subprocess.run([quantizers[0], f16, root / f"{name}.gguf", "Q8_0"], check=True)
            else:
                shutil.move(f16, root)
        shutil.copy(paths.data_dir("texts") / "heldout.txt", root)
        facts = {
            "commit": load_pin().commit,
            "patch_set": patch_set.hash,
            "definitions": cmake_files.options("common") | cmake_files.options("cuda"),
            "models": list(embedded_models()),
        }
        (root / "bundle.json").write_text(json.dumps(facts, indent=2))
        with paths.atomic_path(out) as making, tarfile.open(making, "w:xz", preset=6) as tar:
            tar.add(root, "gpu-check")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


# ---- run ----


class NoTime(Exception):
    """The unit would not fit into what is left of --minutes."""


class Run:
    """The folder of the bundle and the build, the results, and the time that is left."""

    def __init__(self, work: Path, results: Path, minutes: float) -> None:
        self.root = work / "gpu-check"
        self.obj = work / "obj"
        self.results = results
        self.deadline = time.monotonic() + 60 * minutes
        results.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = json.loads((self.root / "bundle.json").read_text())

    def unit(self, name: str, needs: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure, unless it has been; ``needs`` is a generous guess of its seconds."""
        path = self.results / f"{name}.json"
        if path.is_file():
            return
        if time.monotonic() + needs > self.deadline:
            raise NoTime(name)
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        result = measure()
        seconds = round(time.monotonic() - started, 1)
        write = {"unit": name, "seconds": seconds, "patch_set": self.facts["patch_set"], **result}
        path.with_suffix(".tmp").write_text(json.dumps(write, indent=2) + "\n")
        path.with_suffix(".tmp").replace(path)
        print(f"{name}: {seconds} s", flush=True)

    def tool(self, name: str, *arguments: str | Path, env: dict[str, str | None] | None = None) -> Any:
        """Run a built program to its end; within the time that is left."""
        from ggufrq.base import proc

        left = max(30.0, self.deadline - time.monotonic() + 60)
        command = [self.obj / "bin" / name, *arguments]
        return proc.run(command, check=False, timeout=left, env=env, log=self.results / f"{name}.log")

    def compile(self, command: list[str]) -> None:
        """A stage of the build, ended with all its compilers when the time is up."""
        from ggufrq.base import proc
        from ggufrq.base.errors import ToolError

        left = max(1.0, self.deadline - time.monotonic())
        try:
            proc.run(command, timeout=left, on_stdout=lambda text: print(text, end="", flush=True))
        except ToolError:
            if time.monotonic() < self.deadline:
                raise
            raise NoTime("the build is done") from None


def machine() -> dict[str, Any]:
    """Card, driver, compiler, processor."""
    from ggufrq.base.machine import processor
    from ggufrq.build import cuda_toolkit

    return {
        "cards": [asdict(card) for card in cuda_toolkit.cards()],
        "nvcc": cuda_toolkit.find().version,
        "cpu": processor().name,
    }


def build(run: Run) -> Iterator[None]:
    """CMake's own build, which goes on where it was stopped."""
    from ggufrq.build import cuda_toolkit, toolchain
    from ggufrq.build.backends import cuda

    def make() -> dict[str, Any]:
        defined = {
            **run.facts["definitions"],
            "GGML_NATIVE": "ON",
            "LLAMA_BUILD_COMMIT": f"{run.facts['commit'][:9]}-rq{run.facts['patch_set'][:8]}",
            "CMAKE_CUDA_ARCHITECTURES": cuda.architectures(cuda_toolkit.find().version),
            **cuda_toolkit.definitions(cuda_toolkit.find()),
        }
        cmake, ninja = toolchain.cmake(), toolchain.ninja()  # from PATH or this Python's packages
        if cmake is None or ninja is None:
            raise SystemExit("CMake or Ninja is missing")
        defined["CMAKE_MAKE_PROGRAM"] = str(ninja.path)
        command = [str(cmake.path), "-G", "Ninja", "-S", str(run.root / "src"), "-B", str(run.obj)]
        run.compile([*command, *(f"-D{name}={value}" for name, value in defined.items())])
        jobs = str(os.cpu_count() or 1)
        run.compile([str(cmake.path), "--build", str(run.obj), "-j", jobs, "--target", *TARGETS])
        return {"machine": machine(), "definitions": defined}

    run.unit("build", 60, make)
    yield


def ops(run: Run) -> Iterator[None]:
    """Our types in every operation, against the CPU."""
    for name, (op, params) in OPS.items():

        def test(op: str = op, params: str = params) -> dict[str, Any]:
            done = run.tool("test-backend-ops", "test", "-b", "CUDA0", "-o", op, "-p", params, "-j", "8")
            return {"rc": done.rc, **parse_test(done.stdout)}

        run.unit(f"ops-{name}", 240, test)
        yield


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


def kld(run: Run) -> Iterator[None]:
    """The same caches on the card and on the CPU, against the CPU with an f16 cache."""
    from ggufrq.cache.kv import parse_plan
    from ggufrq.tools import perplexity

    def measure(model: str, cache: str, where: str) -> dict[str, Any]:
        base = run.results / f"{model}.logits"
        device = ["--device", "none"] if where == "cpu" else ["-ngl", "99"]
        env = {"GGML_CUDA_DISABLE_FUSION": "1" if where == "unfused" else None}

        def once(types: str, place: list[str], divergence: bool) -> Any:
            arguments = perplexity.arguments(
                run.root / f"{model}.gguf",
                run.root / "heldout.txt",
                parse_plan(types),
                base,
                n_ctx=2048,
                chunks=4,
                divergence=divergence,
            )
            return run.tool("llama-perplexity", *arguments, *place, env=env)

        if not base.is_file():
            done = once("f16", ["--device", "none"], False)
            perplexity.parse_perplexity(done.stdout, done.stderr)
        done = once(cache, device, True)
        found = asdict(perplexity.parse_divergence(done.stdout, done.stderr))
        return {"model": model, "cache": cache, "where": where, **found}

    for model in run.facts["models"]:
        for cache in ("f16", *KLD_TYPES):
            # "unfused": rotations and stores one by one; what their one launch does must be the same
            for where in ("cuda", "cpu", *(("unfused",) if cache == "iso3" else ())):
                name = f"kld-{model}-{cache.replace('/', '_')}-{where}"
                run.unit(name, 60, partial(measure, model, cache, where))
                yield
        (run.results / f"{model}.logits").unlink(missing_ok=True)


def attention(run: Run) -> Iterator[None]:
    """The attention alone, by test-backend-ops perf."""
    for head_dim in (128, 256):

        def measure(head_dim: int = head_dim) -> dict[str, Any]:
            pattern = f"hsk={head_dim},.*permute=.0,2,1,3."
            done = run.tool("test-backend-ops", "perf", "-b", "CUDA0", "-o", "FLASH_ATTN_EXT", "-p", pattern)
            return {"rows": parse_perf(done.stdout)}

        run.unit(f"attention-{head_dim}", 240, measure)
        yield


def parse_perf(text: str) -> list[dict[str, Any]]:
    """Cases of `test-backend-ops perf`, with their parameters and microseconds per run."""
    rows = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        found = re.match(r"\s*FLASH_ATTN_EXT\((.*)\):\s+\d+ runs -\s+([\d.]+) us/run", line)
        if found:
            pairs = re.findall(r"(\w+)=(\[[^\]]*\]|[^,]*)", found[1])
            rows.append({**dict(pairs), "us": float(found[2])})
    return rows


def speed(run: Run) -> Iterator[None]:
    """llama-bench: every type of a depth in one unit, f16 first and last, so that ratios are of one run."""
    from ggufrq.cache.kv import parse_kv
    from ggufrq.tools import bench

    def measure(shape: Shape, depth: int) -> dict[str, Any]:
        model = run.obj / f"{shape.name}.gguf"
        if not model.is_file():
            write_model(model, shape)
        rows = []
        for types in (*TYPES, "f16"):
            arguments = bench.arguments(
                model,
                parse_kv(types),
                prompt=512,
                generate=64,
                depth=depth,
                repetitions=3 if depth < 100000 else 2,
            )
            done = run.tool("llama-bench", *arguments, "-ngl", "99")
            rows.append({"cache": types, **asdict(bench.parse(done.stdout, done.stderr))})
        return {"shape": asdict(shape), "depth": depth, "rows": rows, "machine": machine()}

    for shape in SHAPES:
        for depth in DEPTHS:
            needs = 120 if depth < 10000 else 200 if depth < 100000 else 420
            run.unit(f"speed-{shape.name}-{depth}", needs, partial(measure, shape, depth))
            yield


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
        if shape.arch == "qwen3":
            tensors += [(base + f"attn_{x}_norm.weight", (shape.head_dim,)) for x in "qk"]

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


STEPS: dict[str, Callable[[Run], Iterator[None]]] = {
    "build": build,
    "ops": ops,
    "kld": kld,
    "attention": attention,
    "speed": speed,
}


def run_steps(bundle: Path, work: Path, results: Path, minutes: float, steps: list[str]) -> int:
    """Go through the steps; 0 when all is done, 3 when the time is up before."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "gpu-check" / "bundle.json").is_file():
        with tarfile.open(bundle) as tar:
            tar.extractall(work, filter="data")
    sys.path[:0] = [str(work / "gpu-check"), str(work / "gpu-check" / "site")]
    os.environ.setdefault("GGUFRQ_CACHE", str(work / "cache"))
    run = Run(work, results, minutes)
    for step in steps:
        try:
            for _ in STEPS[step](run):
                pass
        except NoTime as stopped:
            print(f"the time is up before {stopped}; run the same command again to go on")
            return 3
    print(f"done: {results}")
    return 0


# ---- report ----


def report(results: Path) -> str:
    """Tables in Markdown from what there is; what was not measured has no row."""
    units = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    lines: list[str] = []
    made = units.get("build")
    if made:
        cards = ", ".join(f"{card['name']}, driver {card['driver']}" for card in made["machine"]["cards"])
        lines += [f"{cards}; nvcc {made['machine']['nvcc']}; patch set {made['patch_set'][:8]}", ""]
    found = {name: unit for name, unit in units.items() if name.startswith("ops-")}
    if found:
        lines += ["| operation | passed | not supported |", "|---|---|---|"]
        for name, unit in found.items():
            passed = f"{unit['passed']} of {unit['of']}"
            lines.append(f"| {name.removeprefix('ops-')} | {passed} | {unit['not_supported']} |")
        lines.append("")
    lines += _kld_table(units) + _attention_table(units) + _speed_tables(units)
    return "\n".join(lines)


def _kld_table(units: dict[str, Any]) -> list[str]:
    by_key = {(u["model"], u["cache"], u["where"]): u for n, u in units.items() if n.startswith("kld-")}
    lines = []
    for (model, cache, where), unit in by_key.items():
        other = by_key.get((model, cache, "cpu"))
        if where != "cpu" and other:
            name = cache if where == "cuda" else f"{cache}, {where}"
            row = f"| {model} | {name} | {unit['kld_mean']:.5f} | {other['kld_mean']:.5f} |"
            lines.append(f"{row} {100 * unit['same_top']:.1f} | {100 * other['same_top']:.1f} |")
    if not lines:
        return []
    head = "| model | cache | KLD, CUDA | KLD, CPU | top, CUDA, % | top, CPU, % |"
    return [head, "|---|---|---|---|---|---|", *lines, ""]


#: Bits per value of K and V together with their scales.
_BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "iso2": 2.125, "iso3": 3.125, "iso4": 4.125}


def _attention_table(units: dict[str, Any]) -> list[str]:
    lines = []
    for unit in (u for n, u in units.items() if n.startswith("attention-")):
        rows = [row for row in unit["rows"] if row["nb"] == "1" and row["type_K"] in _BITS]
        f16 = {(r["hsk"], r["nr23"], r["kv"]): r["us"] for r in rows if r["type_K"] == "f16"}
        for row in rows:
            dim, kv, heads = int(row["hsk"]), int(row["kv"]), int(row["nh"])
            gigabytes = 2 * heads * kv * dim * _BITS[row["type_K"]] / 8 / row["us"] / 1e3
            times = f16.get((row["hsk"], row["nr23"], row["kv"]), 0) / row["us"]
            line = f"| {dim} | {row['nr23']} | {kv} | {row['type_K']} | {row['us']:.1f} |"
            lines.append(f"{line} {gigabytes:.0f} | {times:.2f} |")
    if not lines:
        return []
    head = "| head_dim | group | rows | cache | µs | GB/s of the cache | × f16 |"
    return [head, "|---|---|---|---|---|---|---|", *lines, ""]


def _speed_tables(units: dict[str, Any]) -> list[str]:
    lines = []
    for unit in (u for n, u in units.items() if n.startswith("speed-")):
        rows = unit["rows"]
        f16 = [row for row in rows if row["cache"] == "f16"]
        prefill = sum(row["prefill"] for row in f16) / len(f16)
        decode = sum(row["decode"] for row in f16) / len(f16)
        for row in rows:
            line = f"| {unit['shape']['name']} | {unit['depth']} | {row['cache']} | {row['prefill']:.0f} |"
            line += f" {row['prefill'] / prefill:.2f} | {row['decode']:.1f} | {row['decode'] / decode:.2f} |"
            lines.append(line)
    if not lines:
        return []
    head = "| model | depth | cache | prefill, t/s | × f16 | decode, t/s | × f16 |"
    return [head, "|---|---|---|---|---|---|---|", *lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the bundle")
    packing.add_argument("out", type=Path)
    running = commands.add_parser("run", help="build and measure, as far as the time goes")
    running.add_argument("bundle", type=Path)
    running.add_argument("--work", type=Path, required=True, help="for the source and the build")
    running.add_argument("--results", type=Path, required=True, help="a JSON file per unit; keep it")
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--steps", default=",".join(STEPS))
    reporting = commands.add_parser("report", help="tables of the results")
    reporting.add_argument("results", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.out)
        return 0
    if args.command == "report":
        print(report(args.results))
        return 0
    return run_steps(args.bundle, args.work, args.results, args.minutes, args.steps.split(","))


if __name__ == "__main__":
    sys.exit(main())

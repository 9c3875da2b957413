"""Measure attention with rotated cache types against upstream's types, on this machine, as ratios.

Tables in Markdown: llama-bench on the model of make_model.py, pairs of different types through our
attention and through upstream's, and FLASH_ATTN_EXT alone (test-backend-ops perf). Types take turns within a
round and the median of the rounds counts: drifting speed does not change the ratios. Decode is also given as
the bytes of the cache that are read in a second, beside what the machine reads at most.

    ggufrq build --tests
    python bench/cpu_attention.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from make_model import HEAD_DIM, KV_HEADS, LAYERS

from ggufrq import codec
from ggufrq.cache.kv import KvPair, parse_kv

TYPES = ["f16", "q8_0", "q4_0", "iso2", "iso3", "iso4"]
SLOW, SLOW_DEPTH = {"q8_0", "q4_0"}, 4096  # filling a deep cache of these takes hours
PAIRS = ["iso3/f16", "f16/iso3", "iso3/q8_0", "q8_0/planar3", "iso4/iso3"]
PAIRS_DEPTH = 2048  # upstream fills a cache of these pairs slowly
UPSTREAM = {"GGML_RQ_UPSTREAM_FATTN": "1"}
MLA = 576  # V is the first 512 values of K, one KV head
OP = re.compile(r"type_K=(\w+),type_V=(\w+),permute=\[0,2,1,3\].*?([\d.]+) us/run")


def run(command: list[str], extra: dict[str, str] | None = None) -> str:
    environment = {**os.environ, **(extra or {})}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads read from memory: best of five passes over 512 MiB each."""
    arrays = [np.ones(1 << 26, np.int64) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=a.max) for a in arrays]  # numpy lets other threads run meanwhile
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(a.nbytes for a in arrays) / (time.perf_counter() - start))
    return best


def cache_bytes(kind: str, depth: int, head_dim: int) -> int:
    """Bytes of K and V that one token of the model reads behind ``depth`` others."""
    values = LAYERS * KV_HEADS * HEAD_DIM * depth
    pair = parse_kv(kind)
    return KvPair(pair.k.for_heads(head_dim), pair.v.for_heads(head_dim)).bytes_for(values, values)


def table(title: str, rows: dict[str, dict[str, float]], unit: str, columns: Iterable[str]) -> None:
    """One row per case: the figure of f16, then every type's speed as a multiple of it."""
    names = [c for c in columns if c != "f16"]
    print(f"\n| {title} | f16, {unit} | " + " | ".join(f"{n}" for n in names) + " |")
    print("|---" * (len(names) + 2) + "|")
    for case, speeds in rows.items():
        ratios = " | ".join(f"{speeds[n] / speeds['f16']:.2f}x" if n in speeds else "" for n in names)
        print(f"| {case} | {speeds['f16']:.4g} | {ratios} |", flush=True)


def stored(kind: str, head_dim: int) -> str:
    """The type that heads are kept in where ``kind`` is asked for."""
    asked = parse_kv(kind).k
    return kind if asked.for_heads(head_dim) == asked else codec.sibling(codec.cache_type(kind).bits).name


def ops(program: Path, rounds: int, types: list[str], sizes: list[int], heads: list[int]) -> None:
    """Attention alone: calls per second, median of the rounds."""
    rows: dict[str, dict[str, float]] = {}
    for hs in heads:
        for group in (16,) if hs == MLA else (4, 8):
            for kv in sizes:
                for nb in (1, 512):
                    seen: dict[str, list[float]] = defaultdict(list)
                    shape = f"hsk={hs},.*nr23=.{group},1.,kv={kv},nb={nb},"
                    for _ in range(rounds):
                        for kind in types:
                            if kind in SLOW and nb > 1 and kv > SLOW_DEPTH:
                                continue
                            name = stored(kind, hs)
                            pattern = f"{shape}.*type_K={name},type_V={name},permute=.0,2,1,3"
                            which = ["-b", "CPU", "-o", "FLASH_ATTN_EXT", "-p", pattern]
                            text = run([str(program), "perf", *which])
                            found = OP.search(text)
                            if found:
                                seen[kind].append(1e6 / float(found[3]))
                    rows[f"d {hs}, group {group}, kv {kv}, {nb} queries"] = {
                        kind: statistics.median(values) for kind, values in seen.items()
                    }
    table("FLASH_ATTN_EXT", rows, "calls/s", types)


def speeds(
    program: Path, model: Path, kind: str, depth: int, threads: int, extra: dict[str, str] | None = None
) -> dict[str, float]:
    """Tokens per second of one llama-bench run, by test."""
    k, _, v = kind.partition("/")
    flags = ["-fa", "on", "-p", "512", "-n", "32", "-r", "1", "-d", str(depth), "-o", "json"]
    command = [str(program), "-m", str(model), "-t", str(threads), "-ctk", k, "-ctv", v or k, *flags]
    found = json.loads(run(command, extra))
    return {"pp512" if entry["n_prompt"] else "tg32": entry["avg_ts"] for entry in found}


def bench(
    program: Path, model: Path, rounds: int, types: list[str], depths: list[int], threads: int, head_dim: int
) -> None:
    """llama-bench: tokens per second, median of the rounds; SLOW types only up to SLOW_DEPTH."""
    rows: dict[str, dict[str, float]] = {}
    for depth in depths:
        seen: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(rounds):
            for kind in types:
                if kind in SLOW and depth > SLOW_DEPTH:
                    continue
                for test, value in speeds(program, model, kind, depth, threads).items():
                    seen[test, kind].append(value)
        for test in ("pp512", "tg32"):
            rows[f"{test} @ {depth}"] = {k: statistics.median(v) for (t, k), v in seen.items() if t == test}
    table("llama-bench", rows, "tokens/s", types)

    print(f"\nmemory read by {threads} threads at most: {read_bandwidth(threads) / 1e9:.1f} GB/s")
    print("\n| cache read in decode, GB/s | " + " | ".join(types) + " |")
    print("|---" * (len(types) + 1) + "|")
    for depth in filter(None, depths):
        row = rows[f"tg32 @ {depth}"]
        cells = [f"{row[k] * cache_bytes(k, depth, head_dim) / 1e9:.2f}" if k in row else "" for k in types]
        print(f"| @ {depth} | " + " | ".join(cells) + " |", flush=True)


def pairs(program: Path, model: Path, rounds: int, depth: int, threads: int) -> None:
    """Pairs of two types: our attention against upstream's on the very same cache."""
    print(f"\n| pair, @ {depth} | upstream's attention, pp512 | ours | upstream's, tg32 | ours |")
    print("|---" * 5 + "|")
    for pair in PAIRS:
        ours: dict[str, list[float]] = defaultdict(list)
        theirs: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for seen, extra in ((ours, None), (theirs, UPSTREAM)):
                for test, value in speeds(program, model, pair, depth, threads, extra).items():
                    seen[test].append(value)
        cells = []
        for test in ("pp512", "tg32"):
            base, mine = statistics.median(theirs[test]), statistics.median(ours[test])
            cells += [f"{base:.4g} tokens/s", f"{mine / base:.2f}x"]
        print(f"| {pair} | " + " | ".join(cells) + " |", flush=True)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bin", type=Path, help="folder of the programs (default: of `ggufrq build`)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 4096, 16384, 32768])
    parser.add_argument("--kv", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--heads", nargs="+", type=int, default=[64, 128, 256], help="of attention alone")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help="of the model for llama-bench")
    parser.add_argument("--only", choices=["ops", "bench", "pairs"])
    args = parser.parse_args()

    folder = args.bin
    if folder is None:
        folder = Path(run([sys.executable, "-m", "ggufrq", "where", "bin"]).strip())
    print(f"{cpu_name()}, {args.threads} threads")
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.gguf"
        if args.only != "ops":
            maker = str(Path(__file__).parent / "make_model.py")
            run([sys.executable, maker, str(model), "--head-dim", str(args.head_dim)])
        if args.only in (None, "bench"):
            program = folder / "llama-bench"
            bench(program, model, args.rounds, args.types, args.depths, args.threads, args.head_dim)
        if args.only in (None, "pairs"):
            pairs(folder / "llama-bench", model, args.rounds, PAIRS_DEPTH, args.threads)
    if args.only in (None, "ops"):
        ops(folder / "test-backend-ops", args.rounds, args.types, args.kv, args.heads)


if __name__ == "__main__":
    main()

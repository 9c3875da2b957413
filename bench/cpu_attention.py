"""Measure attention with rotated cache types against upstream's types, on this machine, as ratios.

Two tables in Markdown: llama-bench on the model of make_model.py, and FLASH_ATTN_EXT alone (test-backend-ops
perf). Types take turns within a round and the median of the rounds counts: drifting speed does not change
the ratios.

    ggufrq build --tests
    python bench/cpu_attention.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

TYPES = ["f16", "q8_0", "q4_0", "iso2", "iso3", "iso4"]
SLOW, SLOW_DEPTH = {"q8_0", "q4_0"}, 4096  # filling a deep cache of these takes hours
OP = re.compile(r"type_K=(\w+),type_V=(\w+),permute=\[0,2,1,3\].*?([\d.]+) us/run")


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(title: str, rows: dict[str, dict[str, float]], unit: str, columns: Iterable[str]) -> None:
    """One row per case: the figure of f16, then every type's speed as a multiple of it."""
    names = [c for c in columns if c != "f16"]
    print(f"\n| {title} | f16, {unit} | " + " | ".join(f"{n}" for n in names) + " |")
    print("|---" * (len(names) + 2) + "|")
    for case, speeds in rows.items():
        ratios = " | ".join(f"{speeds[n] / speeds['f16']:.2f}x" if n in speeds else "" for n in names)
        print(f"| {case} | {speeds['f16']:.4g} | {ratios} |", flush=True)


def ops(program: Path, rounds: int, types: list[str], sizes: list[int]) -> None:
    """Attention alone: calls per second, median of the rounds."""
    rows: dict[str, dict[str, float]] = {}
    for hs in (128, 256):
        for group in (4, 8):
            for kv in sizes:
                for nb in (1, 512):
                    seen: dict[str, list[float]] = defaultdict(list)
                    shape = f"hsk={hs},.*nr23=.{group},1.,kv={kv},nb={nb},"
                    for _ in range(rounds):
                        for kind in types:
                            if kind in SLOW and nb > 1 and kv > SLOW_DEPTH:
                                continue
                            pattern = f"{shape}.*type_K={kind},type_V={kind},permute=.0,2,1,3"
                            which = ["-b", "CPU", "-o", "FLASH_ATTN_EXT", "-p", pattern]
                            text = run([str(program), "perf", *which])
                            found = OP.search(text)
                            if found:
                                seen[kind].append(1e6 / float(found[3]))
                    rows[f"d {hs}, group {group}, kv {kv}, {nb} queries"] = {
                        kind: statistics.median(values) for kind, values in seen.items()
                    }
    table("FLASH_ATTN_EXT", rows, "calls/s", types)


def bench(program: Path, model: Path, rounds: int, types: list[str], depths: list[int], threads: int) -> None:
    """llama-bench: tokens per second, median of the rounds; SLOW types only up to SLOW_DEPTH."""
    rows: dict[str, dict[str, float]] = {}
    for depth in depths:
        seen: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(rounds):
            for kind in types:
                if kind in SLOW and depth > SLOW_DEPTH:
                    continue
                flags = ["-fa", "on", "-p", "512", "-n", "32", "-r", "1", "-d", str(depth), "-o", "json"]
                text = run(
                    [str(program), "-m", str(model), "-t", str(threads), "-ctk", kind, "-ctv", kind, *flags]
                )
                for entry in json.loads(text):
                    test = "pp512" if entry["n_prompt"] else "tg32"
                    seen[test, kind].append(entry["avg_ts"])
        for test in ("pp512", "tg32"):
            rows[f"{test} @ {depth}"] = {k: statistics.median(v) for (t, k), v in seen.items() if t == test}
    table("llama-bench", rows, "tokens/s", types)


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
    parser.add_argument("--only", choices=["ops", "bench"])
    args = parser.parse_args()

    folder = args.bin
    if folder is None:
        folder = Path(run([sys.executable, "-m", "ggufrq", "where", "bin"]).strip())
    print(f"{cpu_name()}, {args.threads} threads")
    if args.only != "ops":
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model.gguf"
            run([sys.executable, str(Path(__file__).parent / "make_model.py"), str(model)])
            bench(folder / "llama-bench", model, args.rounds, args.types, args.depths, args.threads)
    if args.only != "bench":
        ops(folder / "test-backend-ops", args.rounds, args.types, args.kv)


if __name__ == "__main__":
    main()

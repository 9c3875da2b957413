"""Tokens per second of the wheel of llama-cpp-python beside those of llama-bench, in pairs.

    ggufrq build --python --install ENVIRONMENT
    python bench/python_speed.py MODEL ENVIRONMENT/bin/python --kv f16,iso3 --rounds 5

Each round runs both, one after the other, with the same threads and cache, without profile and tokens
in f16: prefill of ``--prompt`` tokens at once, then decode of ``--generate`` tokens one by one behind them,
unsampled, as llama-bench does it; and generation, which is decode with sampling and text. For a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ggufrq.base import machine, proc, table
from ggufrq.build.builds import require_build
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPair, parse_kv, parse_plan
from ggufrq.measure.validate.speed import judge
from ggufrq.tools import bench

#: Runs in the environment of the wheel: figures as JSON.
_SCRIPT = """
import json, sys, time
import llama_cpp
from llama_cpp import Llama

model, type_k, type_v, prompt, generate, threads = sys.argv[1:4] + [int(word) for word in sys.argv[4:]]
llm = Llama(model, type_k=type_k, type_v=type_v, flash_attn=True, verbose=False, kv_profile="none",
            n_ctx=prompt + 2 * generate, n_batch=2048, n_threads=threads, n_threads_batch=threads,
            **({} if type_k == type_v == "f16" else {"kv_recent": 0, "kv_first": 0}))
tokens = [1 + i * 7919 % (llm.n_vocab() - 1) for i in range(prompt + generate)]

def rate(parts):
    started = time.perf_counter()
    for part in parts:
        llm.eval(part)
        llama_cpp.llama_synchronize(llm.ctx)
    return sum(map(len, parts)) / (time.perf_counter() - started)

rate([tokens[:prompt]])  # a trial, as llama-bench begins with one
llm.reset()
prefill = rate([tokens[:prompt]])
decode = rate([[token] for token in tokens[prompt:]])
llm.reset()
llm.eval(tokens[:prompt])
text = llm.generate(tokens[:prompt], temp=0.0)
next(text)  # from the prompt's own logits
started = time.perf_counter()
for _ in range(generate):
    llm.detokenize([next(text)])
print(json.dumps([prefill, decode, generate / (time.perf_counter() - started)]))
"""


def by_bench(build: Build, model: Path, pair: KvPair, options: argparse.Namespace) -> tuple[float, float]:
    """Prefill, and decode behind it, by llama-bench."""
    figures = []
    for prompt, generate, depth in ((options.prompt, 0, 0), (0, options.generate, options.prompt)):
        args = bench.arguments(
            model, pair, prompt=prompt, generate=generate, depth=depth, repetitions=1, threads=options.threads
        )
        done = proc.run([build.tool("llama-bench"), *args], env=parse_plan(pair.name).environment())
        (record,) = json.loads(done.stdout)
        figures.append(float(record["avg_ts"]))
    return figures[0], figures[1]


def by_wheel(python: Path, model: Path, pair: KvPair, options: argparse.Namespace) -> tuple[float, ...]:
    """Prefill, decode, and decode with sampling and text, in Python."""
    numbers = [str(number) for number in (options.prompt, options.generate, options.threads)]
    command: list[str | Path] = [python, "-c", _SCRIPT, model, pair.k.name, pair.v.name, *numbers]
    return tuple(json.loads(proc.run(command).stdout))


def rows_of(pair: KvPair, pairs: list[tuple[tuple[float, float], tuple[float, ...]]]) -> list[list[str]]:
    """A row for each of prefill, decode and generation: medians, the ratio in pairs and its error."""
    rows = []
    for what, theirs, ours in (("prefill", 0, 0), ("decode", 1, 1), ("generation", 1, 2)):
        both = [(bench_figures[theirs], wheel[ours]) for bench_figures, wheel in pairs]
        median, error, _ = judge([mine / other for other, mine in both])
        speeds = [f"{statistics.median(side):,.1f}" for side in zip(*both, strict=True)]
        rows.append([pair.name, what, *speeds, f"{median:.3f} ± {error:.3f}"])
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("python", type=Path, help="the Python of an environment with the wheel")
    parser.add_argument("--kv", default="f16,iso3", help="cache types, K/V apart: iso3/iso4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    build = require_build()
    rows: list[list[str]] = []
    for pair in map(parse_kv, options.kv.split(",")):
        pairs = []
        for _ in range(options.rounds):
            theirs = by_bench(build, options.model, pair, options)
            pairs.append((theirs, by_wheel(options.python, options.model, pair, options)))
        rows += rows_of(pair, pairs)
    heads = ("cache", "", "llama-bench, t/s", "llama-cpp-python, t/s", "ratio")
    where = f"{machine.processor().name}, {options.threads} threads, {options.rounds} rounds"
    print(f"{options.model.name}, {where}")
    print(table.render(heads, rows, "llrrr"))


if __name__ == "__main__":
    main()

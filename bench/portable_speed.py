"""Tokens per second of the programs of a wheel or an archive beside those of a build of one's own, in pairs.

    ggufrq build && ggufrq bundle
    tar -xf dist/ggufrq-bin-*.tar.xz -C /tmp
    python bench/portable_speed.py MODEL /tmp/ggufrq-bin-* --kv f16,q8_0,iso3 --rounds 6

Each round runs llama-bench of both, one after the other and every second round the other way round, with the
same threads and cache, without profile and tokens in f16; one run of each goes before, uncounted. For a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ggufrq.base import machine, proc, table
from ggufrq.base.errors import BuildError
from ggufrq.build import builds
from ggufrq.cache.kv import KvPair, parse_kv, parse_plan
from ggufrq.measure.validate.speed import judge
from ggufrq.tools import bench


def speeds(folder: Path, model: Path, pair: KvPair, options: argparse.Namespace) -> tuple[float, float]:
    """Prefill and decode of the programs in a folder."""
    args = bench.arguments(
        model, pair, prompt=options.prompt, generate=options.generate, repetitions=1, threads=options.threads
    )
    done = proc.run([folder / "llama-bench", *args], env=parse_plan(pair.name).environment())
    speed = bench.parse(done.stdout, done.stderr)
    return speed.prefill, speed.decode


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, help="an unpacked archive")
    parser.add_argument("--kv", default="f16,q8_0,iso3", help="cache types, K/V apart: iso3/iso4")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    own = builds.find_build()
    if own is None:
        raise BuildError("there is no build of one's own", remedy="ggufrq build")
    folders = (own.bin, options.folder / "bin")
    rows: list[list[str]] = []
    for pair in map(parse_kv, options.kv.split(",")):
        both = []
        for number in range(-1, options.rounds):
            sides = (0, 1) if number % 2 == 0 else (1, 0)
            found = {side: speeds(folders[side], options.model, pair, options) for side in sides}
            if number >= 0:
                both.append((found[0], found[1]))
        for at, what in enumerate(("prefill", "decode")):
            median, error, verdict = judge([theirs[at] / mine[at] for mine, theirs in both])
            medians = [f"{statistics.median(run[side][at] for run in both):,.1f}" for side in (0, 1)]
            rows.append([pair.name, what, *medians, f"{median:.3f} ± {error:.3f}", verdict or ""])
    where = f"{machine.processor().name}, {options.threads} threads, {options.rounds} rounds"
    print(f"{options.model.name}, {where}, patch set {own.manifest['patch_set'][:8]}")
    print(table.render(("cache", "", "own build, t/s", "bundle, t/s", "ratio", ""), rows, "llrrrl"))


if __name__ == "__main__":
    main()

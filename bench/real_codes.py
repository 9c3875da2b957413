"""Codes that ggufrq does not have beside its own, on three real models: tables of docs/real-models.md.

    python bench/real_models.py fetch DIR                # the models, 1.5 GB
    python bench/real_codes.py DIR kvarn [NAME ...]      # KVarN beside iso3 and iso4 with a profile
    python bench/real_codes.py DIR ladder [NAME ...]     # five and six bits, upstream's types beside them
    python bench/real_codes.py DIR klt [NAME ...]        # channels by variance with widths of their own

A simulation in torch with weights as in the GGUF, in 32 bits: K and V of every layer are coded and decoded
on their way into attention. Takes torch, transformers and accelerate, beside what ggufrq needs, and 8 GB for
the largest model. What was computed is kept in DIR, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import numpy.typing as npt
from kvlab import metric, tiles
from kvlab.markdown import table
from kvlab.models import Change, mean_and_error
from kvlab.sweep import Sweep
from real_models import MODELS

from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.memory_shape import memory_shape
from ggufrq.profile.sums import LayerSums

F32 = npt.NDArray[np.float32]
POSITIONS = 4096  # that profiles are averaged over
TEXT_CHUNKS = 2  # of the calibration text, for profiles from a text


@dataclass(frozen=True)
class Side:
    """What K or V is kept in: a name, and whether K has a profile, and from what."""

    code: str
    source: metric.Source | None = None

    def bits(self, dim: int, side: str) -> float:
        """Per value, with scales."""
        if self.code == "f16":
            return 16
        if self.code in metric.UPSTREAM:
            return metric.UPSTREAM[self.code][0]
        if self.code.startswith("kvarn"):
            return tiles.bits_per_value(int(self.code[5:]), dim, "k" if side == "k" else "v")
        if self.code.startswith("klt"):
            return klt(self.code, dim).bits_per_value(dim)
        return int(self.code[3:]) + 16 / min(metric.BLOCK, dim)


def klt(name: str, dim: int) -> metric.Klt:
    """``klt``: four groups, values of a block share a scale; ``klt64``: groups of 64 with a scale each."""
    return metric.Klt(3, 64, True) if name == "klt64" else metric.Klt(3, dim // 4, False)


@dataclass(frozen=True)
class Row:
    """A cache: what K and V are kept in, and how many of the newest and first tokens are exact."""

    k: Side
    v: Side
    recent: int = 0
    first: int = 0

    @property
    def name(self) -> str:
        """Unique, and as it stands in the table."""
        words = [f"{self.k.code}/{self.v.code}"]
        words += [f"profile from the {self.k.source}"] if self.k.source else []
        words += [f"newest {self.recent} and first {self.first} exact"] if self.recent or self.first else []
        return ", ".join(words)

    def bits(self, dim: int, n_ctx: int) -> float:
        """Per value, with scales and the tokens that are exact."""
        return (self.k.bits(dim, "k") + self.v.bits(dim, "v")) / 2 + 16 * (self.recent + self.first) / n_ctx


def _kvarn() -> list[Row]:
    rows = []
    for recent, first in ((0, 0), (32, 1), (128, 128)):
        for bits in (3, 4):
            rows.append(Row(Side(f"kvarn{bits}"), Side(f"kvarn{bits}"), recent, first))
            rows += [
                Row(Side(f"iso{bits}", source), Side(f"iso{bits}"), recent, first)
                for source in ("weights", "text")
            ]
    return rows


def _ladder() -> list[Row]:
    alone = [Row(Side(f"iso{bits}", "weights"), Side("f16")) for bits in (3, 4, 5, 6)]
    pairs = ((4, 4), (5, 3), (5, 4), (6, 4), (5, 5), (6, 5))
    both = [Row(Side(f"iso{k}", "weights"), Side(f"iso{v}")) for k, v in pairs]
    upstream = [Row(Side("q8_0"), Side(v)) for v in ("f16", "iso4", "q8_0")]
    exact = [Row(Side(f"iso{k}", "weights"), Side(f"iso{v}"), 32, 1) for k, v in ((4, 4), (5, 4), (5, 5))]
    more = [Row(Side("iso6", "weights"), Side("iso6")), *(Row(Side(q), Side(q)) for q in ("q5_0", "q5_1"))]
    more += [Row(Side("iso6", "weights"), Side(f"iso{v}"), 32, 1) for v in (5, 6)]
    return alone + upstream[:1] + both + upstream[1:] + exact + more


def _klt() -> list[Row]:
    rows = []
    for v, recent, first in (("f16", 0, 0), ("iso3", 0, 0), ("iso3", 32, 1)):
        for code in ("iso3", "klt", "klt64"):
            rows += [Row(Side(code, source), Side(v), recent, first) for source in ("weights", "text")]
    return rows


PARTS: dict[str, Callable[[], list[Row]]] = {"kvarn": _kvarn, "ladder": _ladder, "klt": _klt}


class Bench:
    """A model of ``folder`` and the divergences on it."""

    def __init__(self, name: str, folder: Path, n_ctx: int, chunks: int) -> None:
        self.gguf = folder / f"{name}.gguf"
        if not self.gguf.exists():
            sys.exit(f"{self.gguf} is missing; try: python bench/real_models.py fetch {folder}")
        self.sweep = Sweep(name, n_ctx, chunks, folder, self.gguf)
        self.kept = folder / f"{name}-{n_ctx}x{TEXT_CHUNKS}-sums.npz"
        self.dim = memory_shape([read_header(self.gguf)]).k_heads[0]
        self._layers: dict[metric.Source, dict[int, metric.Layer]] = {}

    @cached_property
    def sums(self) -> dict[int, LayerSums]:
        """Over the calibration text."""
        parts = ("k", "kk", "qq")
        if not self.kept.exists():
            windows = self.sweep.lab.windows_of("calibration.txt", TEXT_CHUNKS)
            sums = metric.sums_of(self.gguf, map(self.sweep.lab.captured, windows))
            making = self.kept.with_suffix(".part.npz")
            np.savez(
                making, **{f"{il}.{part}": getattr(of, part) for il, of in sums.items() for part in parts}
            )
            making.rename(self.kept)
        kept = np.load(self.kept)
        tokens = TEXT_CHUNKS * self.sweep.settings[0]
        found = {}
        for il in sorted({int(key.split(".")[0]) for key in kept}):
            k, kk, qq = (kept[f"{il}.{part}"] for part in parts)
            found[il] = LayerSums(tokens, k, kk, qq, "rope")
        return found

    def layers(self, source: metric.Source) -> dict[int, metric.Layer]:
        """Profiles by layer."""
        if source not in self._layers:
            self._layers[source] = metric.layers(
                self.gguf, POSITIONS, self.sums if source == "text" else None
            )
        return self._layers[source]

    def change(self, row: Row) -> Change:
        """What the cache of ``row`` does."""
        layers = self.layers(row.k.source) if row.k.source else {}

        def changed(il: int, side: str, x: F32) -> F32:
            kept = row.k if side == "k" else row.v
            if kept.code == "f16":
                return x
            if kept.code in metric.UPSTREAM:
                return metric.upstream(x, kept.code)
            if kept.code.startswith("kvarn"):
                return tiles.kvarn(x, int(kept.code[5:]), "k" if side == "k" else "v")
            code: metric.Code
            code = (
                klt(kept.code, x.shape[-1]) if kept.code.startswith("klt") else metric.Iso(int(kept.code[3:]))
            )
            return layers[il].apply(x, code) if side == "k" else metric.iso(x, int(kept.code[3:]))

        return changed

    def divergence(self, row: Row) -> F32:
        """Of every scored token."""
        if row.name not in self.sweep.kept:
            self.sweep.lab.recent, self.sweep.lab.first = row.recent, row.first
        return self.sweep.tokens(row.name, lambda: self.change(row))


def main() -> None:
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--rows", help="numbers from 1, with commas; default: all")
    args = parser.parse_args()
    for name in args.names or list(MODELS):
        bench = Bench(name, args.folder, args.n_ctx, args.chunks)
        lines = []
        rows = PARTS[args.part]()
        for row in [rows[int(number) - 1] for number in args.rows.split(",")] if args.rows else rows:
            if row.k.code == "klt64" and bench.dim < 128:
                continue  # one group
            found = bench.divergence(row)
            mean, error = mean_and_error(found)
            figures = [f"{row.bits(bench.dim, args.n_ctx):.4g}", f"{mean:.4f} ± {error:.4f}"]
            lines.append([row.name, *figures, f"{np.quantile(found, 0.999):.3g}"])
            print(f"{name}: {': '.join(lines[-1])}", file=sys.stderr, flush=True)
        print(f"\n### {name}, {args.chunks} × {args.n_ctx:,} tokens\n")
        print(table(["K/V", "bits per value", "mean KLD", "99.9 % KLD"], lines), flush=True)


if __name__ == "__main__":
    main()

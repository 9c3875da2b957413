"""Codes past the scalar one, and choices beyond a code: the second half of the tables of docs/quality.md.

    python bench/kv_codes.py mse            # D4, E8, trellis: squared error on Gaussian and captured heads
    python bench/kv_codes.py divergence     # the same through the embedded models, in torch
    python bench/kv_codes.py beyond         # learned transforms, attention sinks, newest tokens
    python bench/kv_codes.py --quick all

Takes torch and transformers, beside what ggufrq needs. Markdown goes to standard output. ``--work`` keeps
what was computed, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import numpy.typing as npt
from kvlab.attention import relative
from kvlab.lattice import Name, lattice
from kvlab.markdown import figure, table, with_error
from kvlab.rotations import rotation
from kvlab.scalar import scalar
from kvlab.schemes import register, scheme
from kvlab.sets import MODELS, captured
from kvlab.trellis import trellis

F32 = npt.NDArray[np.float32]
Code = Callable[[F32, bool], F32]


def _scalar(x: F32, inner: bool) -> F32:
    return scalar(x, 3, "inner" if inner else "lsq")


def _lattice(name: Name) -> Code:
    return lambda x, inner: lattice(x, name, inner)


def _trellis(width: int) -> Code:
    return lambda x, inner: trellis(x, width, inner)


CODES: dict[str, Code] = {
    "scalar": _scalar,
    "d4": _lattice("d4"),
    "e8": _lattice("e8"),
    "trellis 8": _trellis(6),
    "trellis 32": _trellis(8),
    "trellis 64": _trellis(9),
    "trellis 256": _trellis(11),
}


def halves(code: Code) -> Code:
    """A code with a scale for each 64 values: 3.25 bits."""
    return lambda x, inner: code(x.reshape(-1, 64), inner).reshape(x.shape)


VARIANTS = {3.125: lambda code: code, 3.25: halves}


def key(name: str, bits: float) -> str:
    """Name of a code in a scheme."""
    return f"{name.replace(' ', '')}@{bits}"


def mse(quick: bool) -> None:
    """Relative squared error."""
    rows_of: dict[str, F32] = {"Gaussian": _gaussian(100 if quick else 2000)}
    for model in MODELS:
        heads = captured(model, 256)
        r = rotation("iso", "full", heads[0].k.shape[1])
        for side in "kv":
            x = np.concatenate([getattr(head, side)[:: 4 if quick else 1] for head in heads]) @ r
            rows_of[f"{side.upper()} of {model}"] = np.ascontiguousarray(x.reshape(-1, 128), np.float32)
    rows = []
    for name, code in CODES.items():
        for bits, variant in VARIANTS.items():
            errors = [figure(relative(x, variant(code)(x, False))) for x in rows_of.values()]
            rows.append([name, str(bits), *errors])
    rows.append(["bound for a Gaussian, 2^-6", "3", *[".0156"] * len(rows_of)])
    print("\n### Relative squared error, rotated by iso full\n")
    print(table(["code", "bits", *rows_of], rows), flush=True)


def _gaussian(blocks: int) -> F32:
    return np.random.default_rng(20261121).standard_normal((blocks, 128)).astype(np.float32)


def divergence(n_ctx: int, chunks: int, work: Path) -> None:
    """Mean KLD, K and V both."""
    from kvlab.sweep import Sweep

    names = ["iso:full:3:inner"]
    for name, code in CODES.items():
        for bits, variant in VARIANTS.items():
            register(key(name, bits), bits, _unshrunk(variant(code)))
            if name in ("d4", "e8", "trellis 8", "trellis 32") or (bits == 3.25 and name == "scalar"):
                names.append(f"iso:full:{key(name, bits)}")
    names.append("iso:full:4:inner")
    for model in MODELS:
        sweep = Sweep(model, n_ctx, chunks, work)
        rows = []
        for row in sweep.rows(names, names[0]):
            made = scheme(row["name"])
            figures = (with_error(row["kld"], row["error"]), with_error(row["diff"], row["diff_error"]))
            rows.append([made.code.split("@")[0], f"{made.bits:g}", *figures])
        print(f"\n### {model}\n")
        print(table(["code", "bits", "mean KLD", "difference from the scalar code"], rows), flush=True)


def _unshrunk(code: Code) -> Callable[[F32], F32]:
    return lambda x: code(x, True)


def beyond(n_ctx: int, chunks: int, work: Path) -> None:
    """Learned transforms, first and newest tokens in f16."""
    from kvlab.beyond import learned, sinks
    from kvlab.models import Change, Lab
    from kvlab.sweep import Sweep, changed

    plain = "iso:full:3:inner"
    made = scheme(plain)
    for model in MODELS:
        sweep = Sweep(model, n_ctx, chunks, work)
        names = [plain]
        for count in (1, 4, 32):
            names.append(f"the first {count} tokens in f16")
            sweep.tokens(names[-1], partial(sinks, made, made, count))
        for count in (32, 128):
            names.append(f"the newest {count} tokens in f16")
            sweep.lab.recent = count
            sweep.tokens(names[-1], lambda: changed(plain))
        sweep.lab.recent = 0
        calibration = Lab(model, n_ctx, 1, "calibration.txt")
        for sides in ("k", "v"):
            change, gains = learned(sweep.lab, calibration, made, sides)
            name = f"learned transform of {sides.upper()} (gain foretold {gains[sides]:.2f})"
            names.append(name)

            def given(change: Change = change) -> Change:
                return change

            sweep.tokens(name, given)
        rows = [
            [r["name"], with_error(r["kld"], r["error"]), with_error(r["diff"], r["diff_error"])]
            for r in sweep.rows(names, plain)
        ]
        print(f"\n### {model}, around iso full 3 bit inner\n")
        print(table(["", "mean KLD", "difference"], rows), flush=True)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="all", choices=("mse", "divergence", "beyond", "all"))
    parser.add_argument("--quick", action="store_true", help="few tokens: a check that it runs")
    parser.add_argument(
        "--work", type=Path, default=Path("kvlab-results"), help="what was computed is kept here"
    )
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=2)
    args = parser.parse_args()
    n_ctx, chunks = (512, 1) if args.quick else (args.n_ctx, args.chunks)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part in ("mse", "all"):
        mse(args.quick)
    if args.part in ("divergence", "all"):
        divergence(n_ctx, chunks, args.work)
    if args.part in ("beyond", "all"):
        beyond(n_ctx, chunks, args.work)


if __name__ == "__main__":
    main()

"""Which rotation, and which scale of a block, a KV cache should have: the tables of docs/quality.md.

    python bench/kv_modes.py heads          # squared error and attention error, synthetic and captured K, V
    python bench/kv_modes.py divergence     # through the embedded models, in torch, paired token by token
    python bench/kv_modes.py real           # through llama-perplexity of the build
    python bench/kv_modes.py --quick all

Takes torch and transformers, beside what ggufrq needs. Markdown goes to standard output. ``--work`` keeps
what was computed, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from kvlab.markdown import figure, table, with_error
from kvlab.schemes import scheme
from kvlab.sets import MODELS, all_sets, mean_errors

from ggufrq.base import paths
from ggufrq.build.builds import require_build
from ggufrq.cache.cases import Case, parse_case
from ggufrq.make.ready import model_file
from ggufrq.measure import cost
from ggufrq.measure.base_run import Scored
from ggufrq.measure.divergence import divergences

ROTATIONS = (
    "iso:none",
    "planar:block",
    "iso:block",
    "rotor:block",
    "iso:hadamard",
    "planar:full",
    "iso:full",
    "rotor:full",
)
SCALES = ("norm", "lsq", "inner")
BITS = (3, 4, 2)


def short(name: str) -> str:
    """A scheme as tables name it; without rotation, and with Hadamard's alone, families are the same."""
    family, mode, code, *marks = name.split(":")
    rotation = mode if mode in ("none", "hadamard") else f"{family} {mode}"
    return " ".join([rotation, f"{code} bit", *marks])


def heads(quick: bool) -> None:
    """Matrix on synthetic and captured heads: one table per number of bits."""
    sets = dict(all_sets(quick))
    for bits in BITS:
        print(f"\n### {bits} bits: rel. MSE of K / KL of attention from K / rel. MSE of output from V\n")
        names = [f"{r}:{bits}:{s}" for r in ROTATIONS for s in SCALES]
        names += [f"iso:full:{bits}:inner:centre", f"iso:full:{bits}:inner:channels"]
        rows = []
        for name in names:
            cells = []
            for of in sets.values():
                e = mean_errors(of, scheme(name))
                cells.append(" / ".join(map(figure, (e.k_mse, e.k_kl, e.v_out))))
            rows.append([short(name), *cells])
        print(table(["", *sets], rows), flush=True)
    wide = {name: of for name, of in sets.items() if of[0].k.shape[1] % 256 == 0}
    print("\n### 128 or 256 values rotated at a time, heads of 256\n")
    rows = []
    for bits in BITS:
        for rotation in ROTATIONS[4:]:
            for size in ("", ":n256"):
                name = f"{rotation}:{bits}:inner{size}"
                found = [mean_errors(of, scheme(name)) for of in wide.values()]
                cells = [" / ".join(map(figure, (e.k_mse, e.k_kl, e.v_out))) for e in found]
                rows.append([short(name), *cells])
    print(table(["", *wide], rows), flush=True)


def _pairs(model: str) -> list[tuple[str, list[str]]]:
    """Titles and pairs of schemes whose divergence is wanted, the one compared with first."""
    wide = ":n256" if "3.5" in model else ""
    best = f"iso:full:3:inner{wide}"
    sides = [f"{r}:3:inner" for r in ROTATIONS]
    parts = [
        (f"{bits} bits, K and V", [f"{r}:{bits}:{s}" for r in ROTATIONS for s in SCALES]) for bits in BITS
    ]
    parts.append(("3 bits, K alone, and V alone", [x for s in sides for x in (f"{s}/f16", f"f16/{s}")]))
    plain = "iso:full:3:inner"
    other = [plain, "iso:full:3:search", "iso:full:3:best"]
    other += [f"{plain}:{m}{side}" for m in ("centre", "channels") for side in ("", f"/{plain}")]
    other += [f"{plain}/{plain}:channels"]
    other += [f"iso:full:{k}:inner/iso:full:{v}:inner" for k, v in ((4, 3), (3, 4), (2, 3), (3, 2), (4, 2))]
    parts.append(("other choices", other))
    if wide:
        names = [f"{r}:{b}:inner{n}" for b in BITS for r in ROTATIONS[4:] for n in ("", wide)]
        parts.append(("128 or 256 values at a time", [*names, f"{best}/{plain}", f"{plain}/{best}"]))
    return parts


def divergence(quick: bool, work: Path) -> None:
    """The same through the models, with differences from the first column's choice."""
    from kvlab.sweep import Sweep, pair_of

    for model in MODELS:
        sweep = Sweep(model, 512 if quick else 2048, 1 if quick else 2, work)
        for title, names in _pairs(model):
            bits = title[0] if title[1:6] == " bits" else "3"
            rows = []
            for row in sweep.rows(names, f"iso:full:{bits}:inner"):
                label = " / ".join(n if n == "f16" else short(n) for n in dict.fromkeys(pair_of(row["name"])))
                rows.append(
                    [label, with_error(row["kld"], row["error"]), with_error(row["diff"], row["diff_error"])]
                )
            print(f"\n### {model}, {title}\n")
            print(table(["", "mean KLD", f"difference from iso full {bits} bit inner"], rows), flush=True)


def _cases() -> list[Case]:
    words = (
        "iso3 iso3:block:norm iso3:hadamard iso4 q4_0 planar3 rotor3 planar3:block:norm rotor3:block:norm "
    )
    words += (
        "iso3:lsq iso3:full:norm iso3:block iso4:hadamard planar4 rotor4 iso4:block:norm iso2 iso2:hadamard "
    )
    words += "iso3/f16 f16/iso3 iso4/iso3 iso3/iso4 planar2 rotor2 iso2:block:norm iso3:none q8_0"
    return [parse_case(word) for word in words.split()]


def real(quick: bool) -> None:
    """The chosen cases through the build's llama-perplexity."""
    build = require_build()
    text = paths.data_dir("texts") / "heldout.txt"
    found: dict[str, list[dict[str, Any]]] = {}
    for model in MODELS:
        path = model_file(model)
        subject = cost.subject(model, path, path.name)
        scored = Scored(512 if quick else 2048, 1 if quick else 4, threads=1)
        found[model] = divergences(subject, _cases(), build, text, scored)
    rows = [
        [
            a["case"],
            f"{a['type_k']}/{a['type_v']}",
            *(with_error(r["kld_mean"], r["kld_mean_err"]) for r in (a, b)),
        ]
        for a, b in zip(*found.values(), strict=True)
    ]
    print("\n### llama-perplexity, mean KLD\n")
    print(table(["case", "types", *MODELS], rows), flush=True)
    print(f"\n    {found[MODELS[0]][0]['command']}")


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="all", choices=("heads", "divergence", "real", "all"))
    parser.add_argument("--quick", action="store_true", help="few tokens: a check that it runs")
    parser.add_argument(
        "--work", type=Path, default=Path("kvlab-results"), help="what was computed is kept here"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part in ("heads", "all"):
        heads(args.quick)
    if args.part in ("divergence", "all"):
        divergence(args.quick, args.work)
    if args.part in ("real", "all"):
        real(args.quick)


if __name__ == "__main__":
    main()

"""A table of a model's files: size, bits per weight, perplexity, and divergence from the 16-bit model.

Makes what is not there yet: ``family_quality.py docs-qwen3-8m --variants plain,imatrix,awq --json t.json``.
Files are made without an importance matrix, with one, and with one from a model folded by AWQ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ggufrq.base import paths, table
from ggufrq.base.progress import Listener
from ggufrq.base.sizes import size_text
from ggufrq.build.builds import require_build
from ggufrq.make.family import families, make_family, parse_wants
from ggufrq.make.plan import Family, Request, Want, needs_imatrix
from ggufrq.make.recipe import load, shipped
from ggufrq.measure.kept import Row
from ggufrq.measure.weight_quality import WeightSettings, measure_weights
from ggufrq.models.resolve import resolve

VARIANTS = ("plain", "imatrix", "awq")


class Told(Listener):
    """Says what is there as it comes."""

    def result(self, row: Row, kept: bool) -> None:
        """One file."""
        print(row["file"], "kept" if kept else "measured", flush=True)


def types_of(name: str) -> dict[str, str] | str:
    """What a type of llama-quantize or a recipe makes of tensors."""
    if name not in shipped():
        return name
    recipe = load(name)
    return {**recipe.classes, **recipe.where_present}


def make(variant: str, model: str, types: list[str], out: Path, imatrix: Path | None) -> Family:
    """The family of a variant, in a folder of its own; the matrix is made when none is given."""
    build = require_build()
    folder = out / variant
    if variant == "plain":
        free = [name for name in types if not needs_imatrix(types_of(name))]
        return make_family(Request(model, parse_wants(free, build), folder, run=False), build)
    request = Request(
        model,
        parse_wants(types, build),
        folder,
        imatrix=() if imatrix is None else (imatrix,),
        calibrate=(paths.data_dir("texts") / "calibration.txt",) if imatrix is None else (),
        fold="awq" if variant == "awq" else None,
        run=False,
    )
    return make_family(request, build)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--types", help="with commas; default: the default family and every recipe")
    parser.add_argument("--text", type=Path, help="text to measure on; default: the held-out text")
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--variants", default="plain", help=f"with commas, of {', '.join(VARIANTS)}")
    parser.add_argument("--imatrix", type=Path, help="for the variants that take one; default: one is made")
    parser.add_argument("-o", "--out", type=Path, help="default: NAME-quality here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    build = require_build()
    types = args.types.split(",") if args.types else [*families()["default"].types, *shipped()]
    out = args.out or Path(f"{resolve(args.model).name}-quality")
    (reference,) = make_family(Request(args.model, (Want("BF16"),), out), build).files
    rows = []
    for variant in args.variants.split(","):
        files = [made.path for made in make(variant, str(reference.path), types, out, args.imatrix).files]
        found = measure_weights(
            reference.path,
            files,
            build,
            text=args.text,
            settings=WeightSettings(args.n_ctx, args.chunks),
            threads=args.threads,
            listener=Told(),
        )
        rows += [{"variant": variant, **row} for row in found]
    head = ("file", "variant", "size", "bits", "PPL", "mean KLD", "99.9 % KLD", "top, %")
    body = [
        (
            row["file"],
            row["variant"],
            size_text(row["bytes"]),
            f"{row['bits']:.2f}",
            f"{row['ppl']:.2f}",
            f"{row['kld_mean']:.5f} ± {row['kld_mean_err']:.5f}",
            f"{row['kld_p999']:.4f}",
            f"{100 * row['same_top']:.1f}",
        )
        for row in rows
    ]
    print(table.render(head, body, "llrrrrrr"))
    base = rows[0]["ppl_base"]
    print(f"PPL of {reference.path.name}: {base:.2f}; {args.chunks} chunks of {args.n_ctx} tokens")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A table of a model's files: size, bits per weight, perplexity, and divergence from the 16-bit model.

Makes what is not there yet: ``family_quality.py docs-qwen3-8m --chunks 16 --json table.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ggufrq import table
from ggufrq.build import require_build
from ggufrq.quantize import families, make_family
from ggufrq.recipe import shipped
from ggufrq.units import size_text
from ggufrq.weight_quality import Settings, measure_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--types", help="with commas; default: the default family and every recipe")
    parser.add_argument("--text", type=Path, help="text to measure on; default: the held-out text")
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    build = require_build()
    types = args.types.split(",") if args.types else [*families()["default"].types, *shipped()]
    made = make_family(args.model, [*types, "BF16"], build, out=args.out)
    settings = Settings(args.n_ctx, args.chunks)
    *files, reference = [file.path for file in made.files]
    rows = measure_weights(reference, files, build, text=args.text, settings=settings, threads=args.threads)
    head = ("file", "size", "bits", "PPL", "mean KLD", "99.9 % KLD", "top, %")
    body = [
        (
            row["file"],
            size_text(row["bytes"]),
            f"{row['bits']:.2f}",
            f"{row['ppl']:.2f}",
            f"{row['kld_mean']:.5f}",
            f"{row['kld_p999']:.4f}",
            f"{100 * row['same_top']:.1f}",
        )
        for row in rows
    ]
    print(table.render(head, body, "lrrrrrr"))
    base = rows[0]["ppl_base"]
    print(f"PPL of {reference.name}: {base:.2f}; {args.chunks} chunks of {args.n_ctx} tokens")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

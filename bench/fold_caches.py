"""What folding for caches gains: divergence of quantized caches from an f16 cache, of a model as it is and
folded, with and without the rotation that llama.cpp puts before a quantized cache.

``fold_caches.py model-BF16.gguf``: a model in 16 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from ggufrq.base import paths, table
from ggufrq.build.builds import require_build
from ggufrq.cache.kv import parse_plan
from ggufrq.make.fold import fold_file
from ggufrq.measure.base_run import run_tool
from ggufrq.tools import perplexity

ROTATED = {"on": None, "off": "1"}  # of LLAMA_ATTN_ROT_DISABLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kv", default="f16,q8_0,q4_0", help="caches, with commas")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args()

    build = require_build()
    with TemporaryDirectory(prefix="ggufrq-") as name:
        folder = Path(name)
        folded = fold_file.fold("kv", args.model, folder / "folded", {}, build)
        for found in folded.folding.found:
            print(f"{found.name}: error / {found.gain:.3f} ({found.setting})")

        def arguments(model: Path, kv: str, *, divergence: bool) -> list[str]:
            return perplexity.arguments(
                model,
                paths.data_dir("texts") / "heldout.txt",
                parse_plan(kv),
                folder / "base.bin",
                n_ctx=args.n_ctx,
                chunks=args.chunks,
                divergence=divergence,
                threads=args.threads,
            )

        first = arguments(args.model, "f16", divergence=False)
        run_tool(build, "llama-perplexity", first, perplexity.parse_perplexity, env={})
        rows = []
        for kv in args.kv.split(","):
            for rotation, disabled in ROTATED.items():
                for which, model in (("as it is", args.model), ("folded", folded.model)):
                    row, _ = run_tool(
                        build,
                        "llama-perplexity",
                        arguments(model, kv, divergence=True),
                        perplexity.parse_divergence,
                        env={"LLAMA_ATTN_ROT_DISABLE": disabled},
                    )
                    kld = f"{row.kld_mean:.6f} ± {row.kld_mean_err:.6f}"
                    top = f"{100 * row.same_top:.1f}"
                    rows.append((kv, rotation, which, f"{row.ppl:.2f}", kld, f"{row.kld_p999:.4f}", top))
    head = ("cache", "rotation", "model", "PPL", "mean KLD", "99.9 % KLD", "top, %")
    print(table.render(head, rows, "lllrrrr"))


if __name__ == "__main__":
    main()

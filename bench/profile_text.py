"""How much text a profile takes: the noise that it leaves in the scores of other texts.

    python bench/profile_text.py MODEL.gguf [...]

Profiles from the weights, and from 128, 256 and 512 tokens of the calibration text with and without the share
of what the weights foretell, averaged over 4,096 positions; met with 1,024 tokens of the held-out text, of
code in six languages and of prose in five, as Markdown: geometric means over layers and heads of the foretold
squared error of scores, 1 without a profile.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ggufrq.base import paths
from ggufrq.build.builds import require_build
from ggufrq.build.project import Build
from ggufrq.drive.moments import sum_moments
from ggufrq.profile import Profile
from ggufrq.profile.sums import Layers, read_sums
from ggufrq.profile.text import averaged, moments_from_text, noise
from ggufrq.profile.weights import layer_from_weights
from ggufrq.profile.whole import Whole

TEXTS = {
    name: paths.data_dir("texts") / file
    for name, file in (("held out", "heldout.txt"), ("code", "mix/code.txt"), ("prose", "mix/prose.txt"))
}
POSITIONS, SCORED = 4096, 1024


def summed(build: Build, model: Path, text: Path, tokens: int) -> Layers:
    """Sums over the first ``tokens`` tokens of a text."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sums.gguf"
        sum_moments(out, model, text, build, lambda *_: None, n_ctx=tokens, chunks=1)
        return read_sums(out).all


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    build = require_build()
    print(f"| | {' | '.join(TEXTS)} |\n|---|{'---|' * len(TEXTS)}")
    for model in parser.parse_args().models:
        whole = Whole.of(model, POSITIONS)
        met = {name: summed(build, model, text, SCORED) for name, text in TEXTS.items()}
        plain = {name: noise(whole, None, sums, 0, SCORED) for name, sums in met.items()}
        made = {"weights": {il: layer_from_weights(whole, il) for il in whole.readers}}
        for tokens in (128, 256, 512):
            sums = summed(build, model, paths.data_dir("texts") / "calibration.txt", tokens)
            for how, moments in (("alone", None), ("and the weights' share", moments_from_text)):
                made[f"{tokens} tokens {how}"] = {
                    il: whole.solved(
                        *(moments(whole, il, part) if moments else averaged(whole, il, part, 0, POSITIONS))
                    )
                    for il, part in sums.items()
                }
        for how, layers in made.items():
            profile = Profile("0" * 16, "text", POSITIONS, layers)
            cells = []
            for name, sums in met.items():
                left = noise(whole, profile, sums, 0, SCORED)
                ratio = np.exp(np.mean([np.log(left[il] / plain[name][il]).mean() for il in left]))
                cells.append(f"{ratio:.3f}")
            print(f"| {model.stem}, {how} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

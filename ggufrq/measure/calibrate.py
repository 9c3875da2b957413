"""Calibration of a KV cache: a profile of K from a text instead of from the weights alone.

llama-rq-moments sums K, K Kᵀ and Q Qᵀ over the text before RoPE turns them, so that a calibration at a short
context holds over all positions. The last quarter of the text is held out first, to tell what is gained on
text that was not seen; then the profile is made from all of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ggufrq.base import paths
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.locks import locked
from ggufrq.base.progress import progress
from ggufrq.base.results import file_sha256
from ggufrq.build.project import Build
from ggufrq.drive.moments import sum_moments
from ggufrq.ggufs.files import shards
from ggufrq.profile import Profile, profile_from_weights
from ggufrq.profile.sums import Sums, read_sums
from ggufrq.profile.text import noise, profile_from_sums
from ggufrq.profile.whole import Whole

#: Tokens of a chunk, and how many chunks are taken unless told otherwise: twice as many gain little
#: (docs/real-models.md).
CHUNK_SIZE, CHUNKS = 1024, 4
#: So many positions are looked at near the start, and as many far out, from ``FAR`` on or at the end.
SPAN, FAR = 2048, 16384


@dataclass(frozen=True)
class Gain:
    """Foretold noise at positions ``first`` … ``last``, where it is 1 without a profile, on text held out: of
    the profile from the weights (None where there is none) and of one from the rest of the text; geometric
    means over layers and heads. ``layers`` has both by layer."""

    first: int
    last: int
    weights: float | None
    text: float
    layers: dict[int, tuple[float | None, float]]


@dataclass(frozen=True)
class Calibration:
    """A profile from ``tokens`` tokens of text, of which ``held`` were held out for ``gains`` (none where the
    text was too short for that)."""

    profile: Profile
    tokens: int
    held: int
    gains: tuple[Gain, ...]


def profile_from_text(
    model: Path,
    text: Path,
    build: Build,
    *,
    positions: int | None = None,
    n_ctx: int = CHUNK_SIZE,
    chunks: int = CHUNKS,
    threads: int | None = None,
) -> Calibration:
    """The profile of the GGUF ``model`` from up to ``chunks`` chunks of ``n_ctx`` tokens of ``text``,
    averaged over so many ``positions`` (its own context, 32,768 at most). Chunks that an earlier, stopped run
    has finished are not computed again.

    Raises UsageError for a text that is not there, ModelError when no profile can be made for the model,
    ToolError when the program fails or the text has less than one chunk.
    """
    if not text.is_file():
        raise UsageError(f"there is no text {text}")
    whole = Whole.of(model, positions)
    whole.require_known()
    sums = _sums(model, text, build, n_ctx=n_ctx, chunks=chunks, threads=threads)
    profile = profile_from_sums(whole, sums.all)
    tokens, held = (next(iter(part.values())).tokens if part else 0 for part in (sums.all, sums.held))
    return Calibration(profile, tokens, held, _gains(whole, sums) if held else ())


def _sums(model: Path, text: Path, build: Build, *, n_ctx: int, chunks: int, threads: int | None) -> Sums:
    """Sums over the text, kept by all that they depend on, of one build at a time."""
    facts = {
        "model": [file_sha256(part) for part in shards(model)],
        "text": file_sha256(text),
        "n_ctx": n_ctx,
        "chunks": chunks,
    }
    folder = paths.own_dir("calibration")
    name = _hash(json.dumps(facts))
    kept = folder / f"{name}-{_hash(build.key)[:8]}.gguf"
    with locked(folder / f"{name}.lock", "another ggufrq calibrates on the same text"):
        try:
            return read_sums(kept)
        except ModelError:
            pass  # not there, not whole yet, or damaged; the program knows what to do
        with progress("Moments of K and Q", chunks, unit="chunks") as bar:
            sum_moments(
                kept,
                model,
                text,
                build,
                lambda done, total: bar.update(done, total=total),
                n_ctx=n_ctx,
                chunks=chunks,
                threads=threads,
            )
        found = read_sums(kept)
        for other in folder.glob(f"{name}-*.gguf"):
            if other != kept:
                other.unlink()
        return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _gains(whole: Whole, sums: Sums) -> tuple[Gain, ...]:
    """What profiles gain on the text held out, near and, where there are as many positions, far out."""
    text = profile_from_sums(whole, sums.fit)
    try:
        weights = profile_from_weights(whole.tensors.path, whole.n_ctx)
    except ModelError:
        weights = None
    span = min(SPAN, whole.n_ctx)
    far = min(FAR, whole.n_ctx - span)
    return tuple(
        _gain(whole, weights, text, sums, first, span) for first in ((0, far) if far >= span else (0,))
    )


def _gain(whole: Whole, weights: Profile | None, text: Profile, sums: Sums, first: int, n: int) -> Gain:
    plain = noise(whole, None, sums.held, first, n)

    def parts(profile: Profile | None) -> dict[int, float]:
        found = {} if profile is None else noise(whole, profile, sums.held, first, n)
        return {il: _mean(heads / plain[il]) for il, heads in found.items()}

    by_weights, by_text = parts(weights), parts(text)
    layers = {il: (by_weights.get(il), mean) for il, mean in by_text.items()}
    from_weights = _mean(list(by_weights.values())) if by_weights else None
    return Gain(first, first + n - 1, from_weights, _mean(list(by_text.values())), layers)


def _mean(ratios: ArrayLike) -> float:
    """Geometric."""
    return float(np.exp(np.log(ratios).mean()))

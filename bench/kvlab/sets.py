"""Heads to compare codes on: synthetic ones by name, and the captured ones of the embedded models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvlab.attention import Errors, errors
from kvlab.kv_stats import SETS, generate
from kvlab.schemes import Scheme, Statistics

F32 = npt.NDArray[np.float32]
MODELS = ("docs-qwen3-8m", "docs-qwen3.5-8m")


@dataclass(frozen=True)
class Head:
    """Q (with the scale of attention), K and V of one head, each [tokens, dim], and the statistics of K and V
    over other tokens of it."""

    q: F32
    k: F32
    v: F32
    of_k: Statistics
    of_v: Statistics

    def under(self, scheme: Scheme) -> Errors:
        """The errors of a scheme for K and V."""
        k = scheme.apply(self.k[None], self.of_k)[0]
        v = scheme.apply(self.v[None], self.of_v)[0]
        return errors(self.q, self.k, self.v, k, v)


def synthetic(name: str, tokens: int = 768, seeds: int = 3) -> list[Head]:
    """Heads of a named set; statistics are taken from as many tokens before those that are measured."""
    heads = []
    for seed in range(seeds):
        s = generate(name, 2 * tokens, seed=seed)
        before, here = slice(0, tokens), slice(tokens, 2 * tokens)
        heads.append(
            Head(
                s.q[here],
                s.k[here],
                s.v[here],
                Statistics.of(s.k[None, before]),
                Statistics.of(s.v[None, before]),
            )
        )
    return heads


def captured(model: str, tokens: int = 768) -> list[Head]:
    """One query head for each KV head of every layer, on the held-out text; statistics are those of the
    calibration text."""
    from kvlab.models import Lab  # takes torch

    here = Lab(model, tokens, 1).captured(0)
    before = Lab(model, 2 * tokens, 1, "calibration.txt").captured(0)
    heads = []
    for layer, c in here.items():
        shared = len(c.q) // len(c.k)
        for i in range(len(c.k)):
            of = [Statistics.of(x[i : i + 1]) for x in (before[layer].k, before[layer].v)]
            heads.append(Head(c.q[i * shared], c.k[i], c.v[i], *of))
    return heads


def all_sets(quick: bool) -> Iterator[tuple[str, list[Head]]]:
    """The sets by name: synthetic, then captured."""
    for name in SETS:
        yield name, synthetic(name, 256 if quick else 768, 1 if quick else 3)
    for model in MODELS:
        yield model, captured(model, 256 if quick else 768)


def mean_errors(heads: list[Head], scheme: Scheme) -> Errors:
    """The errors of a scheme, averaged over heads."""
    found = [head.under(scheme) for head in heads]
    names = ("k_mse", "v_mse", "k_kl", "k_out", "v_out")
    return Errors(**{n: float(np.mean([getattr(e, n) for e in found])) for n in names})

"""Divergences of many pairs of schemes on one model: kept in a JSON file, so that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufrq.base.paths import atomic_write
from kvlab.models import Change, Lab, mean_and_error
from kvlab.schemes import Statistics, scheme

F32 = npt.NDArray[np.float32]


def pair_of(name: str) -> tuple[str, str]:
    """``K/V`` or one scheme for both."""
    k, _, v = name.partition("/")
    return k, v or k


def changed(name: str, statistics: dict[int, dict[str, Statistics]] | None = None) -> Change:
    """What a pair of schemes does to K and V."""
    made = dict(zip("kv", map(scheme, pair_of(name)), strict=True))

    def change(layer: int, side: str, x: F32) -> F32:
        return made[side].apply(x, None if statistics is None else statistics[layer][side])

    return change


def calibration(model: str, n_ctx: int = 2048) -> dict[int, dict[str, Statistics]]:
    """Means and moments of K and V per layer, on the calibration text."""
    captured = Lab(model, n_ctx, 1, "calibration.txt").captured(0)
    return {layer: {"k": Statistics.of(c.k), "v": Statistics.of(c.v)} for layer, c in captured.items()}


class Sweep:
    """Divergence per token of named changes, in nats, each computed once."""

    def __init__(self, model: str, n_ctx: int, chunks: int, folder: Path, gguf: Path | None = None) -> None:
        self.model = model
        self.gguf = gguf
        self.settings = (n_ctx, chunks)
        self.file = folder / f"{model}-{n_ctx}x{chunks}.json"
        self.kept: dict[str, list[float]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self._lab: Lab | None = None
        self._statistics: dict[int, dict[str, Statistics]] | None = None

    @property
    def lab(self) -> Lab:
        """The model, loaded when first needed."""
        if self._lab is None:
            self._lab = Lab(self.model, *self.settings, gguf=self.gguf)
        return self._lab

    @property
    def statistics(self) -> dict[int, dict[str, Statistics]]:
        """Those of the calibration text."""
        if self._statistics is None:
            self._statistics = calibration(self.model)
        return self._statistics

    def tokens(self, name: str, make: Callable[[], Change] | None = None) -> F32:
        """Divergence of every token under a pair of schemes, or under the change that ``make`` makes."""
        if name not in self.kept:
            if make is not None:
                change = make()
            else:
                needs = any(s.centre or s.channels for s in map(scheme, pair_of(name)))
                change = changed(name, self.statistics if needs else None)
            found = self.lab.divergence(change)
            self.kept[name] = [float(f"{d:.4g}") for d in found]
            atomic_write(self.file, json.dumps(self.kept))
        return np.array(self.kept[name], np.float32)

    def rows(self, names: Iterable[str], against: str) -> list[dict[str, Any]]:
        """Mean and standard error of each, and of its difference, token by token, from ``against``."""
        base = self.tokens(against)
        rows = []
        for name in names:
            found = self.tokens(name)
            mean, error = mean_and_error(found)
            difference, of_difference = mean_and_error(found - base)
            rows.append(
                {"name": name, "kld": mean, "error": error, "diff": difference, "diff_error": of_difference}
            )
        return rows

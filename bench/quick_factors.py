"""Fit the factors of ``ggufrq/search/sensitivity/quick.toml``: what was measured, over what the errors of the
weights are.

    ggufrq sensitivity MODEL --json > measured.json             # each class in each type, measured
    ggufrq sensitivity MODEL --json --quick > quick.json        # the same by the errors of the weights
    python bench/quick_factors.py measured.json quick.json

A class' factor is the geometric mean over types. Types of six bits and more are left out: there a part of the
loss is the rounding of the inputs, which the CPU does for all types alike.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ggufrq.ggufs.tensors import type_bits
from ggufrq.search.sensitivity import quick

MOST_BITS = 6.0


def singles(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What a file says, by class and type."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return {(one["unit"], one["type"]): one for one in data["singles"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("quick", type=Path)
    args = parser.parse_args()
    measured, estimated = singles(args.measured), singles(args.quick)
    found: dict[str, list[tuple[str, float]]] = {}
    for (unit, kind), one in measured.items():
        factor = quick.factor(unit, tied="output" not in {name for name, _ in measured})
        found.setdefault(unit, []).append((kind, factor * one["kld"] / estimated[unit, kind]["estimate"]))
    for unit, factors in found.items():
        fitted = [math.log(value) for kind, value in factors if type_bits(kind) < MOST_BITS]
        mean = math.exp(sum(fitted) / len(fitted))
        print(f"{unit} = {mean:.2g}".ljust(28), "# " + ", ".join(f"{k} {v:.3g}" for k, v in factors))


if __name__ == "__main__":
    main()

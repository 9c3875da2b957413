"""How the numbers in tables.json came about: `python -m ggufrq.codec.derive` prints them as JSON.

tables.json is frozen, because the last digit of a solver or of a random generator may change between
versions of numpy; a test derives the numbers again and compares within a tolerance.

Centroids: the minimum-distortion quantizer of a unit Gaussian (S. Lloyd, Least squares quantization in PCM,
1957, published in IEEE Trans. Inf. Theory 28(2), 1982; J. Max, Quantizing for minimum distortion, IRE
Trans. Inf. Theory 6(1), 1960), scaled so that the outermost is 127 and rounded. Rounding costs 0.0004 %,
0.12 %, 0.14 % and 1.2 % of the error at 2, 3, 4 and 5 bits; the neighbouring integer sets that were tried
save at most 0.12 % (0.3 % at 5 bits). Fitting them to blocks of 128 with a least-squares scale each, instead
of to the Gaussian, saves at most 0.3 % (tried at 2 to 4 bits). The siblings, of blocks of 64, have the same
centroids and starts.

Rotations: uniform angles (planar), pairs of uniform pure unit quaternions (iso), uniform unit axes (rotor).
"""

import json
import math
from itertools import count, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

SEED = 20260612
BLOCK = 128
LARGEST = 127
# Outermost centroid of the three starting scales, in 1/129 of the largest magnitude of a block. Chosen by
# trying all triples of a grid on eight distributions, Gaussian weighted four times.
STARTS = {2: (48, 64, 80), 3: (84, 96, 114), 4: (115, 125, 135), 5: (120, 126, 132)}
NARROW = 64  # values of a block of the siblings
BYTES = {2: 34, 3: 50, 4: 66, 5: 82}
FAMILIES = ("planar", "iso", "rotor")
FIRST_ID = 112


def _pdf(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tail(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2))


def lloyd_max(levels: int) -> list[float]:
    """Positive half of the Lloyd-Max codebook with 2*levels entries for a unit Gaussian, ascending."""
    c = [(i + 0.5) * 2.5 / levels for i in range(levels)]
    for _ in range(100_000):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(c)), math.inf]
        new = [(_pdf(a) - _pdf(b)) / (_tail(a) - _tail(b)) for a, b in pairwise(edges)]
        if max(abs(a - b) for a, b in zip(c, new, strict=True)) < 1e-15:
            break
        c = new
    return c


def distortion(centroids: list[float]) -> float:
    """Mean squared error of the symmetric codebook with this positive half on a unit Gaussian."""
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(centroids)), math.inf]
    total = 0.0
    for c, a, b in zip(centroids, edges, edges[1:], strict=False):
        mass = _tail(a) - _tail(b)
        first = _pdf(a) - _pdf(b)
        second = mass + a * _pdf(a) - (b * _pdf(b) if math.isfinite(b) else 0.0)
        total += second - 2 * c * first + c * c * mass
    return 2 * total


def int8_centroids(bits: int) -> list[int]:
    """All 2**bits centroids as integers, ascending, the outermost 127."""
    half = lloyd_max(2 ** (bits - 1))
    pos = [round(c / half[-1] * LARGEST) for c in half]
    return [-c for c in reversed(pos)] + pos


def _unit_vectors(rng: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
    v = rng.standard_normal((n, 3))
    return np.asarray(v / np.linalg.norm(v, axis=1, keepdims=True))


def _left(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """4x4 matrices of x -> p*x for pure quaternions p [n, 3]."""
    x, y, z = p.T
    o = np.zeros_like(x)
    return np.stack([o, -x, -y, -z, x, o, -z, y, y, z, o, -x, z, -y, x, o], -1).reshape(-1, 4, 4)


def _right(q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """4x4 matrices of x -> x*q for pure quaternions q [n, 3]."""
    x, y, z = q.T
    o = np.zeros_like(x)
    return np.stack([o, -x, -y, -z, x, o, z, -y, y, -z, o, x, z, y, -x, o], -1).reshape(-1, 4, 4)


def rotations(seed: int = SEED) -> dict[str, npt.NDArray[np.float32]]:
    """Blocks of the families: planar [64, 2] (cos, sin), iso [32, 4, 4], rotor [42, 3, 3]; symmetric."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0.0, 2 * math.pi, BLOCK // 2)
    planar = np.stack([np.cos(angle), np.sin(angle)], -1)
    p = _unit_vectors(rng, BLOCK // 4)
    q = _unit_vectors(rng, BLOCK // 4)
    iso = _left(p) @ _right(q)
    iso = (iso + iso.transpose(0, 2, 1)) / 2
    n = _unit_vectors(rng, BLOCK // 3)
    rotor = 2 * n[:, :, None] * n[:, None, :] - np.eye(3)
    return {k: v.astype(np.float32) for k, v in (("planar", planar), ("iso", iso), ("rotor", rotor))}


def types_and_siblings() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """With ids in this order: the types of 2 to 4 bits by family, their siblings, then the same for 5."""
    types: list[dict[str, Any]] = []
    siblings: list[dict[str, Any]] = []
    number = count(FIRST_ID)
    for widths in ((2, 3, 4), (5,)):
        types += [
            {"name": f"{family}{b}", "id": next(number), "family": family, "bits": b}
            for family in FAMILIES
            for b in widths
        ]
        siblings += [
            {"name": f"rq{b}_{NARROW}", "id": next(number), "bits": b, "block": NARROW} for b in widths
        ]
    return types, siblings


def derive() -> dict[str, Any]:
    """The content of tables.json; floats are float32 with nine digits, which identify them."""

    def nine_digits(a: npt.NDArray[np.float32]) -> list[list[float]]:
        return [[float(f"{v:.9g}") for v in row] for row in a.reshape(len(a), -1)]

    types, siblings = types_and_siblings()
    return {
        "block": BLOCK,
        "codes": {
            str(b): {
                "bytes": BYTES[b],
                "centroids": int8_centroids(b),
                "outermost": float(f"{lloyd_max(2 ** (b - 1))[-1]:.9g}"),
                "starts": list(STARTS[b]),
            }
            for b in sorted(BYTES)
        },
        "types": types,
        "siblings": siblings,
        "rotations": {"seed": SEED, **{k: nine_digits(v) for k, v in rotations().items()}},
    }


def to_json(tables: dict[str, Any]) -> str:
    """JSON with one short list per line, so that a change shows in a diff."""
    codes = ",\n    ".join(f'"{k}": {json.dumps(v)}' for k, v in tables["codes"].items())
    types, siblings = (",\n    ".join(map(json.dumps, tables[key])) for key in ("types", "siblings"))
    rot = tables["rotations"]
    parts = [f'"seed": {rot["seed"]}']
    for name in FAMILIES:
        rows = ",\n      ".join(json.dumps(row) for row in rot[name])
        parts.append(f'"{name}": [\n      {rows}\n    ]')
    rotation_text = ",\n    ".join(parts)
    return (
        f'{{\n  "block": {tables["block"]},\n  "codes": {{\n    {codes}\n  }},\n'
        f'  "types": [\n    {types}\n  ],\n  "siblings": [\n    {siblings}\n  ],\n'
        f'  "rotations": {{\n    {rotation_text}\n  }}\n}}\n'
    )


if __name__ == "__main__":
    print(to_json(derive()), end="")

"""What is done to K or to V before attention sees it: a rotation and a code, by a name.

A name is ``family:mode:code``, for example ``iso:full:3``; then marks: ``n256`` rotates 256 values at a
time, ``norm``, ``inner`` and ``search`` choose the scale (scalar.py), ``centre`` takes the mean per head and
channel off first, ``channels`` divides by the deviation per head and channel. ``f16`` is no code at all.
Codes are 2, 3, 4 bits of the scalar code, and the names that ``register`` added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from ggufrq.codec.rotate import Family, Mode
from kvlab.rotations import rotation
from kvlab.scalar import Scale, scalar

F32 = npt.NDArray[np.float32]
Code = Callable[[F32], F32]

_CODES: dict[str, tuple[Code, float]] = {}


def register(name: str, bits: float, code: Code) -> None:
    """Make a code [n, 128] -> [n, 128] known under a name; bits per value with its scale."""
    _CODES[name] = (code, bits)


@dataclass(frozen=True)
class Scheme:
    """A rotation and a code. Applied to float32 [..., head_dim]; what comes out is in the original basis."""

    name: str
    family: Family
    mode: Mode
    code: str
    size: int = 128
    scale: Scale = "lsq"
    centre: bool = False
    channels: bool = False

    @property
    def bits(self) -> float:
        """Bits per value, scale included."""
        if self.code == "f16":
            return 16
        return _CODES[self.code][1] if self.code in _CODES else int(self.code) + 0.125

    def encode(self, x: F32) -> F32:
        """Blocks [n, 128] as the code keeps them."""
        if self.code in _CODES:
            return _CODES[self.code][0](x)
        return scalar(x, int(self.code), self.scale)

    def apply(self, x: F32, statistics: Statistics | None = None) -> F32:
        """x [heads, tokens, head_dim] as attention sees it; ``statistics`` of other tokens for ``centre``
        and ``channels``."""
        if self.code == "f16":
            return x.astype(np.float16).astype(np.float32)
        r = rotation(self.family, self.mode, x.shape[-1], self.size)
        y = x.reshape(*x.shape[:-1], -1) @ r
        mean: F32 = np.zeros((1,), np.float32)
        spread: F32 = np.ones((1,), np.float32)
        if self.centre or self.channels:
            if statistics is None:
                raise ValueError(f"{self.name} needs statistics")
            rotated = statistics.rotated(r)
            mean = rotated.mean if self.centre else mean
            spread = rotated.spread if self.channels else spread
        z = ((y - mean) / spread).astype(np.float32)
        out = self.encode(np.ascontiguousarray(z.reshape(-1, 128))).reshape(y.shape) * spread + mean
        return np.asarray(out @ r, np.float32)


@dataclass(frozen=True)
class Statistics:
    """Mean [heads, 1, dim] and second moments about it [heads, dim, dim] of K or V per head."""

    mean: F32
    covariance: F32

    @classmethod
    def of(cls, x: F32) -> Statistics:
        """Those of x [heads, tokens, dim]."""
        mean = x.mean(axis=1, keepdims=True)
        d = x - mean
        return cls(mean, np.asarray(d.transpose(0, 2, 1) @ d / np.float32(x.shape[1]), np.float32))

    @property
    def spread(self) -> F32:
        """Standard deviation per head and channel [heads, 1, dim], at least a thousandth of the largest."""
        variance = np.diagonal(self.covariance, axis1=1, axis2=2)[:, None, :]
        return np.asarray(np.sqrt(np.maximum(variance, 1e-6 * variance.max(axis=-1, keepdims=True))))

    def rotated(self, r: F32) -> Statistics:
        """Those of x @ r for a symmetric r."""
        return Statistics(self.mean @ r, np.asarray(r @ self.covariance @ r, np.float32))


def scheme(name: str) -> Scheme:
    """The scheme of a name. Raises ValueError."""
    if name == "f16":
        return Scheme(name, "iso", "none", "f16")
    family, mode, code, *marks = name.split(":")
    if code not in _CODES and code not in {"2", "3", "4"}:
        raise ValueError(f"no code {code!r}")
    made = Scheme(name, cast(Family, family), cast(Mode, mode), code)
    for mark in marks:
        if mark == "n256":
            made = replace(made, size=256)
        elif mark in ("norm", "inner", "search", "best", "lsq"):
            made = replace(made, scale=cast(Scale, mark))
        elif mark == "centre":
            made = replace(made, centre=True)
        elif mark == "channels":
            made = replace(made, channels=True)
        else:
            raise ValueError(f"no mark {mark!r} in {name!r}")
    return made

"""RoPE averaged over positions in closed form.

RoPE turns pairs of channels of a head: with the pair as a complex number u = x + i y, position p multiplies
it by s · exp(i p θ) (``ggml_rope_ext`` in ggml/src/ggml-cpu/ops.cpp of llama.cpp). Averages over p = 0 … n-1
of the turned pairs and of their products are geometric sums of exp(i p φ), φ being θ, a difference or a sum
of two θ:

    E[u_a conj(u_b)] → s² E[u_a conj(u_b)] · F(θ_a - θ_b),    E[u_a u_b] → s² E[u_a u_b] · F(θ_a + θ_b),
    F(φ) = 1/n Σ exp(i p φ) = exp(i (n-1) φ/2) · sin(n φ/2) / (n sin(φ/2)),

the Dirichlet kernel. Channels beyond the pairs are not turned: θ = 0, s = 1, without an imaginary part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
C128 = npt.NDArray[np.complex128]
#: Which channels are a pair: neighbours (2j, 2j+1), or j and j + half of those that are turned.
Pairing = Literal["norm", "neox"]


@dataclass(frozen=True)
class Rope:
    """What RoPE does to heads of ``dim`` values: ``theta`` [pairs] are the angles by which a position turns,
    in radians, ``scale`` the factor that pairs get besides (YaRN's magnitude)."""

    dim: int
    pairing: Pairing
    theta: F64
    scale: float = 1.0

    @cached_property
    def _units(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], F64, F64]:
        """Channels of real and imaginary parts, angle and factor of all pairs and, after them, of single
        channels, whose imaginary part is channel ``dim``: a zero that is put there."""
        pairs = len(self.theta)
        j = np.arange(pairs)
        first, second = (2 * j, 2 * j + 1) if self.pairing == "norm" else (j, j + pairs)
        rest = np.arange(2 * pairs, self.dim)
        return (
            np.concatenate([first, rest]),
            np.concatenate([second, np.full(len(rest), self.dim)]),
            np.concatenate([np.asarray(self.theta, np.float64), np.zeros(len(rest))]),
            np.concatenate([np.full(pairs, self.scale), np.ones(len(rest))]),
        )

    def matrix(self, position: int) -> F64:
        """RoPE at one position as a matrix [dim, dim]: k → R k."""
        real, imaginary, theta, scale = self._units
        turn = np.zeros((self.dim + 1, self.dim + 1))
        cos, sin = scale * np.cos(position * theta), scale * np.sin(position * theta)
        turn[real, real], turn[real, imaginary] = cos, -sin
        turn[imaginary, real], turn[imaginary, imaginary] = sin, cos
        return turn[: self.dim, : self.dim]

    def mean(self, vectors: F64, n: int) -> F64:
        """Average of R_p v over p = 0 … n-1, for v [..., dim]."""
        real, imaginary, theta, scale = self._units
        v = np.concatenate([vectors, np.zeros((*vectors.shape[:-1], 1))], axis=-1)
        u = (v[..., real] + 1j * v[..., imaginary]) * scale * dirichlet(theta, n)
        v[..., real], v[..., imaginary] = u.real, u.imag
        return v[..., : self.dim]

    def second_moment(self, moments: F64, n: int) -> F64:
        """Average of R_p M R_pᵀ over p = 0 … n-1, for symmetric M [..., dim, dim]."""
        real, imaginary, theta, scale = self._units
        size = self.dim
        m = np.zeros((*moments.shape[:-2], size + 1, size + 1))
        m[..., :size, :size] = moments
        r, i = real[:, None], imaginary[:, None]
        rr, ri, ir, ii = m[..., r, real], m[..., r, imaginary], m[..., i, real], m[..., i, imaginary]
        both = scale[:, None] * scale / 2
        hermitian = ((rr + ii) + 1j * (ir - ri)) * (both * dirichlet(theta[:, None] - theta, n))
        plain = ((rr - ii) + 1j * (ir + ri)) * (both * dirichlet(theta[:, None] + theta, n))
        m[..., r, imaginary] = (plain - hermitian).imag
        m[..., i, real] = (plain + hermitian).imag
        m[..., i, imaginary] = (hermitian - plain).real
        m[..., r, real] = (hermitian + plain).real
        return m[..., :size, :size]


def dirichlet(phi: F64, n: int) -> C128:
    """1/n Σ exp(i p φ) over p = 0 … n-1."""
    half = (np.remainder(phi + np.pi, 2 * np.pi) - np.pi) / 2
    sine = np.sin(half)
    whole = sine == 0
    ratio = np.where(whole, 1.0, np.sin(n * half) / np.where(whole, 1.0, n * sine))
    kernel: C128 = ratio * np.exp(1j * (n - 1) * half)
    return kernel

"""K in the metric of its queries, in torch's models: profiles as ggufrq makes them, and codes behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ggufrq.codec.derive import distortion, lloyd_max
from ggufrq.codec.rotate import rotation_matrix
from ggufrq.profile.file import LayerProfile
from ggufrq.profile.rope import Rope
from ggufrq.profile.sums import LayerSums
from ggufrq.profile.text import averaged
from ggufrq.profile.weights import moments_from_weights
from ggufrq.profile.whole import Whole
from kvlab.scalar import scalar

if TYPE_CHECKING:
    from kvlab.models import Captured  # takes torch

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Source = Literal["weights", "text"]
BLOCK = 128  # values with one scale; 64 where heads are of 64


def iso(x: F32, bits: int) -> F32:
    """isoN of x [..., dim]: the rotation of a head, then the scalar code."""
    dim = x.shape[-1]
    r = rotation_matrix("iso", "full", dim)
    return np.asarray(scalar((x @ r).reshape(-1, min(BLOCK, dim)), bits, "inner").reshape(x.shape) @ r)


def _half(x: F32) -> F32:
    return np.asarray(x.astype(np.float16), np.float32)


def _over(x: F32, step: F32) -> F32:
    return np.asarray(x / np.where(step == 0, np.float32(1), step))


def _q8_0(x: F32) -> F32:
    step = _half(np.abs(x).max(axis=1, keepdims=True) / 127)
    return np.asarray(np.rint(_over(x, step)) * step)


def _q5_0(x: F32) -> F32:
    far = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], 1)
    step = _half(np.asarray(far / -16, np.float32))
    return np.asarray((np.minimum(np.floor(_over(x, step) + 16.5), 31) - 16) * step)


def _q5_1(x: F32) -> F32:
    least = x.min(axis=1, keepdims=True)
    step, offset = _half((x.max(axis=1, keepdims=True) - least) / 31), _half(least)
    return np.asarray(np.minimum(np.floor(_over(x - least, step) + 0.5), 31) * step + offset)


#: Upstream's types: bits per value, and what they make of blocks [n, 32].
UPSTREAM: dict[str, tuple[float, Callable[[F32], F32]]] = {
    "q8_0": (8.5, _q8_0),
    "q5_0": (5.5, _q5_0),
    "q5_1": (6.0, _q5_1),
}


def upstream(x: F32, name: str) -> F32:
    """A type of ``UPSTREAM`` behind upstream's Hadamard rotation, of x [..., dim]."""
    r = rotation_matrix("iso", "hadamard", x.shape[-1])
    blocks = np.asarray((x @ r).reshape(-1, 32), np.float32)
    return np.asarray(UPSTREAM[name][1](blocks).reshape(x.shape) @ r, np.float32)


@dataclass(frozen=True)
class Layer:
    """The profile of a layer, and the covariance of K as it stores it [heads, dim, dim], before the
    rotation. Its channels are those of the GGUF: ``order`` has for each one which it is in torch."""

    profile: LayerProfile
    stored: F64
    order: npt.NDArray[np.int64]

    def apply(self, x: F32, code: Code) -> F32:
        """K [heads, tokens, dim] as the queries meet it when ``code`` stores it."""
        mean = 0 if self.profile.k_mean is None else self.profile.k_mean[:, None]
        inside = (x[..., self.order] - mean) @ self.profile.k_map
        out = np.empty_like(x)
        out[..., self.order] = code(self, np.asarray(inside, np.float32)) @ self.profile.q_map + mean
        return out


class Code:
    """What is stored of K in a metric."""

    def __call__(self, layer: Layer, x: F32) -> F32:
        """x [heads, tokens, dim] as it is decoded."""
        raise NotImplementedError


@dataclass(frozen=True)
class Iso(Code):
    """A rotation, then the scalar code of ``bits``."""

    bits: int

    def __call__(self, layer: Layer, x: F32) -> F32:
        return iso(x, self.bits)


@dataclass(frozen=True)
class Klt(Code):
    """The channels that are uncorrelated, by falling variance, in groups of ``group``, each with a width of
    its own, ``bits`` on average; the groups' deviations are known, and ``BLOCK`` values share a scale, or
    with ``scales`` each group has one, and no deviations are needed."""

    bits: int
    group: int
    scales: bool

    def bits_per_value(self, dim: int) -> float:
        """With the scales."""
        return self.bits + 16 / (self.group if self.scales else min(BLOCK, dim))

    def __call__(self, layer: Layer, x: F32) -> F32:
        values, vectors = np.linalg.eigh(layer.stored)
        variance = np.maximum(values[:, ::-1], 0).reshape(len(x), -1, self.group).mean(axis=2)
        basis = np.asarray(vectors[:, :, ::-1], np.float32)
        chosen = widths(variance.mean(axis=0), self.bits)
        mix = _hadamard(self.group)
        groups = np.asarray((x @ basis).reshape(*x.shape[:2], -1, self.group) @ mix, np.float32)
        if self.scales:
            decoded: F32 = np.zeros_like(groups)
            for i, bits in enumerate(chosen):
                if bits:
                    flat = np.ascontiguousarray(groups[:, :, i]).reshape(-1, self.group)
                    decoded[:, :, i] = scalar(flat, bits, "inner").reshape(groups[:, :, i].shape)
        else:
            decoded = _together(groups, np.sqrt(variance).astype(np.float32), chosen)
        return np.asarray((decoded @ mix).reshape(x.shape) @ basis.swapaxes(1, 2))


@cache
def _hadamard(n: int) -> F32:
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return np.asarray(h / np.sqrt(n), np.float32)


WIDEST = 6
DISTORTION = [1.0, *(distortion(lloyd_max(2 ** (bits - 1))) for bits in range(1, WIDEST + 1))]


def widths(variance: F64, bits: int) -> list[int]:
    """Bits of each group for a mean of ``bits``: each further one goes where it takes most off the error."""
    chosen = [0] * len(variance)
    for _ in range(bits * len(variance)):
        gain = [
            v * (DISTORTION[b] - DISTORTION[b + 1]) if b < WIDEST else -1.0
            for v, b in zip(variance, chosen, strict=True)
        ]
        chosen[int(np.argmax(gain))] += 1
    return chosen


def _together(groups: F32, deviation: F32, chosen: list[int]) -> F32:
    """Groups [heads, tokens, n, group] of known ``deviation`` [heads, n] with one scale for all of a block:
    least squares, the best of three starts."""
    known = deviation[:, None, :, None]
    per_block = min(BLOCK // groups.shape[3], groups.shape[2])
    decoded = [
        _block(groups[:, :, i : i + per_block], known[:, :, i : i + per_block], chosen[i : i + per_block])
        for i in range(0, groups.shape[2], per_block)
    ]
    return np.concatenate(decoded, axis=2)


def _block(groups: F32, known: F32, chosen: list[int]) -> F32:
    """``_together`` of the groups of one block."""
    tiny = np.float32(1e-30)
    unit, weight = np.abs(groups) / np.maximum(known, tiny), known * known

    def points(scale: F32) -> F32:
        out: F32 = np.zeros_like(unit)
        for i, bits in enumerate(chosen):
            if bits:
                out[:, :, i] = _nearest(unit[:, :, i], scale[..., None], bits)
        return out

    def total(x: F32) -> F32:
        return np.asarray((weight * x).sum(axis=(2, 3)))

    rms = np.sqrt(total(unit * unit) / np.maximum(total(np.ones_like(unit)), tiny))
    best, scale = np.full(rms.shape, -1, np.float32), np.asarray(rms)
    for start in (0.85, 1.0, 1.2):
        s = np.float32(start) * rms
        for _ in range(2):
            m = points(s)
            cross, square = total(unit * m), np.maximum(total(m * m), tiny)
            s = cross / square
        gain = cross * s
        best, scale = np.where(gain > best, gain, best), np.where(gain > best, s, scale)
    scale = np.asarray(scale.astype(np.float16), np.float32)
    return np.asarray(np.copysign(points(scale) * scale[..., None, None] * known, groups), np.float32)


@cache
def _codebook(bits: int) -> tuple[F32, F32]:
    points = np.array(lloyd_max(2 ** (bits - 1)), np.float32)
    return points, np.asarray((points[1:] + points[:-1]) / 2, np.float32)


def _nearest(a: F32, scale: F32, bits: int) -> F32:
    """Points of a unit Gaussian for the magnitudes a under ``scale``, which broadcasts."""
    points, edges = _codebook(bits)
    return np.asarray(points[np.searchsorted(edges, a / np.maximum(scale, np.float32(1e-30)))])


def layers(gguf: Path, positions: int, sums: dict[int, LayerSums] | None) -> dict[int, Layer]:
    """Of the model ``gguf``, from its weights or from ``sums`` over a text, averaged over ``positions``."""
    whole = Whole.of(gguf, positions)
    found = {}
    for il in whole.readers:
        k, q = (
            moments_from_weights(whole, il) if sums is None else averaged(whole, il, sums[il], 0, positions)
        )
        profile = whole.solved(k, q)
        forward = profile.k_map.astype(np.float64)
        of_k = k.covariance if whole.exact else k.second
        dim = forward.shape[-1]
        found[il] = Layer(profile, forward @ of_k @ forward, order(whole.rope(il, dim), dim))
    return found


def sums_of(gguf: Path, windows: Iterable[dict[int, Captured]]) -> dict[int, LayerSums]:
    """Sums over K and Q of ``windows`` before RoPE, in the channels of the GGUF, by layer."""
    whole = Whole.of(gguf, 1)
    found: dict[int, LayerSums] = {}
    for window in windows:
        for il, captured in window.items():
            heads, tokens, dim = captured.k.shape
            rope = whole.rope(il, dim)
            if rope is None:
                raise ValueError(f"layer {il} has no RoPE")
            channels = order(rope, dim)
            k, q = (unturned(x, rope)[..., channels].astype(np.float64) for x in (captured.k, captured.q))
            q = q.reshape(heads, -1, dim)
            more = LayerSums(tokens, k.sum(axis=1), k.swapaxes(1, 2) @ k, q.swapaxes(1, 2) @ q, "rope")
            found[il] = found[il] + more if il in found else more
    return found


def order(rope: Rope | None, dim: int) -> npt.NDArray[np.int64]:
    """Channel of torch for each of the GGUF: RoPE's pairs are halves there, and neighbours in some GGUFs."""
    channels = np.arange(dim)
    if rope is not None and rope.pairing == "norm":
        turned = 2 * len(rope.theta)
        channels[:turned] = channels[:turned].reshape(2, -1).T.reshape(-1)
    return channels


def unturned(x: F32, rope: Rope) -> F64:
    """x [..., tokens, dim] behind RoPE at positions 0, 1, …, in torch's channels, as it was before."""
    pairs = len(rope.theta)
    angle = np.arange(x.shape[-2])[:, None] * rope.theta
    u = (x[..., :pairs] + 1j * x[..., pairs : 2 * pairs]) * np.exp(-1j * angle)
    return np.concatenate([u.real, u.imag, x[..., 2 * pairs :]], axis=-1)

"""RoPE averaged in closed form, the best metric, and moments foretold from weights."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufrq.profile.moments import Input, Moments, grouped, normalize, project
from ggufrq.profile.rope import Pairing, Rope, dirichlet
from ggufrq.profile.solve import solve

F64 = npt.NDArray[np.float64]


def turned(x: F64, position: int, pairing: Pairing, theta: F64, scale: float) -> F64:
    """RoPE of one vector, pair by pair, as ggml's rotate_pairs has it."""
    out = x.copy()
    for j, angle in enumerate(theta):
        a, b = (2 * j, 2 * j + 1) if pairing == "norm" else (j, j + len(theta))
        c, s = scale * math.cos(position * angle), scale * math.sin(position * angle)
        out[a], out[b] = x[a] * c - x[b] * s, x[a] * s + x[b] * c
    return out


def covariance(rng: np.random.Generator, dim: int, spread: float = 1.0) -> F64:
    root = rng.standard_normal((dim, dim)) * np.exp(spread * rng.standard_normal(dim))
    return root @ root.T


@st.composite
def ropes(draw: st.DrawFn) -> Rope:
    pairs = draw(st.integers(1, 6))
    rest = draw(st.integers(0, 5))
    pairing: Pairing = draw(st.sampled_from(["norm", "neox"]))
    theta = draw(st.lists(st.floats(0, 7), min_size=pairs, max_size=pairs))
    return Rope(2 * pairs + rest, pairing, np.array(theta), draw(st.floats(0.5, 1.5)))


@given(ropes(), st.integers(1, 60), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_averages_are_those_over_every_position(rope: Rope, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, moments = rng.standard_normal((2, rope.dim)), np.stack([covariance(rng, rope.dim)] * 2)
    identity = np.eye(rope.dim)
    turns = [
        np.stack([turned(row, p, rope.pairing, rope.theta, rope.scale) for row in identity], axis=1)
        for p in range(n)
    ]
    mean = np.mean([vectors @ turn.T for turn in turns], axis=0)
    second = np.mean([turn @ moments @ turn.T for turn in turns], axis=0)
    assert np.allclose(rope.matrix(n - 1), turns[-1], atol=1e-12)
    assert np.allclose(rope.mean(vectors, n), mean, atol=1e-10)
    assert np.allclose(rope.second_moment(moments, n), second, atol=1e-10 * np.abs(moments).max())


def test_the_kernel_holds_far_out_and_at_whole_turns() -> None:
    n = 1 << 20
    phi = np.array([0.0, 1e-12, 1e-6, 0.3, 2.0, 2 * math.pi, 4 * math.pi])
    direct = np.array([np.exp(1j * np.arange(n) * angle).mean() for angle in phi])
    assert np.allclose(dirichlet(phi, n), direct, atol=1e-8)
    assert dirichlet(np.zeros(1), 1 << 30)[0] == 1


def test_averaging_keeps_what_is_not_turned_and_the_inputs() -> None:
    rope = Rope(6, "norm", np.array([0.7]))
    moments = np.eye(6)[None] + 0.5
    before = moments.copy()
    after = rope.second_moment(moments, 1000)
    assert np.array_equal(moments, before)
    assert np.allclose(after[0, 2:, 2:], moments[0, 2:, 2:])
    assert np.abs(after[0, :2, 2:]).max() < 0.01  # what is turned and what is not lose each other


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_the_metric_solves_its_equation_and_keeps_scores(heads: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, q = (np.stack([covariance(rng, dim) for _ in range(heads)]) for _ in range(2))
    ridge = 1e-3
    metric = solve(k, q, ridge)
    mean = [np.trace(m, axis1=1, axis2=2)[:, None, None] / dim * ridge * np.eye(dim) for m in (k, q)]
    k, q = k + mean[0], q + mean[1]
    square = metric.forward @ metric.forward
    carried = square @ k @ square
    # up to a scale: what is stored has the mean square of K
    scale = (np.trace(carried, axis1=1, axis2=2) / np.trace(q, axis1=1, axis2=2))[:, None, None]
    assert np.allclose(carried, scale * q, rtol=0, atol=1e-7 * np.abs(carried).max())
    stored = metric.forward @ k @ metric.forward
    assert np.allclose(np.trace(stored, axis1=1, axis2=2), np.trace(k, axis1=1, axis2=2))
    assert np.allclose(metric.forward, np.swapaxes(metric.forward, 1, 2))
    queries, keys = rng.standard_normal((heads, 5, dim)), rng.standard_normal((heads, dim, 4))
    scores = (queries @ metric.inverse) @ (metric.forward @ keys)
    size = np.abs(metric.inverse).max() * np.abs(metric.forward).max()
    assert np.allclose(scores, queries @ keys, rtol=0, atol=1e-8 * size)


@given(st.integers(2, 10), st.integers(0, 2**32), st.floats(0.1, 2))
@settings(deadline=None, max_examples=60)
def test_no_other_matrix_is_better(dim: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    k, q = covariance(rng, dim), covariance(rng, dim)
    metric = solve(k, q, 1e-6)

    def cost(matrix: F64) -> float:
        inverse = np.linalg.inv(matrix)
        return float(np.trace(k @ matrix @ matrix) * np.trace(q @ inverse @ inverse))

    best = cost(metric.forward)
    assert best <= np.trace(k) * np.trace(q) * (1 + 1e-6)
    assert math.isclose(np.trace(k) * np.trace(q) / best, metric.gain, rel_tol=1e-2)
    for _ in range(5):
        near = np.eye(dim) + spread * 0.1 * covariance(rng, dim) / dim
        for other in (covariance(rng, dim, spread) + 1e-3 * np.eye(dim), near @ metric.forward @ near.T):
            assert best <= cost(other) * (1 + 1e-4)


def test_empty_heads_and_directions_are_solved() -> None:
    k = np.zeros((2, 4, 4))
    k[1, 0, 0] = 5.0
    metric = solve(k, k[::-1].copy())
    assert np.isfinite(metric.forward).all() and np.isfinite(metric.inverse).all()
    assert np.allclose(metric.forward @ metric.inverse, np.eye(4), atol=1e-9)
    assert np.linalg.cond(metric.forward).max() < 100


def sampled(rows: F64, weight: F64, offset: F64, bias: F64, samples: int, *, layer_norm: bool) -> F64:
    """Outputs of a projection for inputs that went through a norm, by drawing them."""
    rng = np.random.default_rng(7)
    z = rng.standard_normal((samples, rows.shape[1]))
    if layer_norm:
        z -= z.mean(axis=1, keepdims=True)
    z /= np.sqrt((z**2).mean(axis=1, keepdims=True))
    return (z * weight + offset) @ rows.T + bias


def close(found: F64, samples: F64, extra: float = 0.0) -> None:
    """Whether a second moment [dim, dim] is within five standard errors of that of the samples."""
    count = len(samples)
    mean, square = samples.T @ samples / count, (samples**2).T @ samples**2 / count
    error = np.sqrt((square - mean**2) / count)
    assert (np.abs(mean - found) < 5 * error + extra * np.abs(found).max()).all()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_projections_of_normed_inputs(layer_norm: bool) -> None:
    rng = np.random.default_rng(1)
    dim, width = 6, 200
    rows = rng.standard_normal((dim, width)) / 14 + 0.1  # what a LayerNorm takes out is a good part
    weight, offset = np.exp(0.5 * rng.standard_normal(width)), 0.3 * rng.standard_normal(width)
    bias = rng.standard_normal(dim)
    mean, second = project(rows.astype(np.float32), Input(weight, offset, layer_norm), bias)
    drawn = sampled(rows, weight, offset, bias, 20000, layer_norm=layer_norm)
    error = drawn.std(axis=0) / math.sqrt(len(drawn))
    assert (np.abs(drawn.mean(axis=0) - mean) < 5 * error).all()
    # a LayerNorm divides by the deviation of what it has centered: n - 1 degrees of freedom
    close(second, drawn, extra=2 / width)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("bias_size", [0.0, 0.5])
def test_qk_norm_is_a_division_by_the_root_mean_square(layer_norm: bool, bias_size: float) -> None:
    rng = np.random.default_rng(2)
    dim, width = 64, 300
    rows = rng.standard_normal((dim, width)) / math.sqrt(width)
    bias = bias_size * rng.standard_normal(dim)
    weight, offset = np.exp(0.4 * rng.standard_normal(dim)), 0.2 * rng.standard_normal(dim)
    mean, second = project(rows.astype(np.float32), Input(), bias)
    found = normalize(Moments(mean[None], second[None]), weight, offset, centered=layer_norm)
    drawn = sampled(rows, np.ones(width), np.zeros(width), bias, 20000, layer_norm=False)
    if layer_norm:
        drawn = drawn - drawn.mean(axis=1, keepdims=True)
    drawn = drawn / np.sqrt((drawn**2).mean(axis=1, keepdims=True)) * weight + offset
    # the mean of a ratio is not the ratio of the means: relative variance of the mean square, some 2 / dim
    error = drawn.std(axis=0) / math.sqrt(len(drawn))
    assert (
        np.abs(drawn.mean(axis=0) - found.mean[0]) < 5 * error + 2 / dim * np.abs(found.mean[0]).max()
    ).all()
    close(found.second[0], drawn, extra=2 / dim)


def test_qk_norm_over_all_heads_divides_them_alike() -> None:
    rng = np.random.default_rng(3)
    second = np.stack([covariance(rng, 4), 100 * covariance(rng, 4)])
    weight = np.exp(rng.standard_normal((2, 4)))
    whole = normalize(Moments(np.zeros((2, 4)), second), weight, whole=True)
    rms = math.sqrt(np.trace(second.sum(axis=0)) / 8)
    assert np.allclose(whole.second, second / rms**2 * weight[:, :, None] * weight[:, None, :])
    by_head = normalize(Moments(np.zeros((2, 4)), second), None)
    assert np.allclose(np.trace(by_head.second, axis1=1, axis2=2), 4)


def test_queries_of_a_group_are_averaged_in_order() -> None:
    second = np.arange(1.0, 5.0)[:, None, None] * np.eye(2)
    moments = Moments(np.zeros((4, 2)), second)
    assert np.allclose(grouped(moments, 2), np.array([1.5, 3.5])[:, None, None] * np.eye(2))
    assert np.allclose(Moments(np.ones((1, 2)), second[:1] + 1).covariance, second[:1])

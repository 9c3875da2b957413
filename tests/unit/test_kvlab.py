"""The codes and measures that bench/kv_modes.py and kv_codes.py compare."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from ggufrq.codec import dequantize, quantize
from ggufrq.profile.file import LayerProfile
from ggufrq.profile.rope import Rope

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from kvlab import metric, tiles
from kvlab.attention import errors
from kvlab.lattice import _nearest, lattice, radius
from kvlab.markdown import figure, table
from kvlab.rotations import rotation
from kvlab.scalar import scalar
from kvlab.schemes import Statistics, scheme
from kvlab.trellis import codebook, paths, trellis


def gaussian(blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((blocks, 128)).astype(np.float32)


def relative(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x - y) ** 2).sum() / (x**2).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", ["lsq", "inner", "norm"])
def test_scalar_is_the_codec(bits: int, scale: str) -> None:
    x = gaussian(300) * np.exp(gaussian(300, 1)[:, :1])
    ours = scalar(x, bits, scale)
    codec = dequantize(quantize(x, bits, scale=scale), bits)
    assert relative(x, ours) == pytest.approx(relative(x, codec), rel=0.01)
    assert relative(codec, ours) < 0.002


@pytest.mark.parametrize("bits", [1, 5, 6])
def test_scalar_of_other_widths(bits: int) -> None:
    x = gaussian(300)
    assert relative(x, scalar(x, bits)) <= 1.05 * relative(x, scalar(x, bits, "search"))
    if bits > 1:
        assert relative(x, scalar(x, bits)) < 0.3 * relative(x, scalar(x, bits - 1))


def test_inner_keeps_the_product_of_a_block_with_itself() -> None:
    x = gaussian(50)
    y = scalar(x, 3, "inner")
    np.testing.assert_allclose((x * y).sum(axis=1), (x * x).sum(axis=1), rtol=1e-3)
    shrunk = scalar(x, 3, "lsq")
    assert ((x * shrunk).sum(axis=1) < 0.99 * (x * x).sum(axis=1)).all()


def test_search_is_no_worse_than_three_starts() -> None:
    x = gaussian(300)
    assert (
        relative(x, scalar(x, 3, "search"))
        <= relative(x, scalar(x, 3))
        <= 1.02 * relative(x, scalar(x, 3, "search"))
    )


def test_points_in_the_spheres() -> None:
    assert (radius("d4"), radius("e8")) == (40, 44)
    grid = np.array(list(itertools.product(range(-6, 7), repeat=4)))
    even = grid[grid.sum(axis=1) % 2 == 0]
    assert ((even**2).sum(axis=1) <= 40).sum() == 3961 <= 2**12


def test_nearest_point_of_d4() -> None:
    x = gaussian(1).reshape(-1, 4) * 1.5
    grid = np.array(list(itertools.product(range(-7, 8), repeat=4)), np.float32)
    even = grid[grid.sum(axis=1) % 2 == 0]
    best = even[((x[:, None] - even[None]) ** 2).sum(axis=2).argmin(axis=1)]
    np.testing.assert_allclose(
        ((x - _nearest("d4", x)) ** 2).sum(axis=1), ((x - best) ** 2).sum(axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["d4", "e8"])
def test_lattice_blocks_are_points_of_the_sphere(name: str) -> None:
    y = lattice(gaussian(20) * 3, name)
    width = 4 if name == "d4" else 8
    for block in y:
        # the scale is the one for which all values become multiples of a half
        smallest = np.abs(block[np.abs(block) > 0]).min()
        points = next(
            p
            for p in (block / smallest * m / 2 for m in (1, 2))
            if np.allclose(p * 2, np.rint(p * 2), atol=0.02)
        )
        assert ((points.reshape(-1, width) ** 2).sum(axis=1) <= radius(name) + 0.5).all()


def test_viterbi_finds_the_best_path() -> None:
    book = codebook(6)
    x = gaussian(4)[:, :3]
    windows = []
    for bits in itertools.product(range(8), repeat=3):
        state, path = 0, []
        for u in bits:
            window = state << 3 | u
            path.append(window)
            state = window & 7
        windows.append(path)
    every = book[np.array(windows)]
    best = ((x[:, None] - every[None]) ** 2).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(((x - book[paths(x, book)]) ** 2).sum(axis=1), best, rtol=1e-5)


def test_order_of_the_codes_on_a_gaussian() -> None:
    x = gaussian(300, 9)
    found = [relative(x, y) for y in (scalar(x, 3), lattice(x, "d4"), lattice(x, "e8"), trellis(x, 6))]
    assert found == sorted(found, reverse=True)
    assert 0.031 < found[0] < 0.033 and 2**-6 < found[-1] < 0.026


def test_schemes() -> None:
    x = gaussian(32).reshape(1, 32, 128) + 5
    made = scheme("iso:full:3:inner:centre")
    assert (made.bits, made.centre, made.scale) == (3.125, True, "inner")
    with pytest.raises(ValueError, match="statistics"):
        made.apply(x)
    centred = made.apply(x, Statistics.of(x))
    assert relative(x, centred) < 0.1 * relative(x, scheme("iso:full:3:inner").apply(x))
    for wrong in ("iso:full:5", "iso:full:3:sideways", "iso:skew:3", "mono:full:3"):
        with pytest.raises(ValueError):
            scheme(wrong).apply(x)
    assert relative(x, scheme("f16").apply(x)) < 1e-6


def test_rotation_of_halves() -> None:
    r = rotation("iso", "full", 256, 128)
    assert not r[:128, 128:].any()
    assert rotation("iso", "full", 256, 256)[:128, 128:].any()
    with pytest.raises(ValueError):
        rotation("iso", "full", 128, 256)


def test_errors_of_attention() -> None:
    q, k, v = (gaussian(64, seed) / 5 for seed in range(3))
    assert errors(q, k, v, k, v).k_kl == pytest.approx(0, abs=1e-12)
    shifted = errors(q, k, v, k + 1, v)  # the same for all keys: attention does not see it
    assert shifted.k_mse > 1 and shifted.k_kl < 1e-6
    assert errors(q, k, v, k, 1.1 * v).v_out == pytest.approx(0.01, rel=1e-3)


def test_tables() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | --: |\n| x | 1 |"
    assert [figure(x) for x in (12.3, 1.234, 0.1234, 0.01234, 0.001234)] == [
        "12",
        "1.23",
        ".123",
        ".0123",
        ".00123",
    ]


def test_kvarn_evens_out_tokens_and_channels() -> None:
    random = np.random.default_rng(3)
    spread = 5 * np.exp(0.08 * (random.standard_normal((128, 1)) + random.standard_normal((1, 128))))
    tile = (random.standard_normal((1, 128, 128)) * spread).astype(np.float32)
    rows, columns = tiles.balance(tile)
    even = tile / rows / columns
    for axis in (1, 2):
        assert tile.std(axis=axis).max() > 1.4 * tile.std(axis=axis).min()
        assert even.std(axis=axis).max() < 1.05 * even.std(axis=axis).min()
    assert tiles.bits_per_value(3, 128, "k") == 3.375
    assert tiles.bits_per_value(4, 256, "v") == 4.25


@pytest.mark.parametrize("side", ["k", "v"])
def test_kvarn_codes_whole_tiles(side: str) -> None:
    x = np.random.default_rng(4).standard_normal((2, 200, 64)).astype(np.float32)
    out = tiles.kvarn(x, 4, side)
    np.testing.assert_array_equal(out[:, 128:], x[:, 128:])
    assert 0.001 < relative(x[:, :128], out[:, :128]) < 0.02
    assert relative(x, tiles.kvarn(x, 6, side)) < relative(x, out) / 8


def test_widths_go_where_variance_is() -> None:
    assert metric.widths(np.ones(4), 3) == [3, 3, 3, 3]
    uneven = metric.widths(np.array([400.0, 20.0, 1.0, 0.001]), 3)
    assert sum(uneven) == 12 and uneven == sorted(uneven, reverse=True) and uneven[0] <= metric.WIDEST


def of_variance(variance: np.ndarray, order: np.ndarray) -> metric.Layer:
    """A layer of one head in whose metric K has ``variance``."""
    random = np.random.default_rng(5)
    half = random.standard_normal((len(variance), len(variance)))
    forward = half @ half.T / len(variance) + np.eye(len(variance))
    mean = random.standard_normal((1, len(variance)))
    parts = (x[None].astype(np.float32) for x in (forward, np.linalg.inv(forward), mean[0]))
    return metric.Layer(LayerProfile(*parts), np.diag(variance)[None], order)


@pytest.mark.parametrize("code", [metric.Klt(3, 64, True), metric.Klt(3, 32, False)])
def test_klt_gains_where_variances_differ(code: metric.Klt) -> None:
    variance = np.exp(-np.arange(128) / 16)
    layer = of_variance(variance, np.arange(128))
    x = (gaussian(400) * np.sqrt(variance)).astype(np.float32)[None]
    assert relative(x, code(layer, x)) < 0.6 * relative(x, metric.iso(x, 3))
    assert code.bits_per_value(128) == (3.25 if code.scales else 3.125)


def test_a_profile_alone_changes_nothing() -> None:
    class Exact(metric.Code):
        def __call__(self, layer: metric.Layer, x: np.ndarray) -> np.ndarray:
            return x

    order = metric.order(Rope(128, "norm", np.ones(64)), 128)
    assert order[:4].tolist() == [0, 64, 1, 65]
    x = gaussian(20)[None]
    np.testing.assert_allclose(of_variance(np.ones(128), order).apply(x, Exact()), x, atol=1e-4)


def test_what_rope_turned_is_turned_back() -> None:
    rope = Rope(64, "neox", 100.0 ** (-np.arange(24) / 24))
    x = np.random.default_rng(6).standard_normal((2, 5, 64))
    turned = np.stack([x[:, p] @ rope.matrix(p).T for p in range(5)], axis=1)
    np.testing.assert_allclose(metric.unturned(turned, rope), x, atol=1e-9)

"""The numpy reference of the codes against its definition, element by element, and its quality."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufrq.codec import dequantize, quantize, tables
from ggufrq.codec.pack import pack, unpack
from ggufrq.codec.rotate import Mode, rotate

F32 = npt.NDArray[np.float32]
LARGEST = np.float32(64992.25)
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5])
BLOCK = pytest.mark.parametrize("block", [128, 64])


def slow_indices(block: bytes, bits: int, n: int) -> list[int]:
    """Indices of a block of n values, written from the description of the layout alone."""
    qs, half, quarter, eighth = block[2:], n // 2, n // 4, n // 8
    if bits >= 4:
        nibble = [qs[j % half] >> (4 if j >= half else 0) & 15 for j in range(n)]
        high = [bits == 5 and qs[half + j % eighth] >> j // eighth & 1 for j in range(n)]
        return [a | b << 4 for a, b in zip(nibble, high, strict=True)]
    low = [qs[j % quarter] >> 2 * (j // quarter) & 3 for j in range(n)]
    if bits == 2:
        return low
    return [low[j] | (qs[quarter + j % eighth] >> j // eighth & 1) << 2 for j in range(n)]


def relative_error(x: F32, y: F32) -> float:
    """|x - y|^2 / |x|^2 over all values."""
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    return float(((x64 - y64) ** 2).sum() / (x64**2).sum())


@BITS
@BLOCK
def test_layout(bits: int, block: int) -> None:
    rng = np.random.default_rng(1)
    index = rng.integers(0, 2**bits, (64, block), dtype=np.uint8)
    scale = rng.standard_normal(64).astype(np.float16)
    blocks = pack(scale, index, bits)
    assert [slow_indices(b.tobytes(), bits, block) for b in blocks] == index.tolist()
    assert [np.frombuffer(b[:2].tobytes(), "<f2")[0] for b in blocks] == scale.tolist()


@BITS
@BLOCK
def test_unpack_is_the_inverse_of_pack(bits: int, block: int) -> None:
    one = np.eye(block, dtype=bool)
    one_hot = np.concatenate([np.where(one, v, w) for v in range(2**bits) for w in (0, 2**bits - 1)])
    scale = np.arange(len(one_hot), dtype=np.uint16).view(np.float16)
    s, i = unpack(pack(scale, one_hot.astype(np.uint8), bits), bits, block)
    assert np.array_equal(s.view(np.uint16), scale.view(np.uint16))
    assert np.array_equal(i, one_hot)


@BITS
@BLOCK
def test_decode_is_scale_times_centroid(bits: int, block: int) -> None:
    c = tables.code(bits)
    for scale in (1.0, 65504.0, 6e-8, -0.25):
        index = (np.arange(block) % 2**bits).astype(np.uint8)[None]
        y = dequantize(pack(np.array([scale], np.float16), index, bits), bits, block=block)
        exact = np.float64(np.float16(scale)) * np.array(c.centroids, np.float64)[index] / 128
        assert np.array_equal(y.astype(np.float64), exact)


@BITS
def test_shapes_and_errors(bits: int) -> None:
    x = np.zeros((2, 3, 256), np.float32)
    q = quantize(x, bits)
    assert q.shape == (2, 3, 2 * tables.code(bits).bytes) and q.dtype == np.uint8
    assert dequantize(q, bits).shape == x.shape
    assert quantize(np.zeros((0, 128), np.float32), bits).shape == (0, tables.code(bits).bytes)
    with pytest.raises(ValueError, match="multiple of 128"):
        quantize(np.zeros(64, np.float32), bits)
    narrow = quantize(x, bits, block=64)
    assert narrow.shape == (2, 3, 4 * tables.code(bits, 64).bytes)
    assert dequantize(narrow, bits, block=64).shape == x.shape
    assert quantize(np.zeros(192, np.float32), bits, block=64).shape == (3 * tables.code(bits, 64).bytes,)
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize(np.zeros(96, np.float32), bits, block=64)
    with pytest.raises(ValueError, match="no code with blocks of 32"):
        quantize(x, bits, block=32)
    with pytest.raises(ValueError, match="multiple of"):
        dequantize(np.zeros(33, np.uint8), bits)
    with pytest.raises(ValueError, match=r"a block of . bits has"):
        unpack(np.zeros((1, 33), np.uint8), bits)
    with pytest.raises(ValueError, match="no code with 7 bits"):
        quantize(x, 7)


@BITS
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 5e-8])
def test_tiny_blocks_are_zero_bytes(bits: int, value: float) -> None:
    assert not quantize(np.full(128, value, np.float32), bits).any()


@BITS
def test_special_values(bits: int) -> None:
    x = np.random.default_rng(2).standard_normal(128).astype(np.float32)
    x[:8] = [np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 65504, -65504]
    same = x.copy()
    same[:8] = [0, 0, LARGEST, -LARGEST, LARGEST, -LARGEST, LARGEST, -LARGEST]
    assert np.array_equal(quantize(x, bits), quantize(same, bits))
    for value in (np.inf, -np.inf, 65504, -1e30):
        y = dequantize(quantize(np.full(128, value, np.float32), bits), bits)
        assert np.array_equal(y, np.full(128, np.copysign(LARGEST, value)))
    assert not quantize(np.full(128, np.nan, np.float32), bits).any()


@BITS
@BLOCK
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=128, max_size=128))
def test_any_bit_pattern_decodes_to_finite_values(bits: int, block: int, words: list[int]) -> None:
    x = np.array(words, np.uint32).view(np.float32)
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        y = dequantize(quantize(x, bits, block=block), bits, block=block)
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= LARGEST


@BITS
def test_negation_complements_the_indices(bits: int) -> None:
    x = np.random.default_rng(3).standard_t(3, (256, 128)).astype(np.float32)
    x[:, 7] = 0.0
    scale, index = unpack(quantize(x, bits), bits)
    negative_scale, negative_index = unpack(quantize(-x, bits), bits)
    assert np.array_equal(scale, negative_scale)
    assert np.array_equal(index ^ (2**bits - 1), negative_index)


@BITS
def test_powers_of_two_change_only_the_scale(bits: int) -> None:
    x = np.random.default_rng(4).standard_normal((256, 128)).astype(np.float32)
    scale, index = unpack(quantize(x, bits), bits)
    scale8, index8 = unpack(quantize(x * np.float32(1 / 256), bits), bits)
    assert np.array_equal(index, index8) and np.array_equal(scale / 256, scale8)


@BITS
@BLOCK
def test_encoding_what_was_decoded_changes_nothing(bits: int, block: int) -> None:
    rng = np.random.default_rng(5)
    shape = (2048, block)
    for x in (rng.standard_normal(shape), rng.standard_t(3, shape), rng.uniform(-1, 1, shape)):
        blocks = quantize(x.astype(np.float32), bits, block=block)
        decoded = dequantize(blocks, bits, block=block)
        assert np.array_equal(quantize(decoded, bits, block=block), blocks)


@BITS
def test_indices_are_nearest_for_the_stored_scale(bits: int) -> None:
    x = np.random.default_rng(6).standard_normal((1024, 128)).astype(np.float32)
    scale, index = unpack(quantize(x, bits, scale="lsq"), bits)
    grid = scale.astype(np.float64)[:, None, None] * np.array(tables.code(bits).centroids) / 128
    distance = np.abs(x[..., None] - grid)
    chosen = np.take_along_axis(distance, index[..., None].astype(np.int64), -1)[..., 0]
    # 15 bits of the largest magnitude and 11 of the scale
    slack = np.abs(x).max(1, keepdims=True) * 2.0**-13
    assert (chosen <= distance.min(-1) + slack).all()


# The norm as scale gives about .116, .034, .0093
@pytest.mark.parametrize(
    ("bits", "limit", "brute_force_factor"),
    [(2, 0.1155, 1.01), (3, 0.0323, 1.02), (4, 0.0080, 1.02), (5, 0.0020, 1.02)],
)
def test_quality_on_gaussian(bits: int, limit: float, brute_force_factor: float) -> None:
    """Close to what trying 171 scales per block finds."""
    x = np.random.default_rng(7).standard_normal((4096, 128)).astype(np.float32)
    error = relative_error(x, dequantize(quantize(x, bits, scale="lsq"), bits))
    assert error < limit
    c = np.array(tables.code(bits).magnitudes) / 127
    few = np.abs(x[:512]).astype(np.float64)
    best = np.full(512, np.inf)
    for k in np.linspace(0.3, 1.15, 171):
        grid = (few.max(1) * k)[:, None]
        level = sum((few > grid * (a + b) / 2).astype(int) for a, b in pairwise(c))
        chosen = c[level]
        scale = (few * chosen).sum(1) / (chosen**2).sum(1)
        best = np.minimum(best, ((few - scale[:, None] * chosen) ** 2).sum(1) / (few**2).sum(1))
    found = relative_error(x[:512], dequantize(quantize(x[:512], bits, scale="lsq"), bits))
    assert best.mean() * 0.999 < found < best.mean() * brute_force_factor


@BITS
def test_a_smaller_block_loses_less(bits: int) -> None:
    """Its scale follows the values more closely, which costs an eighth of a bit."""
    x = np.random.default_rng(7).standard_normal((4096, 128)).astype(np.float32)
    blocks = {n: quantize(x, bits, scale="lsq", block=n) for n in (128, 64)}
    wide, narrow = (relative_error(x, dequantize(b, bits, block=n)) for n, b in blocks.items())
    assert 0.85 * wide < narrow < wide


def norm_scale_error(x: F32) -> float:
    """Error at 3 bits with the published scale, norm / sqrt(128)."""
    c = np.array(tables.code(3).magnitudes) * 0.0169446  # Lloyd-Max for a unit Gaussian
    sigma = np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True))
    a = np.abs(x)
    level = sum((a > sigma * (p + q) / 2).astype(int) for p, q in pairwise(c))
    return relative_error(x, (np.sign(x) * sigma * c[level]).astype(np.float32))


def outlier_data(name: str) -> F32:
    """128 heads of 64 tokens, [8192, 128], whose channels differ in scale or offset."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((128, 64, 128))
    head = np.arange(128)[:, None]
    channels = rng.permuted(np.tile(np.arange(128), (128, 1)), axis=1)[:, :4]
    if name == "log-normal":
        x *= np.exp(0.7 * rng.standard_normal((128, 1, 128)))
    elif name == "4 channels x10":
        x[head, :, channels] *= 10
    elif name == "4 channels +10":
        x[head, :, channels] += 10
    return x.reshape(-1, 128).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "mode", "norm_scale", "ours"),
    [
        # the norm as scale: errors known from the field
        ("gaussian", "none", 0.034, 0.0319),
        ("log-normal", "none", 0.15, 0.090),
        ("log-normal", "hadamard", 0.032, 0.0303),
        ("4 channels x10", "none", 0.354, 0.177),
        ("4 channels x10", "block", 0.227, 0.110),
        ("4 channels x10", "hadamard", 0.030, 0.0262),
        ("4 channels x10", "full", 0.032, 0.0288),
        ("4 channels +10", "none", 0.268, 0.094),
        ("4 channels +10", "full", 0.033, 0.0302),
    ],
)
def test_three_bit_table(name: str, mode: Mode, norm_scale: float, ours: float) -> None:
    """At 3 bits, iso, the norm and least squares as scale."""
    x = rotate(outlier_data(name), "iso", mode)
    assert norm_scale_error(x) == pytest.approx(norm_scale, rel=0.06)
    lsq = quantize(x, 3, scale="lsq")
    assert relative_error(x, dequantize(lsq, 3)) == pytest.approx(ours, rel=0.03)


@BITS
@BLOCK
def test_a_block_is_not_shrunk(bits: int, block: int) -> None:
    """The inner product with what is decoded is that with itself; the squared error grows by its square."""
    x = np.random.default_rng(9).standard_normal((4096, block)).astype(np.float32)
    y, lsq = (
        dequantize(quantize(x, bits, scale=scale, block=block), bits, block=block)
        for scale in ("inner", "lsq")
    )
    own = (x.astype(np.float64) ** 2).sum(1)
    # fp16 keeps 11 bits of the scale, and the sums 15 bits of each value
    np.testing.assert_allclose((x * y.astype(np.float64)).sum(1) / own, 1, atol=1.2e-3)
    shrunk = 1 - ((x * lsq.astype(np.float64)).sum(1) / own).mean()
    error = relative_error(x, lsq)
    # the 15 bits of a value are cut off, not rounded
    assert shrunk == pytest.approx(error, rel=0.05, abs=2e-4)
    assert relative_error(x, y) == pytest.approx(error * (1 + error), rel=0.05)


def test_the_scale_must_be_known() -> None:
    with pytest.raises(ValueError, match="no scale 'best'; there are inner, lsq, norm"):
        quantize(np.zeros(128, np.float32), 3, scale="best")  # type: ignore[arg-type]

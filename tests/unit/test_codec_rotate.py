"""The rotations: orthogonal, symmetric, their own inverse, and what their names say."""

from typing import get_args

import numpy as np
import pytest

from ggufrq.codec import rotate, rotation_matrix
from ggufrq.codec.rotate import Family, Mode
from ggufrq.codec.tables import rotation_blocks

FAMILY = pytest.mark.parametrize("family", get_args(Family))
MODE = pytest.mark.parametrize("mode", get_args(Mode))


@FAMILY
@MODE
@pytest.mark.parametrize("n", [64, 128, 256])
def test_symmetric_involution(family: Family, mode: Mode, n: int) -> None:
    r = rotation_matrix(family, mode, n)
    assert r.dtype == np.float32 and r.shape == (n, n)
    assert np.array_equal(r, r.T)
    r64 = r.astype(np.float64)
    assert np.abs(r64 @ r64 - np.eye(n)).max() < 2e-7
    if n == 256 and mode in ("none", "block"):  # these repeat, the others mix all values
        small = rotation_matrix(family, mode)
        assert np.array_equal(r[:128, :128], small) and np.array_equal(r[128:, 128:], small)
        assert not r[:128, 128:].any()
    elif n == 256:
        assert (np.abs(r[:128, 128:]) > 1e-6).mean() > 0.99
    if n == 64 and mode == "block":  # as many blocks as there is room for
        whole = 64 if family != "rotor" else 63
        wide = rotation_matrix(family, mode)
        assert np.array_equal(r[:whole, :whole], wide[:whole, :whole])
        assert np.array_equal(r[whole:, :], np.eye(64, dtype=np.float32)[whole:])


@FAMILY
@pytest.mark.parametrize("n", [64, 128, 256])
def test_full_is_block_hadamard_block(family: Family, n: int) -> None:
    b, h, full = (rotation_matrix(family, m, n).astype(np.float64) for m in ("block", "hadamard", "full"))
    assert np.abs(b @ h @ b - full).max() < 1e-7


@FAMILY
@MODE
@pytest.mark.parametrize("n", [64, 128, 256])
def test_rotate_multiplies_and_undoes_itself(family: Family, mode: Mode, n: int) -> None:
    x = np.random.default_rng(1).standard_normal((5, 3, 512)).astype(np.float32)
    y = rotate(x, family, mode, n)
    assert y.shape == x.shape and y.dtype == np.float32
    parts = x.reshape(5, 3, -1, n) @ rotation_matrix(family, mode, n)
    np.testing.assert_allclose(y, parts.reshape(x.shape), atol=5e-6)
    np.testing.assert_allclose(rotate(y, family, mode, n), x, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


def test_hadamard_is_natural_order() -> None:
    h = rotation_matrix("iso", "hadamard") * np.sqrt(np.float32(128))
    signs = [[(-1) ** (i & j).bit_count() for j in range(128)] for i in range(128)]
    np.testing.assert_allclose(h, signs, atol=1e-6)
    assert rotation_matrix("iso", "hadamard")[0, 0] == np.float32(1 / np.float64(np.sqrt(np.float32(128))))


def test_planar_blocks_are_reflections() -> None:
    c, s = rotation_blocks("planar").astype(np.float64).T
    b = rotation_matrix("planar", "block")
    np.testing.assert_allclose(c * c + s * s, 1, atol=1e-7)
    for i in range(64):
        block = b[2 * i : 2 * i + 2, 2 * i : 2 * i + 2]
        assert np.array_equal(block, np.array([[c[i], s[i]], [s[i], -c[i]]], np.float32))


def test_iso_blocks_are_products_with_pure_quaternions() -> None:
    def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        w, v = a[0] * b[0] - a[1:] @ b[1:], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
        return np.concatenate([[w], v])

    rng = np.random.default_rng(20260612)
    rng.uniform(size=64)
    vectors = rng.standard_normal((2, 32, 3))
    p, q = (np.pad(v / np.linalg.norm(v, axis=1, keepdims=True), ((0, 0), (1, 0))) for v in vectors)
    x = np.random.default_rng(2).standard_normal(4)
    blocks = rotation_blocks("iso").astype(np.float64)
    for i in range(32):
        np.testing.assert_allclose(blocks[i] @ x, multiply(multiply(p[i], x), q[i]), atol=1e-6)
        assert np.linalg.det(blocks[i]) == pytest.approx(1, abs=1e-6)


def test_rotor_blocks_are_half_turns() -> None:
    blocks = rotation_blocks("rotor").astype(np.float64)
    assert blocks.shape == (42, 3, 3)
    assert np.trace(blocks, axis1=1, axis2=2) == pytest.approx(-1, abs=1e-6)  # 1 + 2 cos(pi)
    assert np.linalg.det(blocks) == pytest.approx(1, abs=1e-6)
    tail = rotation_matrix("rotor", "block")[126:]
    assert np.array_equal(tail, np.eye(128, dtype=np.float32)[126:])


@FAMILY
def test_blocks_are_spread_over_the_sphere(family: Family) -> None:
    """A constant or repeated block would pass the other tests."""
    blocks = rotation_blocks(family).reshape(len(rotation_blocks(family)), -1)
    distance = np.linalg.norm(blocks[:, None] - blocks[None], axis=-1) + 9 * np.eye(len(blocks))
    assert distance.min() > 1e-3
    assert np.abs(blocks.mean(0)).max() < 0.5


def test_outliers_spread_only_with_hadamard() -> None:
    x = np.zeros(128, np.float32)
    x[5] = 1
    assert np.abs(rotate(x, "iso", "block")).max() > 0.5
    assert np.abs(rotate(x, "iso", "hadamard")).max() < 0.09
    assert np.abs(rotate(x, "iso", "full")).max() < 0.4


def test_errors() -> None:
    with pytest.raises(ValueError, match="no rotation family"):
        rotation_matrix("turbo", "full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rotation mode"):
        rotation_matrix("iso", "fast")  # type: ignore[arg-type]
    for n in (0, 32, 192, 384, 512, -128):
        with pytest.raises(ValueError, match="of 64, 128 or 256 values"):
            rotation_matrix("iso", "full", n)
    for x in (np.float32(1), np.zeros(0), np.zeros(192)):
        with pytest.raises(ValueError, match="multiple of 128"):
            rotate(x, "iso", "full")
    with pytest.raises(ValueError, match="multiple of 256"):
        rotate(np.zeros(384), "iso", "full", 256)

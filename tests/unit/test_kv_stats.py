"""The synthetic sets: seeded, and with the statistics that their names promise."""

import numpy as np
import pytest
from kvlab.kv_stats import SETS, generate

from ggufrq.codec import dequantize, quantize, rotate

EVERY = pytest.mark.parametrize("name", SETS)


@EVERY
def test_same_arguments_give_the_same_arrays(name: str) -> None:
    a, b, other = (generate(name, 64, seed=seed) for seed in (3, 3, 4))
    for x, y, z in ((a.q, b.q, other.q), (a.k, b.k, other.k), (a.v, b.v, other.v)):
        assert x.dtype == np.float32 and x.shape == (64, SETS[name].head_dim)
        assert np.isfinite(x).all()
        assert np.array_equal(x, y) and not np.array_equal(x, z)


@EVERY
def test_attention_is_neither_flat_nor_one_hot(name: str) -> None:
    s = generate(name, 256)
    logits = s.q @ (s.k - s.k.mean(axis=0)).T
    assert logits.std(axis=1).mean() == pytest.approx(2.5, rel=1e-3)


@EVERY
def test_values_have_no_outlier_channels(name: str) -> None:
    scale = generate(name, 512).v.std(axis=0)
    assert scale.max() < 4 * np.median(scale)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_keys_have_outlier_channels_in_slow_pairs(name: str) -> None:
    scale = generate(name, 512).k.std(axis=0)
    half = len(scale) // 2
    count = SETS[name].outliers
    slow = np.r_[half - count : half, len(scale) - count : len(scale)]
    assert set(np.argsort(scale)[-2 * count :]) == set(slow)
    assert scale[slow].min() > 3 * np.median(scale)


def test_bias_dwarfs_the_rest_of_qwen25_keys() -> None:
    for name, ratio in (("qwen2.5", 605 / 22), ("qwen2.5-middle", 1)):
        k = generate(name, 512).k
        spread = np.sqrt(((k - k.mean(axis=0)) ** 2).sum(axis=1).mean())
        assert np.linalg.norm(k.mean(axis=0)) / spread == pytest.approx(ratio, rel=0.25)


def test_few_channels_of_gemma_are_active() -> None:
    scale = generate("gemma", 512).k.std(axis=0)
    active = (scale > 0.3 * np.sort(scale)[-30]).sum()
    assert 56 <= active <= 2 * 58  # RoPE lends each channel to its partner


def test_other_head_dims_and_errors() -> None:
    assert generate("qwen3", 16, 256).k.shape == (16, 256)
    with pytest.raises(ValueError, match="no set"):
        generate("llama9")
    with pytest.raises(ValueError, match="even"):
        generate("qwen3", 16, 127)
    with pytest.raises(ValueError, match="two tokens"):
        generate("qwen3", 1)


def test_they_tell_the_published_method_from_ours() -> None:
    k = generate("llama3", 256).k
    error = {}
    for mode, scale in (("block", "norm"), ("full", "inner")):
        there = rotate(k, "iso", mode)
        back = rotate(dequantize(quantize(there, 3, scale=scale), 3), "iso", mode)
        error[mode] = ((k - back) ** 2).sum() / (k**2).sum()
    assert error["full"] < 0.04 < 0.15 < error["block"]

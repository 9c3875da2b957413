"""Caches for mlx-lm: blocks as numpy makes them, attention as over what they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.codec import dequantize, quantize, rotation_matrix
from ggufrq.profile import LayerProfile, Profile

mx = pytest.importorskip("mlx.core", reason="needs mlx: pip install 'ggufrq[mlx]'")
pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'ggufrq[mlx]'")

import mlx_lm  # noqa: E402
from mlx_lm.models import base, gemma2, gemma3_text, qwen3  # noqa: E402
from mlx_lm.models import cache as lm  # noqa: E402

import ggufrq.mlx as ours  # noqa: E402
from ggufrq.mlx.codec import Codec  # noqa: E402

F32 = npt.NDArray[np.float32]


def values(shape: Sequence[int], seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_blocks_are_those_of_numpy(bits: int, block: int) -> None:
    rng = np.random.default_rng(bits)
    x = np.concatenate(
        [
            values((100, block)) * 10.0 ** rng.integers(-9, 6, (100, 1)),
            np.exp(4 * values((50, block))),
            values((100, block)) * 2.0 ** rng.integers(-26, -18, (100, 1)),
            rng.integers(-3, 3, (50, block)),
            np.zeros((1, block)),
        ]
    ).astype(np.float32)
    anything = rng.integers(0, 2**32, (200, block), dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, anything])
    x[0, :3] = np.nan, np.inf, -np.inf
    codec = Codec(bits, block)
    blocks = quantize(x, bits, block=block)
    np.testing.assert_array_equal(np.array(codec.encode(mx.array(x))), blocks)
    np.testing.assert_array_equal(
        np.array(codec.decode(mx.array(blocks))), dequantize(blocks, bits, block=block)
    )


def test_one_cache_where_a_model_takes_a_list(dense: Any) -> None:
    model, tokenizer = dense
    with pytest.raises(UsageError, match="keeps K and V of one layer"):
        mlx_lm.generate(model, tokenizer, "A list", max_tokens=1, prompt_cache=ours.RotorQuantCache(bits=3))


def decoded(x: F32, family: Any, bits: int) -> F32:
    """What a cache gives back of x [..., dim]."""
    dim = x.shape[-1]
    size = next(n for n in (256, 128, 64) if dim % n == 0)
    rotation = np.kron(np.eye(dim // size, dtype=np.float32), rotation_matrix(family, "full", size))
    turned = np.array(mx.array(x) @ mx.array(rotation))
    block = 128 if dim % 128 == 0 else 64
    found: F32 = dequantize(quantize(turned, bits, block=block), bits, block=block) @ rotation
    return found


def expected(cache: ours.QuantizedCache, q: F32, k: F32, v: F32, position: int) -> F32:
    """Attention of the query [heads, dim] at a position over K and V [heads, tokens, dim], by the page on
    formats."""
    cells = np.arange(k.shape[1])
    exact = (cells <= position) & (cells > position - cache.recent) | (cells < cache.first)
    seen = cells <= position
    if cache.window is not None:
        seen &= (cells > position - cache.window) | (cells < cache.keep)
    sides = [
        np.where(exact[:, None], x.astype(np.float16), decoded(x, cache.family, bits)).repeat(2, axis=0)
        for x, bits in ((k, cache.bits), (v, cache.v_bits))
    ]
    scores = np.where(seen, np.einsum("hd,hcd->hc", q, sides[0]) * q.shape[1] ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    out: F32 = np.einsum("hc,hcd->hd", weights / weights.sum(axis=1, keepdims=True), sides[1])
    return out


def attended(cache: ours.QuantizedCache, q: F32, k: F32, v: F32, steps: Sequence[int], **mask: Any) -> F32:
    """What mlx-lm's attention makes of [heads, tokens, dim], so many of them at a time."""
    out, at = [], 0
    for step in steps:
        s = slice(at, at + step)
        asked = cache.make_mask(step, **mask)
        stored = cache.update_and_fetch(mx.array(k[None, :, s]), mx.array(v[None, :, s]))
        scale = q.shape[2] ** -0.5
        one = base.scaled_dot_product_attention(
            mx.array(q[None, :, s]), *stored, cache=cache, scale=scale, mask=asked
        )
        out.append(np.array(one)[0])
        at += step
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("array", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize(
    "cache, dims",
    [
        (lambda: ours.IsoQuantCache(bits=3), (128, 128)),
        (lambda: ours.RotorQuantCache(bits=4, v_bits=2), (192, 64)),
        (lambda: ours.PlanarQuantCache(bits=2, recent=0, first=0), (256, 320)),
        (lambda: ours.IsoQuantCache(bits=4, window=70), (64, 64)),
        (lambda: ours.IsoQuantCache(bits=4, window=70, keep=4), (64, 64)),
    ],
    ids=["iso3", "rotor4/rotor2", "planar2", "window", "window with first"],
)
def test_attention_is_that_over_what_blocks_decode_to(
    cache: Any, dims: tuple[int, int], array: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggufrq.mlx.attention.TILE", 48)
    monkeypatch.setattr("ggufrq.mlx.attention.QUERIES", 64)
    steps = [5, 1, 200, 1, 1, 150, 42]
    n = sum(steps)
    q, k, v = values((4, n, dims[0])), values((2, n, dims[0]), 1), values((2, n, dims[1]), 2)
    held = cache()
    found = attended(held, q, k, v, steps, return_array=array)
    for position in (0, 4, 5, 40, 150, 206, 207, 300, n - 1):
        wanted = expected(held, q[:, position], k, v, position)
        np.testing.assert_allclose(found[:, position], wanted, atol=1e-5)


def test_a_window_that_the_model_asks_for() -> None:
    q, k, v = values((4, 120, 64)), values((2, 120, 64), 1), values((2, 120, 64), 2)
    found = attended(ours.IsoQuantCache(bits=4), q, k, v, [90, 1, 29], window_size=20)
    like = ours.IsoQuantCache(bits=4, window=20)
    for position in (0, 50, 90, 91, 119):
        np.testing.assert_allclose(
            found[:, position], expected(like, q[:, position], k, v, position), atol=1e-5
        )


def test_bytes_are_those_of_blocks_and_of_rows() -> None:
    cache = ours.IsoQuantCache(bits=3, v_bits=4)
    x = mx.array(values((1, 2, 512, 128)))
    cache.update_and_fetch(x, x)
    assert cache.nbytes == 2 * 512 * (50 + 66) + 2 * 2 * 2 * (32 + 1) * 128


def test_what_a_window_has_left_behind_is_gone() -> None:
    cache = ours.IsoQuantCache(bits=3, window=100)
    x = values((2, 2000, 64))
    attended(cache, x.repeat(2, axis=0), x, x, [500] * 4)
    assert cache.size() <= 500 + 100 + 256 and not cache.is_trimmable()


def test_tokens_that_were_taken_back_leave_no_trace() -> None:
    q, k, v = values((4, 60, 64)), values((2, 60, 64), 1), values((2, 60, 64), 2)
    other = values((2, 8, 64), 3)
    cache = ours.IsoQuantCache(bits=3, recent=0)
    attended(cache, q[:, :50], k[:, :50], v[:, :50], [50])
    cache.update_and_fetch(mx.array(other[None]), mx.array(other[None]))
    assert lm.can_trim_prompt_cache([cache]) and lm.trim_prompt_cache([cache], 8) == 8
    found = attended(cache, q[:, 50:], k[:, 50:], v[:, 50:], [10])
    for i in range(10):
        np.testing.assert_allclose(found[:, i], expected(cache, q[:, 50 + i], k, v, 50 + i), atol=1e-5)


def some_profile(heads: int, dim: int) -> LayerProfile:
    """Maps of K that stretch some directions, and a mean."""
    rng = np.random.default_rng(5)
    turned = np.linalg.qr(rng.standard_normal((heads, dim, dim)))[0]
    sizes = np.exp(rng.uniform(-1, 1, (heads, dim)))
    maps = [(turned * s[:, None]) @ turned.swapaxes(1, 2) for s in (sizes, 1 / sizes)]
    k_map, q_map = (m.astype(np.float32) for m in maps)
    return LayerProfile(k_map, q_map, 2 * values((heads, dim), 7))


def test_k_is_kept_in_the_metric_of_a_profile(tmp_path: Path) -> None:
    """As a batch of one, saved and read, too."""
    q, k, v = values((4, 90, 64)), values((2, 90, 64), 1), values((2, 90, 64), 2)
    profile = some_profile(2, 64)
    k = k + profile.k_mean[:, None]
    into = [m @ rotation_matrix("iso", "full", 64) for m in profile.k_map]
    back = [rotation_matrix("iso", "full", 64) @ m for m in profile.q_map]
    turned = np.stack([(x - u) @ m for x, u, m in zip(k, profile.k_mean, into, strict=True)])
    blocks = dequantize(quantize(turned, 3, block=64), 3, block=64)
    like = np.stack([x @ m + u for x, m, u in zip(blocks, back, profile.k_mean, strict=True)])
    rows = np.where(np.arange(90)[:, None] > 89 - 4, k.astype(np.float16), like).repeat(2, axis=0)
    rows[:, 0] = k[:, 0].astype(np.float16).repeat(2, axis=0)
    exact = np.arange(90)[:, None] > 89 - 4
    v_rows = np.where(exact, v.astype(np.float16), decoded(v, "iso", 3)).repeat(2, axis=0)
    v_rows[:, 0] = v[:, 0].astype(np.float16).repeat(2, axis=0)
    scores = np.einsum("hd,hcd->hc", q[:, 89], rows) * 64**-0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = np.einsum("hc,hcd->hd", weights / weights.sum(axis=1, keepdims=True), v_rows)

    def filled() -> ours.QuantizedCache:
        cache = ours.IsoQuantCache(bits=3, recent=4, profile=profile)
        attended(cache, q[:, :89], k[:, :89], v[:, :89], [60, 29])
        return cache

    path = str(tmp_path / "prompt.safetensors")
    lm.save_prompt_cache(path, [filled()])
    for cache in (filled(), lm.load_prompt_cache(path)[0], ours.IsoQuantCache.merge([filled()]).extract(0)):
        found = attended(cache, q[:, 89:], k[:, 89:], v[:, 89:], [1])[:, 0]
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    with pytest.raises(UsageError, match="or their profiles"):
        ours.IsoQuantCache.merge([filled(), ours.IsoQuantCache(bits=3, recent=4)])
    with pytest.raises(ModelError, match="for 2 heads of 64 values, and the model has 3 of 64"):
        x = mx.zeros((1, 3, 4, 64))
        ours.IsoQuantCache(profile=profile).update_and_fetch(x, x)


@pytest.fixture(scope="module")
def dense() -> Any:
    return ours.load("docs-qwen3-8m")


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return ours.load("docs-qwen3.5-8m")


TEXT = "The function returns a new array. " * 4


def logits(model: Any, ids: Any, cache: list[Any]) -> F32:
    return np.array(model(ids, cache=cache).astype(mx.float32))


@pytest.mark.parametrize("which", ["dense", "hybrid"])
def test_models_generate_with_it(which: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = request.getfixturevalue(which)
    cache = ours.make_cache(model, bits=4)
    usual = mlx_lm.generate(model, tokenizer, TEXT, max_tokens=8)
    assert mlx_lm.generate(model, tokenizer, TEXT, max_tokens=8, prompt_cache=cache) == usual
    kinds = [type(one).__name__ for one in cache]
    if which == "dense":
        assert kinds == ["IsoQuantCache"] * 8
    else:
        assert kinds == (["ArraysCache"] * 3 + ["IsoQuantCache"]) * 2


def test_a_model_makes_it_by_itself(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dense
    made = []

    def make() -> list[Any]:
        made.append(ours.make_cache(model, bits=3, family="rotor", v_bits=4))
        return made[0]

    monkeypatch.setattr(model, "make_cache", make, raising=False)
    assert mlx_lm.generate(model, tokenizer, TEXT, max_tokens=3)
    assert {(type(one), one.bits, one.v_bits) for one in made[0]} == {(ours.RotorQuantCache, 3, 4)}
    assert all(one.size() > 30 for one in made[0])


def test_a_prompt_cache_is_saved_and_read(hybrid: Any, tmp_path: Path) -> None:
    model, tokenizer = hybrid
    ids = mx.array(tokenizer.encode(TEXT))[None]
    cache = ours.make_cache(model, bits=3, recent=8)
    logits(model, ids, cache)
    path = str(tmp_path / "prompt.safetensors")
    lm.save_prompt_cache(path, cache)
    again = lm.load_prompt_cache(path)
    next_ids = ids[:, :5]
    np.testing.assert_array_equal(logits(model, next_ids, again), logits(model, next_ids, cache))


def test_a_batch_is_served_like_its_sequences_alone(dense: Any) -> None:
    """Sequences of different lengths come, one leaves early and another one joins."""
    model, tokenizer = dense
    ids = tokenizer.encode(TEXT)
    prompts = [ids[:41], ids[:3], ids[5:20]]

    def alone(prompt: list[int], following: list[int]) -> F32:
        cache = ours.make_cache(model, bits=3, recent=8)
        logits(model, mx.array([prompt]), cache)
        return np.concatenate([logits(model, mx.array([[i]]), cache)[0] for i in following])

    def close(found: F32, wanted: F32) -> None:
        assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()  # the model is of bfloat16

    def merged(*some: list[int]) -> list[Any]:
        empty = [ours.make_cache(model, bits=3, recent=8) for _ in some]
        batch = [parts[0].merge(list(parts)) for parts in zip(*empty, strict=True)]
        padding = [max(map(len, some)) - len(one) for one in some]
        for one in batch:
            one.prepare(lengths=[len(one) for one in some], right_padding=padding)
        logits(model, mx.array([[*one, *[0] * pad] for one, pad in zip(some, padding, strict=True)]), batch)
        for one in batch:
            one.finalize()
        return batch

    batch = merged(*prompts[:2])
    first = logits(model, mx.array([[7], [8]]), batch)
    for one, other in zip(batch, merged(prompts[2]), strict=True):
        one.extend(other)
    second = logits(model, mx.array([[9], [10], [11]]), batch)
    for one in batch:
        one.filter([1, 2])
    third = logits(model, mx.array([[12], [13]]), batch)
    last = [one.extract(1) for one in batch]
    fourth = logits(model, mx.array([[14]]), last)
    close(np.stack([first[0, 0], second[0, 0]]), alone(prompts[0], [7, 9]))
    close(np.stack([first[1, 0], second[1, 0], third[0, 0]]), alone(prompts[1], [8, 10, 12]))
    close(np.stack([second[2, 0], third[1, 0], fourth[0, 0]]), alone(prompts[2], [11, 13, 14]))


def test_mlx_lm_generates_for_a_batch(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dense
    monkeypatch.setattr(model, "make_cache", lambda: ours.make_cache(model, bits=4), raising=False)
    ids = tokenizer.encode(TEXT)
    found = mlx_lm.batch_generate(model, tokenizer, [ids, ids[:9]], max_tokens=4).texts
    usual = [mlx_lm.generate(model, tokenizer, one, max_tokens=4) for one in (ids, ids[:9])]
    assert [text.strip() for text in found] == [text.strip() for text in usual]


@pytest.mark.parametrize(
    "wrong", [{"bits": 6}, {"bits": 3, "v_bits": 1}, {"recent": -1}, {"family": "plain"}], ids=str
)
def test_arguments_without_sense(dense: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ours.make_cache(dense[0], **wrong)


def test_a_profile_is_that_of_the_file(dense: Any, tmp_path: Path) -> None:
    model, tokenizer = dense
    heads, dim = model.args.num_key_value_heads, model.args.head_dim
    layers = {il: some_profile(heads, dim) for il in (0, 5)}
    Profile("0" * 16, "weights", 64, layers).write(tmp_path / "some-kv.gguf")
    cache = ours.make_cache(model, bits=4, profile=tmp_path / "some-kv.gguf")
    assert [one.state[16] is not None for one in cache] == [il in (0, 5) for il in range(8)]
    usual = mlx_lm.generate(model, tokenizer, TEXT, max_tokens=4)
    assert mlx_lm.generate(model, tokenizer, TEXT, max_tokens=4, prompt_cache=cache) == usual


@pytest.mark.parametrize(
    "options, said",
    [
        ({"profile": "weights"}, "not known where the model's weights are"),
        ({"profile": "none-kv.gguf"}, "none-kv.gguf"),
        ({"metal": True}, "GPU of a Mac"),
    ],
    ids=str,
)
def test_what_a_model_cannot_have(options: dict[str, Any], said: str) -> None:
    if "metal" in options and mx.metal.is_available():
        pytest.skip("this is a Mac")
    args = gemma3_text.ModelArgs("gemma3_text", 64, 2, 64, 2, 64, vocab_size=50, num_key_value_heads=1)
    with pytest.raises((ModelError, UsageError), match=said):
        ours.make_cache(gemma3_text.Model(args), **options)


def test_heads_that_64_does_not_divide() -> None:
    x = mx.zeros((1, 2, 4, 80))
    with pytest.raises(ModelError, match="heads of 80 values"):
        ours.IsoQuantCache().update_and_fetch(x, x)


def test_a_model_with_an_attention_of_its_own() -> None:
    args = gemma2.ModelArgs("gemma2", 64, 2, 64, 2, 64, 1e-6, 100, 1)
    with pytest.raises(
        ModelError, match="gemma2 cannot read caches of ggufrq: it has an attention of its own"
    ):
        ours.make_cache(gemma2.Model(args))


def test_max_kv_size_is_for_models_without_caches_of_their_own(dense: Any) -> None:
    assert isinstance(dense[0], qwen3.Model)
    cache = ours.make_cache(dense[0], max_kv_size=64)[0]
    assert (cache.window, cache.keep, cache.first) == (60, 4, 4)


def test_a_cache_of_another_kind_in_the_model() -> None:
    class Model(SimpleNamespace):
        def modules(self) -> list[Any]:
            return []

        def make_cache(self) -> list[Any]:
            return [lm.ChunkedKVCache(8)]

    with pytest.raises(ModelError, match="ChunkedKVCache"):
        ours.make_cache(Model(model_type="some"))


def test_a_model_with_windows_sees_what_it_saw_in_the_caches_of_mlx_lm() -> None:
    """With all tokens exact nothing is lost but what 16 bits lose, so that masks and positions show alone."""
    args = gemma3_text.ModelArgs(
        "gemma3_text", 64, 4, 64, 2, 64, vocab_size=50, num_key_value_heads=1, sliding_window=24,
        sliding_window_pattern=2,
    )  # fmt: skip
    mx.random.seed(1)
    model = gemma3_text.Model(args)
    ids = mx.random.randint(0, 50, (1, 400))
    usual, cache = model.make_cache(), ours.make_cache(model, recent=1000)
    assert [one.window for one in cache] == [24, None, 24, None]
    at = 0
    for step in (7, 1, 150, 1, 1, 200, 38, 1, 1):
        wanted, found = (logits(model, ids[:, at : at + step], one) for one in (usual, cache))
        np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max())
        at += step
    assert at == 400 and cache[0].size() < 24 + 256 + 38


@pytest.mark.parametrize("recent", [0, 8])
def test_a_batch_with_windows_is_served_like_its_sequences_alone(recent: int) -> None:
    """The first prompt comes in two pieces, the second time with padding behind all but the longest; then
    tokens one by one, until cells have left the windows."""
    args = gemma3_text.ModelArgs(
        "gemma3_text", 64, 2, 64, 2, 64, vocab_size=50, num_key_value_heads=1, sliding_window=24,
        sliding_window_pattern=2,
    )  # fmt: skip
    mx.random.seed(1)
    model = gemma3_text.Model(args)
    ids = np.random.default_rng(1).integers(1, 50, (3, 420))
    lengths = [400, 7, 380]
    alone = []
    for one, length in zip(ids, lengths, strict=True):
        cache = ours.make_cache(model, recent=recent)
        logits(model, mx.array(one[None, :length]), cache)
        alone.append(
            [logits(model, mx.array(one[None, i : i + 1]), cache)[0, 0] for i in range(length, length + 6)]
        )
    empty = [ours.make_cache(model, recent=recent) for _ in lengths]
    batch = [parts[0].merge(list(parts)) for parts in zip(*empty, strict=True)]
    padding = [400 - length for length in lengths]
    for part in batch:
        part.prepare(lengths=lengths, right_padding=padding)
    for at in (slice(0, 300), slice(300, 400)):
        logits(model, mx.array(ids[:, at]), batch)
    for part in batch:
        part.finalize()
    assert np.array(batch[0].offset).tolist() == lengths
    for i in range(6):
        following = [[int(one[length + i])] for one, length in zip(ids, lengths, strict=True)]
        found = logits(model, mx.array(following), batch)[:, 0]
        wanted = np.stack([one[i] for one in alone])
        assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert batch[0].size() < 300


def test_one_query_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of it, and what becomes of its parts; tests/metal runs its body, here codes in mx do."""
    from ggufrq.mlx import kernel

    asked = []

    def play() -> Any:
        def run(*, inputs: Any, template: Any, output_shapes: Any, **_: Any) -> Any:
            of = dict(template)
            q, k, v, places, *_ = (x.tolist() if i == 3 else x for i, x in enumerate(inputs))
            asked.append((places, of["PARTS"]))
            heads, share = of["HEADS"], of["SHARE"]
            k, v = (
                Codec(of[f"{side}_BITS"], of[f"{side}_BLOCK"]).decode(x) for side, x in (("K", k), ("V", v))
            )
            k, v = (
                x.reshape(-1, *x.shape[2:])
                for x in (mx.repeat(k, share, axis=1), mx.repeat(v, share, axis=1))
            )
            values, sums = [], []
            count = -(-(places[1] - places[0]) // of["PARTS"])
            for part in range(of["PARTS"]):
                cells = slice(places[0] + part * count, min(places[0] + (part + 1) * count, places[1]))
                scores = (k[:, cells] @ q[:, :, None])[..., 0]
                largest = scores.max(axis=1, keepdims=True)
                weights = mx.exp(scores - largest)
                values.append((weights[:, None] @ v[:, cells])[:, 0])
                sums.append(mx.concatenate([largest, weights.sum(axis=1, keepdims=True)], axis=1))
            assert heads * 1 == q.shape[0]
            return mx.stack(values, axis=1), mx.stack(sums, axis=1)

        return run

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(kernel, "_kernel", play)
    q, k, v = values((4, 300, 128)), values((2, 300, 128), 1), values((2, 300, 128), 2)
    for options in ({}, {"recent": 0, "first": 0}, {"window": 100, "recent": 8}):
        asked.clear()
        cache = ours.IsoQuantCache(bits=3, v_bits=4, metal=True, **options)
        like = ours.IsoQuantCache(bits=3, v_bits=4, **options)
        steps = [298, 1, 1]
        np.testing.assert_allclose(attended(cache, q, k, v, steps), attended(like, q, k, v, steps), atol=1e-5)
        assert len(asked) == 2 and asked[-1][1] > (0 if options.get("window") else 1)


def test_drafts_are_taken_back(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dense
    monkeypatch.setattr(model, "make_cache", lambda: ours.make_cache(model, bits=4), raising=False)
    usual = mlx_lm.generate(model, tokenizer, TEXT, max_tokens=8)
    assert mlx_lm.generate(model, tokenizer, TEXT, max_tokens=8, draft_model=model) == usual


def test_k_and_v_are_never_dense_as_a_whole() -> None:
    cache = ours.IsoQuantCache(bits=3)
    x = mx.array(values((1, 2, 256, 128)))
    for _ in range(64):
        cache.update_and_fetch(x, x)
        mx.eval(cache.state)
    one = x[:, :, :1]
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    stored = cache.update_and_fetch(one, one)
    mx.eval(base.scaled_dot_product_attention(one, *stored, cache=cache, scale=0.1, mask=None))
    dense = 2 * 2 * 64 * 256 * 128 * 4
    assert mx.get_peak_memory() - before < dense / 4

"""Profiles from the weights of small models: that each kind of layer is read as llama.cpp reads it.

What is expected is computed here position by position, from a plain description of the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from attention_models import BIASES, DIM, FUSED, HEADS, KV_HEADS, QK_NORM, SPLIT, WIDTH, numbers, write

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.profile import LayerProfile, profile_from_weights
from ggufrq.profile.solve import solve

F64 = npt.NDArray[np.float64]
Tensors = dict[str, F64]

N = 24
GROUP = HEADS // KV_HEADS
PLAIN = 100.0 ** (-2 * np.arange(DIM // 2) / DIM)


@dataclass
class Expected:
    """A layer in words: how its heads are turned and normed."""

    pairing: str = "norm"
    theta: F64 = field(default_factory=lambda: PLAIN)
    scale: float = 1.0
    norm: str = "attn_norm"
    layer_norm: bool = False
    qk: str = ""  # "", "rms", "layer", "whole"
    after: bool = False
    gated: bool = False
    mean: bool = False


def turn(p: int, e: Expected) -> F64:
    matrix = np.eye(DIM)
    for j, angle in enumerate(e.theta):
        a, b = (2 * j, 2 * j + 1) if e.pairing == "norm" else (j, j + len(e.theta))
        c, s = e.scale * math.cos(p * angle), e.scale * math.sin(p * angle)
        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def moments(t: Tensors, il: int, letter: str, e: Expected) -> tuple[F64, F64]:
    """Mean and second moment of each head behind RoPE, averaged over N positions."""
    heads = HEADS if letter == "q" else KV_HEADS
    block = f"blk.{il}."
    if f"{block}attn_{letter}.weight" in t:
        rows = t[f"{block}attn_{letter}.weight"].reshape(heads, -1, WIDTH)[:, :DIM]
        bias = t.get(f"{block}attn_{letter}.bias", np.zeros(heads * DIM)).reshape(heads, DIM)
    else:
        first = 0 if letter == "q" else HEADS * DIM
        rows = t[f"{block}attn_qkv.weight"][first : first + heads * DIM].reshape(heads, DIM, WIDTH)
        whole = t.get(f"{block}attn_qkv.bias", np.zeros(len(t[f"{block}attn_qkv.weight"])))
        bias = whole[first : first + heads * DIM].reshape(heads, DIM)
        bias = t.get(f"{block}attn_{letter}.bias", bias.reshape(-1)).reshape(heads, DIM)
    weight = t.get(f"{block}{e.norm}.weight", np.ones(WIDTH))
    offset = t.get(f"{block}{e.norm}.bias", np.zeros(WIDTH))
    inputs = np.eye(WIDTH) - (1 / WIDTH if e.layer_norm else 0)
    mean = bias + rows @ offset
    second = np.stack([r * weight @ inputs @ (r * weight).T for r in rows])
    second = second + np.einsum("hi,hj->hij", mean, mean)
    turns = [turn(p, e) for p in range(N)]

    def norm(mean: F64, second: F64) -> tuple[F64, F64]:
        if not e.qk:
            return mean, second
        if e.qk == "layer":
            take = np.eye(DIM) - 1 / DIM
            mean, second = mean @ take, take @ second @ take
        square = np.trace(second, axis1=1, axis2=2) / DIM
        square = np.full(heads, square.mean()) if e.qk == "whole" else square
        w = t.get(f"{block}attn_{letter}_norm.weight", np.ones(DIM))
        w = (w.reshape(heads, DIM) if e.qk == "whole" else w) / np.sqrt(square)[:, None]
        return mean * w, second * w[:, :, None] * w[:, None, :]

    if not e.after:
        mean, second = norm(mean, second)
    mean, second = (
        np.mean([mean @ r.T for r in turns], axis=0),
        np.mean([r @ second @ r.T for r in turns], axis=0),
    )
    return norm(mean, second) if e.after else (mean, second)


def check(found: LayerProfile, k: tuple[F64, F64], q: F64, *, mean: bool) -> None:
    first, second = k
    if mean:
        assert found.k_mean is not None
        assert np.allclose(found.k_mean, first, atol=1e-5)
        second = second - np.einsum("hi,hj->hij", first, first)
    else:
        assert found.k_mean is None
    metric = solve(second, q)
    assert np.allclose(found.k_map, metric.forward, atol=2e-4 * np.abs(metric.forward).max())
    assert np.allclose(found.q_map, metric.inverse, atol=2e-4 * np.abs(metric.inverse).max())


def grouped(second: F64) -> F64:
    return second.reshape(KV_HEADS, GROUP, DIM, DIM).mean(axis=1)


def layer_norm_numbers(**more: Any) -> dict[str, Any]:
    return numbers(attention__layer_norm_epsilon=1e-5, attention__layer_norm_rms_epsilon=None, **more)


def yarn(factor: float, original: int, fast: float = 32.0) -> tuple[F64, float]:
    """ggml's rope_yarn with ext_factor 1, pair by pair."""
    theta = []
    low = math.floor(DIM * math.log(original / (fast * 2 * math.pi)) / (2 * math.log(100.0)))
    high = math.ceil(DIM * math.log(original / (2 * math.pi)) / (2 * math.log(100.0)))
    low, high = max(0, low), min(DIM - 1, high)
    for j, angle in enumerate(PLAIN):
        ramp = 1 - min(1, max(0, (j - low) / max(0.001, high - low)))
        theta.append(angle / factor * (1 - ramp) + angle * ramp)
    return np.array(theta), 1 + 0.1 * math.log(factor)


YARN, YARN_SCALE = yarn(4.0, 400)
LONG = np.array([1.0, 2.0, 3.0, 4.0])
HALF = 100.0 ** (-2 * np.arange(2) / 4)
NOTHING = np.zeros(0)
LOCAL = 10.0 ** (-2 * np.arange(DIM // 2) / DIM)
HEAD_NORMS = {"attn_q_norm.weight": (HEADS, DIM), "attn_k_norm.weight": (KV_HEADS, DIM)}
WIDE_NORMS = {"attn_q_norm.weight": (HEADS * DIM,), "attn_k_norm.weight": (KV_HEADS * DIM,)}
GATED = {**SPLIT, **QK_NORM, "attn_q.weight": (2 * HEADS * DIM, WIDTH)}
WIDE = {**SPLIT, **WIDE_NORMS}
BOTH_BIAS = {"attn_norm.bias": (WIDTH,)}
QKV_BIAS = {"attn_qkv.bias": ((HEADS + 2 * KV_HEADS) * DIM,)}

CASES: dict[str, tuple[str, dict[str, Any], list[Any], dict[str, Any], dict[int, Expected]]] = {
    "llama": ("llama", numbers(), [SPLIT] * 2, {}, {0: Expected(), 1: Expected()}),
    "llama 3's factors": (
        "llama", numbers(), [SPLIT], {"rope_freqs.weight": LONG}, {0: Expected(theta=PLAIN / LONG)},
    ),
    "linear": (
        "llama", numbers(rope__scaling__type="linear", rope__scaling__factor=8.0), [SPLIT], {},
        {0: Expected(theta=PLAIN / 8)},
    ),
    "yarn": (
        "qwen2",
        numbers(
            rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=400
        ),
        [{**SPLIT, **BIASES}], {},
        {0: Expected("neox", YARN, YARN_SCALE, mean=True)},
    ),
    "yarn, partial": (
        "glm4moe",
        numbers(
            rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__dimension_count=4,
            rope__scaling__original_context_length=8,
        ),
        [SPLIT], {}, {0: Expected("neox", HALF / np.array([1, 4]), YARN_SCALE)},
    ),
    "longrope, long": (
        "phi3", numbers(rope__scaling__original_context_length=16, rope__scaling__attn_factor=1.2), [FUSED],
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": LONG / 2},
        {0: Expected("neox", PLAIN / LONG, 1.2)},
    ),
    "longrope, short": (
        "phi3", numbers(rope__scaling__original_context_length=64), [FUSED],
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": LONG / 2},
        {0: Expected("neox", PLAIN / LONG * 2)},
    ),
    "biases": ("qwen2", numbers(), [{**SPLIT, **BIASES}], {}, {0: Expected("neox", mean=True)}),
    "biases, sinks": (
        "gpt-oss", numbers(), [{**SPLIT, **BIASES, "attn_sinks.weight": (HEADS,)}], {}, {0: Expected("neox")},
    ),
    "biases, capped": (
        "qwen2", numbers(attn_logit_softcapping=30.0), [{**SPLIT, **BIASES}], {}, {0: Expected("neox")},
    ),
    "fused, LayerNorm, biases, partial": (
        "gptneox", layer_norm_numbers(rope__dimension_count=4), [{**FUSED, **BOTH_BIAS, **QKV_BIAS}], {},
        {0: Expected("neox", HALF, layer_norm=True, mean=True)},
    ),
    "fused, three biases": ("qwen", numbers(), [{**FUSED, **BIASES}], {}, {0: Expected("neox", mean=True)}),
    "falcon's second norm": (
        "falcon", layer_norm_numbers(),
        [{**FUSED, **BOTH_BIAS, "attn_norm_2.weight": (WIDTH,), "attn_norm_2.bias": (WIDTH,)}], {},
        {0: Expected("neox", norm="attn_norm_2", layer_norm=True, mean=True)},
    ),
    "QK-norm": ("qwen3", numbers(), [{**SPLIT, **QK_NORM}], {}, {0: Expected("neox", qk="rms")}),
    "QK-norm and bias": (
        "qwen3", numbers(), [{**SPLIT, **BIASES, **QK_NORM}], {}, {0: Expected("neox", qk="rms", mean=True)},
    ),
    "QK-norm behind RoPE": (
        "hunyuan-dense", numbers(), [{**SPLIT, **QK_NORM}], {}, {0: Expected("neox", qk="rms", after=True)},
    ),
    "QK-norm over all heads, no norm before": (
        "olmo2", numbers(), [{k: v for k, v in WIDE.items() if k != "attn_norm.weight"}], {},
        {0: Expected("neox", qk="whole")},
    ),
    "QK-norm without weights": (
        "llama4", numbers(expert_count=16), [{**SPLIT, **BIASES}] * 4, {},
        {0: Expected(qk="rms", mean=True), 3: Expected(theta=NOTHING, mean=True)},
    ),
    "QK-norm of fewer experts": (
        "llama4", numbers(expert_count=128), [{**SPLIT, **BIASES}], {}, {0: Expected(mean=True)},
    ),
    "LayerNorm of heads": (
        "command-r", layer_norm_numbers(), [{**SPLIT, **HEAD_NORMS}], {},
        {0: Expected(layer_norm=True, qk="layer")},
    ),
    "query and gate, delta net": (
        "qwen35",
        numbers(rope__dimension_count=4, full_attention_interval=2, rope__dimension_sections=[1, 1, 0, 0]),
        [{"attn_norm.weight": (WIDTH,), "attn_qkv.weight": (96, WIDTH), "ssm_a": (4,)}, GATED], {},
        {1: Expected("neox", HALF, qk="rms", gated=True)},
    ),
    "windows with a base of their own": (
        "gemma3",
        numbers(attention__sliding_window=64, attention__sliding_window_pattern=2, rope__freq_base_swa=10.0,
                rope__scaling__factor=8.0),
        [{**SPLIT, **QK_NORM}] * 2, {},
        {0: Expected("neox", LOCAL, qk="rms"), 1: Expected("neox", PLAIN / 8, qk="rms")},
    ),
    "every fourth without RoPE": (
        "smollm3", numbers(), [SPLIT] * 4, {}, {0: Expected(), 2: Expected(), 3: Expected(theta=NOTHING)},
    ),
    "only windows with RoPE": (
        "cohere2", layer_norm_numbers(attention__sliding_window=64, attention__sliding_window_pattern=2),
        [SPLIT] * 2, {}, {0: Expected(layer_norm=True), 1: Expected(layer_norm=True, theta=NOTHING)},
    ),
    "no RoPE": ("gpt2", layer_norm_numbers(), [FUSED], {}, {0: Expected(theta=NOTHING, layer_norm=True)}),
    "RoPE off": (
        "granitehybrid", numbers(rope__scaling__finetuned=False), [SPLIT], {}, {0: Expected(theta=NOTHING)},
    ),
    "a list of layers without RoPE": (
        "granite_swa", numbers(attention__rope_pattern=[1, 0]), [SPLIT] * 2, {},
        {0: Expected(), 1: Expected(theta=NOTHING)},
    ),
    "a number where llama.cpp reads a list": (
        "granite_swa", numbers(attention__rope_pattern=0), [SPLIT], {}, {0: Expected()},
    ),
    "several axes": (
        "glm4", numbers(rope__dimension_sections=[2, 1, 1, 0]), [SPLIT], {}, {0: Expected("neox")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_layer(name: str, tmp_path: Path) -> None:
    architecture, values, layers, extra, expected = CASES[name]
    tensors = write(tmp_path / "model.gguf", architecture, values, layers, extra)
    profile = profile_from_weights(tmp_path / "model.gguf", N)
    assert set(expected) <= profile.layers.keys()
    assert profile.layers.keys() == {i for i, layer in enumerate(layers) if "ssm_a" not in layer}
    for il, e in expected.items():
        k, (_, q) = moments(tensors, il, "k", e), moments(tensors, il, "q", e)
        check(profile.layers[il], k, grouped(q), mean=e.mean)


def test_layers_that_read_the_k_of_another(tmp_path: Path) -> None:
    """Gemma 4: the last two layers have queries only; windows have a base of their own and no factors."""
    values = numbers(
        attention__sliding_window=64,
        attention__sliding_window_pattern=[True, False, True, False],
        attention__shared_kv_layers=2,
        attention__key_length_swa=DIM,
        rope__freq_base_swa=10.0,
    )
    queries = {k: v for k, v in {**SPLIT, **QK_NORM}.items() if "attn_k" not in k}
    layers = [{**SPLIT, **QK_NORM}] * 2 + [queries] * 2
    tensors = write(tmp_path / "model.gguf", "gemma4", values, layers, {"rope_freqs.weight": LONG})
    profile = profile_from_weights(tmp_path / "model.gguf", N)
    assert profile.layers.keys() == {0, 1}
    for il, e in {0: Expected("neox", LOCAL, qk="rms"), 1: Expected("neox", PLAIN / LONG, qk="rms")}.items():
        q = [grouped(moments(tensors, user, "q", e)[1]) for user in (il, il + 2)]
        check(profile.layers[il], moments(tensors, il, "k", e), np.mean(q, axis=0), mean=False)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_quantized_weights_give_nearly_the_same(kind: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "model.gguf", "llama", numbers(), [SPLIT])
    exact = profile_from_weights(tmp_path / "model.gguf", N).layers[0].k_map
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    for key, value in numbers().items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    number = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        plain = tensor.astype(np.float32)
        if "norm" in name:
            writer.add_tensor(name, plain)
        else:
            writer.add_tensor(name, gguf.quants.quantize(plain, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = profile_from_weights(tmp_path / "small.gguf", N)
    assert (
        np.abs(found.layers[0].k_map - exact).max() < (0.15 if kind == "Q4_0" else 0.02) * np.abs(exact).max()
    )
    assert found.model == profile_from_weights(tmp_path / "model.gguf", N).model


def test_the_model_is_named_as_its_calibration_names_it(tmp_path: Path) -> None:
    for seed, architecture in ((1, "llama"), (2, "qwen3")):
        write(
            tmp_path / "model.gguf",
            architecture,
            numbers(),
            [SPLIT],
            {"output_norm.weight": np.arange(WIDTH) + seed},
        )
        profile = profile_from_weights(tmp_path / "model.gguf", N)
        assert profile.model == fingerprint(tmp_path / "model.gguf")
        assert (profile.source, profile.n_ctx) == ("weights", N)


def test_progress_and_the_context_by_default(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "llama", numbers(), [SPLIT] * 3)
    told: list[tuple[int, int]] = []
    profile = profile_from_weights(
        tmp_path / "model.gguf", progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert profile.n_ctx == 512
    write(tmp_path / "model.gguf", "llama", numbers(context_length=1 << 20), [SPLIT])
    assert profile_from_weights(tmp_path / "model.gguf").n_ctx == 32768


def test_shards(tmp_path: Path) -> None:
    """Any of them names the model; the headers of the others have tensors only."""
    tensors = write(tmp_path / "model.gguf", "llama", numbers(), [SPLIT] * 2)
    whole = profile_from_weights(tmp_path / "model.gguf", N)
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", "llama", split_max_tensors=4)
    writer.add_uint32("llama.block_count", 2)
    for key, value in numbers().items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file(tmp_path / "split.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for part in sorted(tmp_path.glob("split-*.gguf")):
        found = profile_from_weights(part, N)
        assert found.model == whole.model
        assert all(np.array_equal(found.layers[il].k_map, whole.layers[il].k_map) for il in range(2))
    (tmp_path / "split-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match=r"split-00002-of-00002\.gguf is missing"):
        profile_from_weights(tmp_path / "split-00001-of-00002.gguf", N)


def test_heads_that_differ_by_layer(tmp_path: Path) -> None:
    one = {**SPLIT, "attn_q.weight": (2 * DIM, WIDTH), "attn_k.weight": (DIM, WIDTH)}
    values = numbers(attention__head_count=[HEADS, 2, 0], attention__head_count_kv=[KV_HEADS, 1, 0])
    write(tmp_path / "model.gguf", "deci", values, [SPLIT, one, {"ffn_norm.weight": (WIDTH,)}])
    profile = profile_from_weights(tmp_path / "model.gguf", N)
    assert [profile.layers[il].k_map.shape for il in profile.layers] == [(KV_HEADS, DIM, DIM), (1, DIM, DIM)]


def test_layers_that_are_run_through_again(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "nanbeige", numbers(num_loops=2), [SPLIT] * 2)
    profile = profile_from_weights(tmp_path / "model.gguf", N)
    assert list(profile.layers) == [0, 1, 2, 3]
    assert np.array_equal(profile.layers[0].k_map, profile.layers[2].k_map)


@pytest.mark.parametrize(
    ("architecture", "more", "parts", "why"),
    [
        ("deepseek2", {"attention__kv_lora_rank": 16}, SPLIT, "MLA"),
        ("minicpm3", {}, {**SPLIT, "attn_kv_a_mqa.weight": (DIM, WIDTH)}, "MLA"),
        ("newest", {}, SPLIT, "not known which channels RoPE turns together in newest"),
        ("mamba", {}, SPLIT, "keeps no K and V"),
        ("llama", {}, {"attn_norm.weight": (WIDTH,)}, "has no tensor blk.0.attn_qkv"),
        ("llama", {"attention__head_count": 8}, SPLIT, "32 rows, not 8 heads of 8"),
        ("llama", {}, {**FUSED, "attn_qkv.weight": (40, WIDTH)}, "40 rows, not 2 heads of 8"),
        ("llama", {"attention__head_count": 3}, {**SPLIT, "attn_q.weight": (24, WIDTH)}, "3 heads of q"),
    ],
)  # fmt: skip
def test_what_no_profile_is_made_from(
    architecture: str, more: dict[str, Any], parts: dict[str, Any], why: str, tmp_path: Path
) -> None:
    write(tmp_path / "model.gguf", architecture, numbers(**more), [parts])
    with pytest.raises(ModelError, match=why):
        profile_from_weights(tmp_path / "model.gguf", N)


def test_a_damaged_model_and_no_positions(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    write(model, "llama", numbers(), [SPLIT])
    with pytest.raises(UsageError, match="0 positions"):
        profile_from_weights(model, 0)
    model.write_bytes(model.read_bytes()[:-6000])
    with pytest.raises(ModelError, match="is damaged: it ends within"):
        profile_from_weights(model, N)
    with pytest.raises(ModelError, match="missing"):
        profile_from_weights(tmp_path / "none.gguf")

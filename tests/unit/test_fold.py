"""Folding without llama.cpp: facts, changes, the copy of a model with changes, and the matrix that goes with
it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import random_models
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import TensorInfo, read_header
from ggufrq.make.fold import awq, fold_file, imatrix, kv
from ggufrq.make.fold.changes import Change, as_type
from ggufrq.make.fold.facts import Heads, architecture_of, architectures, heads, pairs
from ggufrq.make.fold.folding import Folding, per_kv_head, per_query_head, scaled
from ggufrq.make.fold.weights import Weights, write_changed
from ggufrq.profile.solve import RIDGE

TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tuple(f"t{i}" for i in range(64))}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_models.write("qwen2", tmp_path / "model.gguf", TOKENS)


def infos(*names: str) -> list[TensorInfo]:
    return [TensorInfo(name, (8, 8), 0, 0) for name in names]


@pytest.mark.parametrize("name", random_models.LAYERS)
def test_every_norm_with_readers_and_every_product_is_in_a_pair(name: str, tmp_path: Path) -> None:
    path = random_models.write(name, tmp_path / "model.gguf", TOKENS)
    header = read_header(path)
    found = pairs(architecture_of(header.values, path.name), header.tensors)
    sources = {pair.source for pair in found}
    for tensor in header.tensors:
        part = tensor.name.partition(".weight")[0].rpartition(".")[2]
        if part in ("attn_norm", "ffn_norm", "attn_v", "ffn_up", "ffn_up_exps", "ffn_up_shexp"):
            assert tensor.name in sources
    readers = [reader for pair in found if not pair.rule.rows for reader in pair.readers]
    assert len(readers) == len(set(readers))


def test_every_architecture_is_tested() -> None:
    assert {name.partition("-")[0] for name in random_models.LAYERS} == architectures().keys()


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(ModelError, match="does not know what reads what in deepseek2; it knows llama, "):
        architecture_of({"general.architecture": "deepseek2"}, "model.gguf")
    folded = {"general.architecture": "llama", "ggufrq.fold": "awq"}
    with pytest.raises(ModelError, match=r"model\.gguf is folded already \(awq\)"):
        architecture_of(folded, "model.gguf")
    clamped = {"general.architecture": "llama", "llama.attention.clamp_kqv": 8.0}
    with pytest.raises(ModelError, match=r"it clamps values \(llama\.attention\.clamp_kqv\)"):
        architecture_of(clamped, "model.gguf")
    llama = architectures()["llama"]
    with pytest.raises(ModelError, match=r"does not know what blk\.0\.attn_new\.weight of llama reads"):
        pairs(llama, infos("blk.0.attn_norm.weight", "blk.0.attn_new.weight"))
    with pytest.raises(ModelError, match=r"does not know what blk\.0\.ffn_up_exps\.bias of llama reads"):
        pairs(llama, infos("blk.0.ffn_up_exps.bias"))
    with pytest.raises(ModelError, match="nothing to fold: no pair of tensors of llama"):
        pairs(llama, infos("blk.0.attn_norm.weight", "output_norm.weight"))
    with pytest.raises(UsageError, match="for quantized types; F16 keeps the weights"):
        fold_file.check_types("awq", {"a": "f16", "b": "f32"}, "F16")


def test_a_norm_is_left_alone_when_a_reader_is_missing_or_there_is_another() -> None:
    names = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"]
    every = infos(*(f"blk.0.{name}.weight" for name in names))
    qwen = architectures()["qwen35"]
    assert [pair.rule.name for pair in pairs(qwen, every)] == ["attention", "values"]
    assert [pair.rule.name for pair in pairs(qwen, every[:2] + every[3:])] == ["values"]
    assert [pair.rule.name for pair in pairs(qwen, [*every, *infos("blk.0.attn_gate.weight")])] == ["values"]


def test_a_pair_cancels() -> None:
    """Norm, products and heads, in numpy: what the readers give is what it was."""
    rng = np.random.default_rng(1)
    change = Change(rows=np.exp(rng.standard_normal((2, 6))), columns=np.exp(rng.standard_normal((1, 4))))
    weight = rng.standard_normal((2, 6, 4)).astype(np.float32)
    for expert in range(2):
        whole = change.apply(weight[expert], expert, 0)
        assert np.allclose(whole / change.rows[expert][:, None] / change.columns[0], weight[expert])
        assert np.array_equal(change.apply(weight[expert][2:5], expert, 2), whole[2:5])


def test_changes_add_up() -> None:
    two, three = np.full((1, 4), 2.0), np.full((1, 4), 3.0)
    both = Change(columns=two).then(Change(columns=three, rows=two))
    assert np.array_equal(both.columns, two * three) and np.array_equal(both.rows, two)
    with pytest.raises(ModelError, match="a value of 100000 after folding"):
        as_type(np.array([1e5], np.float32), "f16", "x.weight")


def test_heads_share_the_factors_of_v() -> None:
    shape = Heads(queries=4, kv=2, k_dim=3, v_dim=3, rotated=3)
    factors = np.arange(6.0).reshape(1, 6)
    spread = per_query_head(factors, shape)
    assert spread.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]]
    assert np.array_equal(per_kv_head(spread, shape), factors)


def test_channels_that_rope_turns_together() -> None:
    assert kv.rope_partner(Heads(1, 1, 8, 8, 8), "neox").tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert kv.rope_partner(Heads(1, 1, 8, 8, 8), "norm").tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert kv.rope_partner(Heads(1, 1, 8, 8, 4), "neox").tolist() == [2, 3, 0, 1, 4, 5, 6, 7]


@given(arrays(np.float64, (2, 2, 8), elements=st.floats(1e-3, 1e3)), st.booleans())
def test_no_factors_of_pairs_are_better(powers: np.ndarray, shared: bool) -> None:
    """The product of what a code loses and of what queries make of it, against factors nearby."""
    k, q = powers
    partner = kv.rope_partner(Heads(2, 2, 8, 8, 8), "neox")
    best, gain = kv.pair_factors(k, q, partner, shared=shared)
    assert gain >= 1 - 1e-9 and np.allclose(np.log(best).mean(axis=1), 0)
    assert np.array_equal(best, best[:, partner])
    assert not shared or np.array_equal(best[0], best[1])

    if shared:
        k, q = (np.repeat(power.mean(axis=0, keepdims=True), 2, axis=0) for power in (k, q))
    k, q = (power + RIDGE * power.mean(axis=1, keepdims=True) for power in (k, q))

    def cost(factors: np.ndarray) -> float:
        return float((np.square(factors) * k).sum(axis=1) @ (q / np.square(factors)).sum(axis=1))

    rng = np.random.default_rng(4)
    for _ in range(8):
        other = np.exp(0.3 * rng.standard_normal(best.shape))
        other = best * np.sqrt(other * other[:, partner])
        if shared:
            other[1] = other[0]
        for head in range(1 if shared else 2):
            one = best.copy()
            one[head] = other[head]
            one = one if not shared else other
            assert cost(best) <= cost(one) * (1 + 1e-9)


def test_what_is_planted_in_the_norms_is_found(model: Path, tmp_path: Path) -> None:
    """A channel of K that is large and one of Q that is: the fold makes both alike."""
    path = random_models.write("gemma3", tmp_path / "gemma.gguf", TOKENS)
    with Weights(path) as weights:
        shape = heads(weights.header, 0)
        channels = np.ones((1, shape.k_dim))
        channels[0, [3, 3 + shape.k_dim // 2]] = 64.0
        planted = {"blk.0.attn_k_norm.weight": Change(columns=channels)}
        write_changed(weights, tmp_path / "planted.gguf", planted, {})
    with Weights(tmp_path / "planted.gguf") as weights:
        folding = kv.find(weights, tmp_path / "planted.gguf")
    before, after = folding.found[0].gain, folding.found[1].gain
    assert before > 3 * after
    factors = folding.changes["blk.0.attn_k_norm.weight"].columns
    assert factors is not None and factors.argmin() in (3, 3 + shape.k_dim // 2)
    assert np.allclose(folding.changes["blk.0.attn_q_norm.weight"].columns * factors, 1)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.floats(0, 1))
def test_factors_are_clamped_and_normalised(values: list[float], alpha: float) -> None:
    factors = awq.factors_for(np.array([values]), alpha)
    assert np.isfinite(factors).all() and factors.min() >= 1 / 16.1 and factors.max() <= 16.1
    if factors.max() < 15.9 and factors.min() > 1 / 15.9:
        assert np.log(factors).mean() == pytest.approx(0, abs=1e-6)
    assert np.allclose(awq.factors_for(np.array([values]), 0.0), 1)


def in_bf16(path: Path, out: Path) -> Path:
    """A copy of a model in f32 with its matrices in bf16."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "qwen2")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(
                field.name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None
            )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    kind = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            writer.add_tensor(tensor.name, gguf.quantize(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_the_copy_has_the_changes_and_nothing_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = in_bf16(model, tmp_path / "source.gguf")
    factors = np.exp(np.random.default_rng(3).standard_normal((1, random_models.EMBD)))
    out = tmp_path / "out.gguf"
    monkeypatch.setattr("ggufrq.make.fold.weights._PIECE", 1000)  # many pieces
    with Weights(source) as weights:
        (pair,) = [
            pair
            for pair in pairs(architectures()["qwen2"], weights.tensors)
            if (pair.layer, pair.rule.name) == (1, "attention")
        ]
        changes = scaled(pair, factors, weights)
        write_changed(weights, out, changes, {"ggufrq.fold": "awq", "general.name": "new"})
        before = {info.name: weights.read(info.name) for info in weights.tensors}
    facts = read_gguf(out)
    assert set(changes) == {f"blk.1.{name}.weight" for name in ("attn_norm", "attn_q", "attn_k", "attn_v")}
    with Weights(out) as weights:
        for info in weights.tensors:
            name = info.name
            if name not in changes:
                assert np.array_equal(weights.read(name), before[name])
                assert facts.tensor_types[name] == ("bf16" if len(info.shape) > 1 else "f32")
            elif "norm" in name:
                assert np.allclose(weights.read(name), before[name] / factors, rtol=1e-6)
            else:
                assert facts.tensor_types[name] == "f16"
                assert np.allclose(weights.read(name), before[name] * factors, rtol=1e-3, atol=1e-7)
    old, new = read_header(source).values, read_header(out).values
    assert new == {**old, "ggufrq.fold": "awq", "general.name": "new", "general.file_type": 1}


def test_the_matrix_goes_with_the_weights(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    sums = {"a.weight": np.array([[2.0, 8.0]]), "b.weight": np.array([[4.0, 2.0], [0.0, 0.0]])}
    counts = {"a.weight": np.array([[2.0]]), "b.weight": np.array([[2.0], [0.0]])}
    for name in sums:
        writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert {name: power.tolist() for name, power in imatrix.read(tmp_path / "imatrix.gguf").items()} == {
        "a.weight": [[1, 4]],
        "b.weight": [[2, 1], [1, 1]],
    }
    changes = {
        "a.weight": Change(columns=np.array([[2.0, 4.0]]), rows=np.array([[9.0]])),
        "b.weight": Change(columns=np.array([[1.0, 2.0], [3.0, 5.0]])),
        "c.weight": Change(columns=np.array([[7.0]])),
    }
    imatrix.write_folded(tmp_path / "imatrix.gguf", tmp_path / "folded.gguf", changes)
    with Weights(tmp_path / "folded.gguf") as folded:
        assert folded.whole("a.weight.in_sum2").tolist() == [[0.5, 0.5]]
        assert folded.whole("b.weight.in_sum2").tolist() == [[4, 0.5], [0, 0]]
        assert folded.whole("b.weight.counts").tolist() == [[2], [0]]
    assert read_header(tmp_path / "folded.gguf").values["general.type"] == "imatrix"


def test_what_is_said_of_a_folded_file(model: Path) -> None:
    assert fold_file.metadata("awq", model) == {
        "ggufrq.fold": "awq",
        "ggufrq.fold.version": "1",
        "ggufrq.fold.parts": "attention feed_forward up_down values",
    }
    assert fold_file.metadata("kv", model)["ggufrq.fold.parts"] == "keys"
    gemma = random_models.write("gemma3", model.with_name("gemma.gguf"), TOKENS)
    assert fold_file.metadata("kv", gemma)["ggufrq.fold.version"] == "2"
    assert heads(read_header(model), 0) == Heads(4, 2, 32, 32, 32)


def test_changes_of_one_tensor_by_two_pairs(model: Path) -> None:
    """attn_v reads one pair and writes the other."""
    folding = Folding()
    with Weights(model) as weights:
        for pair in pairs(architectures()["qwen2"], weights.tensors):
            if pair.layer == 0 and pair.rule.name in ("attention", "values"):
                shape = heads(weights.header, 0) if pair.rule.rows == "heads" else None
                length = 64 if shape else random_models.EMBD
                folding.add(scaled(pair, np.full((1, length), 2.0), weights, shape))
    change = folding.changes["blk.0.attn_v.weight"]
    assert change.rows is not None and change.columns is not None
    assert (change.rows == 0.5).all() and (change.columns == 2).all()
    assert (folding.changes["blk.0.attn_v.bias"].columns == 0.5).all()
    assert "blk.0.attn_q.bias" not in folding.changes

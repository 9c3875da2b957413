"""Calibration without llama.cpp: what is summed, kept, written and refused; with it in tests/models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError, ModelError, UsageError
from ggufrq.base.progress import Listener
from ggufrq.cache.kv import kv_type
from ggufrq.cli.calibrate import calibrate as command
from ggufrq.codec import rotate
from ggufrq.drive import kv_capture
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.ggufs.kv_state import KvLayer, KvState
from ggufrq.measure import calibrate

HEADS, DIM, TOKENS, LAYERS = 2, 128, 16, (1, 3)
BUILD: Any = None


def make_model(path: Path, *, norm: float = 1.0, extra: str | None = None, **values: float) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(4)
    writer.add_embedding_length(64)
    for key, value in values.items():
        writer.add_float32(f"qwen3.{key}", value)
    for name in ["output_norm.weight", *([extra] if extra else [])]:
        writer.add_tensor(name, np.full(64, norm, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Captures:
    """Stands for llama-server: chunks of random K, of which some can be missing or fail."""

    def __init__(self, there: int, fail_at: int | None = None) -> None:
        rng = np.random.default_rng(5)
        self.k = rng.standard_normal((there, len(LAYERS), TOKENS, HEADS, DIM)).astype(np.float16) + 3
        self.fail_at = fail_at
        self.computed: list[int] = []

    def __call__(
        self, *_: object, chunks: int, first: int, listener: Listener, **__: object
    ) -> Iterator[KvState]:
        there = min(chunks, len(self.k))
        listener.expect(there)
        for i in range(first, there):
            if i == self.fail_at:
                raise KeyboardInterrupt
            self.computed.append(i)
            layers = {il: KvLayer(self.k[i, j], self.k[i, j]) for j, il in enumerate(LAYERS)}
            yield KvState(tuple(range(TOKENS)), layers)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("words")
    return path


def make(model: Path, text: Path, out: Path, monkeypatch: Any, captures: Captures, **options: Any) -> Any:
    monkeypatch.setattr(kv_capture, "captured", captures)
    options = {"k_type": kv_type("iso3"), "chunks": len(captures.k)} | options
    return calibrate.calibrate(model, text, out, BUILD, **options)


@pytest.mark.parametrize(("kind", "mode"), [("iso3", "full"), ("planar4", "block"), ("rotor2", "none")])
def test_the_file_has_the_rotated_means(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    captures = Captures(3)
    model, out = make_model(tmp_path / "m.gguf"), tmp_path / "calib.gguf"
    made = make(model, text, out, monkeypatch, captures, k_type=kv_type(kind), mode=mode)
    reader = gguf.GGUFReader(out)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    family = kind[:-1]
    assert facts["general.type"] == "kv-calib"
    assert facts["rq.calib.version"] == 1
    assert facts["rq.calib.arch"] == "qwen3"
    assert facts["rq.calib.n_layer"] == 4
    assert facts["rq.calib.k_rotation"] == f"{family}/{mode}/128" == made.rotation
    assert facts["rq.calib.model"] == fingerprint(model)
    assert facts["rq.calib.tokens"] == 3 * TOKENS == made.tokens
    assert [tensor.name for tensor in reader.tensors] == ["blk.1.k_mean", "blk.3.k_mean"]
    for j, tensor in enumerate(reader.tensors):
        k = captures.k[:, j].reshape(-1, HEADS, DIM).astype(np.float64)
        mean = rotate(k.mean(axis=0).astype(np.float32), family, mode)  # type: ignore[arg-type]
        np.testing.assert_allclose(tensor.data, mean, atol=1e-6)
        share = (np.square(k.mean(axis=0)).sum(-1) / np.square(k).sum(-1).mean(0)).mean()
        assert made.layers[j].share == pytest.approx(share)
        assert 0.8 < share < 1


def test_a_stopped_run_goes_on(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make_model(tmp_path / "m.gguf"), tmp_path / "calib.gguf"
    stopped = Captures(4, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        make(model, text, out, monkeypatch, stopped)
    assert list(tmp_path.glob("*calib*")) == []
    rest = Captures(4)
    make(model, text, out, monkeypatch, rest)
    assert (stopped.computed, rest.computed) == ([0, 1], [2, 3])
    resumed = out.read_bytes()
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "another cache"))
    make(model, text, out, monkeypatch, Captures(4))
    assert out.read_bytes() == resumed
    again = Captures(4)
    make(model, text, out, monkeypatch, again)
    assert again.computed == []


def test_a_damaged_chunk_is_computed_again(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = make_model(tmp_path / "m.gguf"), tmp_path / "calib.gguf"
    make(model, text, out, monkeypatch, Captures(2))
    for kept in paths.cache_dir().glob("calibration/*/1.npz"):
        kept.write_bytes(kept.read_bytes()[:100])
    again = Captures(2)
    make(model, text, out, monkeypatch, again)
    assert again.computed == [1]


def test_a_short_text_gives_fewer_chunks(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "m.gguf")
    assert make(model, text, tmp_path / "c", monkeypatch, Captures(2), chunks=9).tokens == 2 * TOKENS


def test_the_fingerprint_is_of_the_model_and_not_of_its_weights_types(tmp_path: Path) -> None:
    one = fingerprint(make_model(tmp_path / "1.gguf"))
    assert one == fingerprint(make_model(tmp_path / "2.gguf", extra="blk.0.attn_k.weight"))
    assert one != fingerprint(make_model(tmp_path / "3.gguf", norm=1.5))
    assert len(one) == 16


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"extra": "blk.0.attn_sinks.weight"}, "has attention sinks"),
        ({"attn_logit_softcapping": 50.0}, "caps"),
    ],
)
def test_a_model_where_it_is_not_exact_is_refused(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], why: str
) -> None:
    model = make_model(tmp_path / "m.gguf", **options)
    with pytest.raises(ModelError, match=why):
        make(model, text, tmp_path / "calib.gguf", monkeypatch, Captures(1))
    assert not (tmp_path / "calib.gguf").exists()


def test_types_and_modes_without_a_rotation_are_refused(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="q8_0 is not calibrated"):
        make(model, text, tmp_path / "c", monkeypatch, Captures(1), k_type=kv_type("q8_0"))
    with pytest.raises(UsageError, match="no rotation mode 'ful'"):
        make(model, text, tmp_path / "c", monkeypatch, Captures(1), mode="ful")


def test_a_place_that_cannot_be_written_is_an_error(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "m.gguf")
    (tmp_path / "folder").mkdir()
    with pytest.raises(GgufrqError, match="cannot write"):
        make(model, text, tmp_path / "folder", monkeypatch, Captures(1))


def test_the_mode_is_that_of_k(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, mode in ((None, "full"), ("", "full"), ("block", "block"), ("hadamard/none", "hadamard")):
        monkeypatch.delenv("LLAMA_RQ_MODE", raising=False)
        if value is not None:
            monkeypatch.setenv("LLAMA_RQ_MODE", value)
        assert calibrate.mode_of_k() == mode


def test_the_command_prints_how_much_of_k_is_constant(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_capture, "captured", Captures(2))
    monkeypatch.setattr("ggufrq.cli.calibrate.require_build", lambda: BUILD)
    model, out = make_model(tmp_path / "m.gguf"), tmp_path / "calib.gguf"
    done = CliRunner().invoke(command, [str(model), str(text), "-o", str(out), "--chunks", "2"])
    assert done.exit_code == 0, done.output
    assert "constant part of K, %" in done.output and "rotation iso/full" in done.output
    assert out.is_file()

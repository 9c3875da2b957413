"""The file of a profile: what is written is read again, and what must not be used is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufrq.base.errors import GgufrqError, ModelError
from ggufrq.profile import LayerProfile, Profile, read_profile
from ggufrq.profile.solve import solve

MODEL = "0123456789abcdef"


def layer(heads: int, dim: int, seed: int, *, mean: bool = True) -> LayerProfile:
    rng = np.random.default_rng(seed)
    k, q = (np.stack([x @ x.T for x in rng.standard_normal((heads, dim, dim))]) for _ in range(2))
    metric = solve(k, q)
    kept = rng.standard_normal((heads, dim)).astype(np.float32) if mean else None
    return LayerProfile(metric.forward.astype(np.float32), metric.inverse.astype(np.float32), kept)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.booleans()), min_size=1, max_size=4),
    st.sampled_from(["weights", "text", "tokens"]),
    st.integers(1, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, bool]], source: Any, n_ctx: int
) -> None:
    layers = {3 * i: layer(h, d, i, mean=mean) for i, (h, d, mean) in enumerate(shapes)}
    path = tmp_path_factory.mktemp("profile") / "model-kv.gguf"
    Profile(MODEL, source, n_ctx, layers).write(path)
    found = read_profile(path)
    assert (found.model, found.source, found.n_ctx) == (MODEL, source, n_ctx)
    assert list(found.layers) == list(layers)
    for il, made in layers.items():
        read = found.layers[il]
        assert np.array_equal(read.k_map, made.k_map) and np.array_equal(read.q_map, made.q_map)
        assert made.k_mean is None if read.k_mean is None else np.array_equal(read.k_mean, made.k_mean)
    assert [entry.name for entry in path.parent.iterdir()] == ["model-kv.gguf"]


def test_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "model-kv.gguf"
    Profile(MODEL, "weights", 4096, {5: layer(2, 4, 1)}).write(path)
    reader = gguf.GGUFReader(path)
    fields = {name: entry.contents() for name, entry in reader.fields.items()}
    assert fields["general.architecture"] == fields["general.type"] == "kv-profile"
    assert fields["rq.profile.version"] == 1 and fields["rq.profile.n_ctx"] == 4096
    assert fields["rq.profile.model"] == MODEL and fields["rq.profile.source"] == "weights"
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes == {"blk.5.k_map": (4, 4, 2), "blk.5.q_map": (4, 4, 2), "blk.5.k_mean": (4, 2)}


def written(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> Path:
    """A profile of two layers after a change to its tensors or metadata, which the writer does not check."""
    tensors: dict[str, np.ndarray] = {}
    for il in range(2):
        made = layer(2, 4, il)
        tensors |= {f"blk.{il}.k_map": made.k_map.copy(), f"blk.{il}.q_map": made.q_map.copy()}
        assert made.k_mean is not None
        tensors[f"blk.{il}.k_mean"] = made.k_mean.copy()
    values: dict[str, Any] = {
        "version": 1,
        "model": MODEL,
        "source": "weights",
        "n_ctx": 64,
        "type": "kv-profile",
    }
    change(tensors, values)
    writer = gguf.GGUFWriter(path, "kv-profile")
    writer.add_type(values.pop("type"))
    for key, value in values.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"rq.profile.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(name: str, where: tuple[int, ...], value: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], values: dict[str, Any]) -> None:
        tensors[name][where] = value

    return change


REFUSED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "another kind": (lambda t, v: v.update(type="model"), "is no profile of a KV cache but model"),
    "another version": (lambda t, v: v.update(version=2), "version 2, but 1 is read here"),
    "no version": (lambda t, v: v.pop("version"), "version None"),
    "another source": (lambda t, v: v.update(source="dreams"), "does not say of which model"),
    "no model": (lambda t, v: v.pop("model"), "does not say of which model"),
    "a model that is no hash": (lambda t, v: v.update(model="llama"), "does not say of which model"),
    "no positions": (lambda t, v: v.update(n_ctx=0), "does not say of which model"),
    "no layers": (lambda t, v: t.clear(), "has no layers"),
    "a tensor of others": (lambda t, v: t.update({"blk.0.attn_k.weight": t["blk.0.k_map"]}), "attn_k.weight"),
    "half precision": (
        lambda t, v: t.update({"blk.0.k_map": t["blk.0.k_map"].astype(np.float16)}),
        "no profile has, blk.0.k_map",
    ),
    "a map missing": (lambda t, v: t.pop("blk.1.q_map"), "layer 1 lacks a map"),
    "maps that are not square": (
        lambda t, v: t.update({"blk.1.k_map": t["blk.1.k_map"][:, :3]}), "in layer 1 the maps have shapes",
    ),
    "maps of other heads": (
        lambda t, v: t.update({"blk.0.q_map": t["blk.0.q_map"][:1]}), "in layer 0 the maps have shapes",
    ),
    "a mean of other heads": (
        lambda t, v: t.update({"blk.0.k_mean": t["blk.0.k_mean"][:, :2]}), "in layer 0 the mean has shape",
    ),
    "no numbers": (put("blk.1.k_mean", (0, 1), np.nan), "in layer 1 there are values that are no finite"),
    "infinite": (put("blk.1.q_map", (1, 0, 0), np.inf), "in layer 1 there are values that are no finite"),
    "not symmetric": (put("blk.0.k_map", (0, 1, 2), 9.0), "in layer 0 a map is not symmetric"),
    "no inverse": (put("blk.0.q_map", (1, 2, 2), 9.0), "in layer 0 the maps of K and of the queries"),
    "the same map twice": (
        lambda t, v: t.update({"blk.0.q_map": t["blk.0.k_map"]}), "are not each other's inverse",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_not_be_used_is_refused(name: str, tmp_path: Path) -> None:
    change, why = REFUSED[name]
    path = written(tmp_path / "model-kv.gguf", change)
    with pytest.raises(ModelError, match=why) as refused:
        read_profile(path)
    assert refused.value.remedy


def test_the_unchanged_one_is_read(tmp_path: Path) -> None:
    assert len(read_profile(written(tmp_path / "model-kv.gguf", lambda t, v: None)).layers) == 2


@pytest.mark.parametrize("keep", [0, 3, 40, 300, -1])
def test_damaged_and_missing_files(keep: int, tmp_path: Path) -> None:
    path = written(tmp_path / "model-kv.gguf", lambda t, v: None)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged"):
        read_profile(path)
    path.unlink()
    with pytest.raises(ModelError, match="is missing"):
        read_profile(path)


def test_what_is_not_sound_is_not_written(tmp_path: Path) -> None:
    good = layer(1, 4, 1)
    path = tmp_path / "model-kv.gguf"
    with pytest.raises(ModelError, match="each other's inverse"):
        Profile(MODEL, "weights", 64, {0: replace(good, q_map=good.k_map)}).write(path)
    with pytest.raises(GgufrqError, match="cannot write"):
        (tmp_path / "folder").mkdir()
        Profile(MODEL, "weights", 64, {0: good}).write(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]

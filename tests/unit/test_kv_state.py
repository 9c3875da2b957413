"""Reading K and V from saved states: of files made here as llama.cpp makes them; real ones: tests/models."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from kv_state import attention_layers, check_model, read_kv_state

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.header import read_header

HEADS, DIM, TOKENS = 2, 4, 5
Array = npt.NDArray[np.floating]


def make_model(path: Path, *, arch: str = "qwen3", hybrid: bool = False, **values: int) -> Path:
    """Four layers; in a hybrid one only the last has K and V."""
    writer = gguf.GGUFWriter(path, arch)
    facts = {"block_count": 4, "embedding_length": 16, "attention.head_count": 4}
    facts |= {"attention.head_count_kv": HEADS, "attention.key_length": DIM} | values
    for key, value in facts.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for il in range(facts["block_count"]):
        recurrent = hybrid and il != 3
        for name in ("attn_qkv", "ssm_out") if recurrent else ("attn_k", "attn_v"):
            writer.add_tensor(f"blk.{il}.{name}.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(layers: int, dtype: str = "<f2") -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(1)
    return [tuple(rng.standard_normal((2, TOKENS, HEADS, DIM)).astype(dtype)) for _ in range(layers)]  # type: ignore[misc]


def state(
    kv: list[tuple[Array, Array]],
    *,
    arch: str | None = "qwen3",
    version: int | None = None,
    packed: bool = False,
    extension: bytes = b"",
    streams: int = 1,
    owner: int = 0,
    transposed: int = 0,
    kind: int = 1,
    more: int = 0,
    rest: bytes = b"",
) -> bytes:
    """A context's state, or with ``arch=None`` that of a sequence."""
    tokens = [-1, 1, TOKENS, *range(TOKENS), 0] if packed else list(range(TOKENS + more))
    magic, known = (0x67677371, 3) if arch is None else (0x6767736E, 10)
    out = struct.pack("<III", magic, known if version is None else version, len(tokens))
    out += struct.pack(f"<{len(tokens)}i", *tokens)
    if arch is not None:
        out += struct.pack("<I", len(arch)) + arch.encode()
    out += struct.pack("<II", streams, TOKENS)
    for position in range(TOKENS):
        out += struct.pack("<iI", position, 1) + extension + struct.pack("<i", owner)
    out += struct.pack("<II", transposed, len(kv))
    for side in (0, 1):
        for pair in kv:
            data = pair[side].tobytes()
            out += struct.pack("<iQ", kind, len(data) // TOKENS) + data
    return out + rest


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[bytes], Path]:
    def save(data: bytes) -> Path:
        path = tmp_path / "state.bin"
        path.write_bytes(data)
        return path

    return save


@pytest.mark.parametrize("arch", ["qwen3", None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("extension", [b"", bytes(12), struct.pack("<iii", 7, 7, 3)])
@pytest.mark.parametrize(("dtype", "kind"), [("<f2", 1), ("<f4", 0)])
def test_every_layout(
    tmp_path: Path,
    saved: Callable[[bytes], Path],
    arch: str | None,
    packed: bool,
    extension: bytes,
    dtype: str,
    kind: int,
) -> None:
    kv = values(4, dtype)
    data = state(kv, arch=arch, packed=packed, extension=extension, kind=kind)
    got = read_kv_state(saved(data), make_model(tmp_path / "m.gguf"))
    assert got.tokens == tuple(range(TOKENS))
    assert list(got.layers) == [0, 1, 2, 3]
    for layer, (k, v) in zip(got.layers.values(), kv, strict=True):
        assert layer.k.dtype == dtype
        assert np.array_equal(layer.k, k) and np.array_equal(layer.v, v)


def test_a_last_token_without_k_and_v_is_left_out(tmp_path: Path, saved: Callable[[bytes], Path]) -> None:
    got = read_kv_state(saved(state(values(4), more=1)), make_model(tmp_path / "m.gguf"))
    assert len(got.tokens) == len(got.layers[0].k) == TOKENS


def test_recurrent_state_is_skipped(tmp_path: Path, saved: Callable[[bytes], Path]) -> None:
    model = make_model(tmp_path / "m.gguf", hybrid=True)
    assert attention_layers(read_header(model)) == (3,)
    kv = values(1)
    got = read_kv_state(saved(state(kv, rest=b"recurrent state")), model)
    assert list(got.layers) == [3]
    assert np.array_equal(got.layers[3].k, kv[0][0])


def test_layers_that_only_predict_further_tokens_have_no_part_in_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m.gguf", nextn_predict_layers=1)
    assert attention_layers(read_header(model)) == (0, 1, 2)


DAMAGED = [
    (state(values(4))[:-1], "ends too early"),
    (state(values(4))[:30], "ends too early"),
    (state(values(4), rest=b"x"), "goes on for 1 bytes"),
    (b"", "is no saved state"),
    (b"GGUF" + bytes(100), "is no saved state"),
    (state(values(4), version=11), "is of version 11, not 10"),
    (state(values(4), arch=None, version=2), "is of version 2"),
    (state(values(4), arch="llama"), "is of a llama model, not qwen3"),
    (state(values(3)), "has 3 layers with K and V, but m.gguf has 4"),
    (state(values(4), streams=2), "several sequences"),
    (state(values(4), streams=0x32515247), "a type of ggufrq; use f16"),
    (state(values(4), owner=1), "does not hold one sequence"),
    (state(values(4), more=2), "holds 5 tokens in its cache, but 7 in its list"),
    (state(values(4), transposed=1), "without flash attention"),
    (state(values(4), kind=8), "in another type than f16 or f32"),
    (state(values(4, "<f4")), "not 2 heads of 4 values"),
]


@pytest.mark.parametrize(("data", "why"), DAMAGED)
def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, saved: Callable[[bytes], Path], data: bytes, why: str
) -> None:
    model = make_model(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=why):
        read_kv_state(saved(data), model)


def test_no_part_of_a_state_can_be_missing(tmp_path: Path, saved: Callable[[bytes], Path]) -> None:
    model = make_model(tmp_path / "m.gguf")
    whole = state(values(4))
    for length in range(len(whole)):
        with pytest.raises(ModelError):
            read_kv_state(saved(whole[:length]), model)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is missing"):
        read_kv_state(tmp_path / "none", make_model(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    "key", ["attention.sliding_window", "attention.kv_lora_rank", "attention.shared_kv_layers"]
)
def test_models_that_keep_k_and_v_otherwise_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        check_model(make_model(tmp_path / "m.gguf", **{key: 1}))

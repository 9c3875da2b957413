from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.files import GgufFacts, open_with_gguf, read_gguf, read_model, shards, verify_types
from ggufrq.ggufs.header import read_header


def write(path: Path, tensors: dict[str, tuple[int, ...]], **fields: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in fields.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LAYERS = {f"blk.{i}.attn_{side}.weight": (256, 64) for i in (0, 2) for side in "kv"}


def test_facts(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"token_embd.weight": (32, 64), **LAYERS})
    facts = read_gguf(path)
    assert (facts.tensors, facts.types, facts.file_type, facts.architecture) == (
        5,
        {"F16": 5},
        "F16",
        "llama",
    )
    assert facts.weights == 32 * 64 + 4 * 256 * 64
    assert (facts.data_bytes, facts.bits, facts.is_quantized) == (2 * facts.weights, 16, False)
    assert facts.file_bytes == path.stat().st_size


def test_a_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the file is the same one, by whatever name."""
    path = write(tmp_path / "m.gguf", LAYERS)
    data = path.read_bytes()
    assert read_header(path).version == 3
    path.write_bytes(data[:4] + b"\2" + data[5:])
    assert read_header(path).version == 2, "perhaps at the same time, as far as the disk can tell"
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    header = read_header(path)
    assert read_header(path) is header
    write(path, {**LAYERS, "more": (32, 64)})
    assert len(read_header(path).tensors) == len(header.tensors) + 1
    os.utime(path, ns=(1, 1))
    touched = read_header(path)
    other = tmp_path / "other"
    other.mkdir()
    write(other / "m.gguf", LAYERS)
    os.utime(other / "m.gguf", ns=(1, 1))
    for folder, tensors in ((tmp_path, len(touched.tensors)), (other, len(header.tensors))):
        monkeypatch.chdir(folder)
        assert len(read_header(Path("m.gguf")).tensors) == tensors
    path.unlink()
    with pytest.raises(ModelError, match="is missing"):
        read_header(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", LAYERS)
    data = path.read_bytes()
    for end in (0, 3, 8, 100, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:end])
        with pytest.raises(ModelError, match=r"m\.gguf is damaged"):
            read_gguf(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ModelError, match="damaged or no GGUF"):
        read_gguf(path)
    with pytest.raises(ModelError, match="is missing"):
        read_gguf(tmp_path / "none.gguf")


def shard(folder: Path, part: int, tensors: dict[str, tuple[int, ...]], total: int, count: int = 2) -> Path:
    path = folder / f"m-{part:05d}-of-{count:05d}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", part - 1)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_shards(tmp_path: Path) -> None:
    first = shard(tmp_path, 1, {"a": (32, 64)}, 2)
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf is missing from"):
        read_model(first)
    second = shard(tmp_path, 2, {"b": (32, 32)}, 2)
    assert shards(second) == [first, second]
    facts = read_model(second)
    assert (facts.tensors, facts.weights, facts.split) == (2, 32 * 96, 2)
    assert facts.tensor_types == {"a": "f16", "b": "f16"}
    assert facts.file_bytes == first.stat().st_size + second.stat().st_size
    shard(tmp_path, 2, {"a": (32, 32)}, 2)
    with pytest.raises(ModelError, match="have 1 tensors, but the model has 2"):
        read_model(first)
    renamed = first.rename(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="is not named so"):
        read_model(renamed)


def test_verify() -> None:
    facts = GgufFacts(2, {"Q4_K": 1, "F32": 1}, 10, 10, 10, "Q4_K_M", "llama", 0, {"a": "q4_k", "b": "f32"})
    verify_types(facts, {"a": "q4_k", "b": "f32"}, "Q4_K_M")
    with pytest.raises(ModelError, match="2 tensors instead of 3"):
        verify_types(facts, {"a": "q4_k", "b": "f32", "c": "f32"})
    with pytest.raises(ModelError, match="a of the quantized model is q4_k instead of q6_k"):
        verify_types(facts, {"a": "q6_k", "b": "f32"})
    with pytest.raises(ModelError, match="c of the quantized model is missing instead of f32"):
        verify_types(facts, {"a": "q4_k", "c": "f32"})
    with pytest.raises(ModelError, match="says it is Q4_K_M instead of Q5_K_M"):
        verify_types(facts, {"a": "q4_k", "b": "f32"}, "Q5_K_M")


def test_every_byte_of_a_header_may_be_wrong(tmp_path: Path) -> None:
    """Whatever a header says, there is an answer or one kind of error, and no huge allocation."""
    path = write(tmp_path / "m.gguf", LAYERS, some__key=7)
    data = path.read_bytes()
    end = read_header(path).data_offset
    refused = 0
    for at in range(end):
        for value in (0xFF, data[at] ^ 0x01):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                read_gguf(path)
            except ModelError:
                refused += 1
    assert refused > end


def test_the_gguf_package_agrees(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", LAYERS, some__key=7)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, list(t.shape)) for t in header.tensors] == [
        (t.name, t.shape.tolist()) for t in reader.tensors
    ]
    assert header.values == {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
    }
    assert header.data_offset == reader.data_offset
    open_with_gguf(path)

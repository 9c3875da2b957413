from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from ggufrq.errors import ModelError
from ggufrq.gguf_file import GgufFacts, read_gguf, verify_quantized
from ggufrq.kv import parse_kv
from ggufrq.memory import kv_shape


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


def facts_of(types: dict[str, int], file_type: str = "Q4_K_M") -> GgufFacts:
    return GgufFacts(sum(types.values()), types, 10, 10, 10, file_type, "llama", 0)


def test_verify() -> None:
    good = facts_of({"Q4_K": 8, "Q6_K": 2, "F32": 2})
    verify_quantized(good, "Q4_K_M", 12)
    verify_quantized(facts_of({"IQ2_XXS": 2}, "IQ2_XXS"), "IQ2_XXS", 2)
    with pytest.raises(ModelError, match="12 tensors instead of 13"):
        verify_quantized(good, "Q4_K_M", 13)
    with pytest.raises(ModelError, match="says it is Q4_K_M instead of Q5_K_M"):
        verify_quantized(good, "Q5_K_M", 12)
    with pytest.raises(ModelError, match="no tensor of the quantized model is Q4_K; there are F16"):
        verify_quantized(facts_of({"F16": 12}), "Q4_K_M", 12)
    verify_quantized(facts_of({"Q5_0": 12}), "Q4_K_M", 12, fallbacks=12)


def test_shape_of_the_cache(tmp_path: Path) -> None:
    shape = kv_shape(write(tmp_path / "m.gguf", {"output.weight": (8, 8), **LAYERS}))
    assert (shape.k_values, shape.v_values, shape.layers) == (512, 512, 2)
    assert shape.bytes_for(parse_kv("iso3"), 1024) == 1024 * 1024 * 50 // 128
    assert shape.bits_for(shape.bytes_for(parse_kv("iso3"), 1024), 1024) == 3.125
    assert shape.bits_for(shape.bytes_for(parse_kv("iso2/rotor4"), 4096), 4096) == 3.125


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        ({"output.weight": (8, 8)}, {}),
        ({"blk.0.attn_k.weight": (8, 8)}, {}),
        (LAYERS, {"llama__attention__sliding_window": 4096}),
        (LAYERS, {"llama__attention__kv_lora_rank": 512}),
        (LAYERS, {"llama__nextn_predict_layers": 1}),
    ],
)
def test_shapes_that_are_not_simple(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], fields: dict[str, int]
) -> None:
    with pytest.raises(ModelError, match="cannot be told"):
        kv_shape(write(tmp_path / "m.gguf", tensors, **fields))

"""A variant of the dense embedded model whose K has a large constant part, as that of Qwen2.5 has.

Some of the channels that RoPE hardly turns get a bias in the projection of K; the norm of K is adjusted so
that all other channels stay what they were on average. The model reads a little worse for it.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

#: Channels of each head that are given over to the constant; with RoPE's pairs (j, j + 64) the slowest ones.
CHANNELS = (60, 61, 62, 63)
_RATIO = 3.0  # bias over the root mean square of the projection


def plant(source: Path, out: Path, mean: float) -> Path:
    """Write ``source``, an f16 Qwen3 GGUF with heads of 128 values, with K of about ``mean`` in CHANNELS."""
    reader = gguf.GGUFReader(source)
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(out, "qwen3")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        sub_type = field.types[-1] if array else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for name in [name for name in tensors if name.endswith(".attn_k.weight")]:
        _plant(tensors, name.removesuffix("attn_k.weight"), mean)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _plant(tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]], block: str, mean: float) -> None:
    def values(name: str) -> np.ndarray:
        return gguf.dequantize(*tensors[block + name])

    weight = values("attn_k.weight").copy()  # [heads * 128, width]
    heads = len(weight) // 128
    planted = np.add.outer(128 * np.arange(heads), CHANNELS).ravel()
    # x is normalised before the projection, so that this is about the root mean square of what comes out
    rms = np.sqrt(np.square(weight * values("attn_norm.weight")).sum(axis=1).mean())
    weight[planted] = 0
    bias = np.zeros(len(weight), np.float32)
    bias[planted] = _RATIO * rms
    share = len(CHANNELS) / 128
    grown = np.sqrt(1 - share + share * _RATIO**2)
    norm = values("attn_k_norm.weight") * grown
    norm[list(CHANNELS)] = mean * grown / _RATIO
    f32 = gguf.GGMLQuantizationType.F32
    tensors[block + "attn_k.weight"] = (weight, f32)
    tensors[block + "attn_k.bias"] = (bias, f32)
    tensors[block + "attn_k_norm.weight"] = (norm.astype(np.float32), f32)

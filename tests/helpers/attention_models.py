"""Models of random weights that have nothing but what Q and K of their layers come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

WIDTH, HEADS, KV_HEADS, DIM = 32, 4, 2, 8

#: Shapes as numpy has them.
SPLIT: dict[str, tuple[int, ...]] = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (HEADS * DIM, WIDTH),
    "attn_k.weight": (KV_HEADS * DIM, WIDTH),
}
FUSED: dict[str, tuple[int, ...]] = {
    "attn_norm.weight": (WIDTH,),
    "attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * DIM, WIDTH),
}
BIASES: dict[str, tuple[int, ...]] = {"attn_q.bias": (HEADS * DIM,), "attn_k.bias": (KV_HEADS * DIM,)}
QK_NORM: dict[str, tuple[int, ...]] = {"attn_q_norm.weight": (DIM,), "attn_k_norm.weight": (DIM,)}


def numbers(**more: Any) -> dict[str, Any]:
    """The usual metadata, and more, with _ for a dot in keys."""
    usual = {
        "context_length": 512,
        "embedding_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": DIM,
        "rope.freq_base": 100.0,
    }
    given = {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in (usual | given).items() if value is not None}


def write(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    layers: list[dict[str, tuple[int, ...]]],
    extra: Mapping[str, npt.NDArray[Any]] | None = None,
    seed: int = 1,
) -> dict[str, F64]:
    """Write the model and return its tensors by name."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32(f"{architecture}.block_count", len(layers))
    for key, value in values.items():
        name = key if key.startswith("ggufrq.") else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    made: dict[str, F64] = {}
    for number, layer in enumerate(layers):
        for part, shape in layer.items():
            drawn = rng.standard_normal(shape)
            drawn = np.exp(0.4 * drawn) if "norm.weight" in part or "norm_2.weight" in part else drawn
            made[f"blk.{number}.{part}"] = drawn / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
    made["output_norm.weight"] = np.ones(WIDTH)
    made |= {name: np.asarray(value, np.float64) for name, value in (extra or {}).items()}
    for name, tensor in made.items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made

"""A small model of random weights that sees, with its encoder of images, as the Hub has Qwen2-VL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import packed_models
import sources
from packed_models import DIM, EMBD, HEADS, KV_HEADS, Matrix, Packed

_WIDTH = 64
#: With fewer blocks llama.cpp's converter has no name for the second layer of the merger.
_BLOCKS = 3
_CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": _BLOCKS,
        "embed_dim": _WIDTH,
        "hidden_size": EMBD,
        "mlp_ratio": 4,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_IMAGES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 14, "min_pixels": 3136}
#: Layers of a block and of what comes after them, by rows and columns.
_BLOCK = {
    "attn.qkv": (3 * _WIDTH, _WIDTH),
    "attn.proj": (_WIDTH, _WIDTH),
    "mlp.fc1": (4 * _WIDTH, _WIDTH),
    "mlp.fc2": (_WIDTH, 4 * _WIDTH),
}
_MERGER = {"mlp.0": (4 * _WIDTH, 4 * _WIDTH), "mlp.2": (EMBD, 4 * _WIDTH)}


def write(folder: Path) -> Path:
    """The model in a new folder: one layer for text, three blocks for images."""
    rng = np.random.default_rng(1)
    made = packed_models.dense({}, _floats)
    for name in ("q_norm", "k_norm"):
        del made.tensors[f"model.layers.0.self_attn.{name}.weight"]
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        made.tensors[f"model.layers.0.self_attn.{name}_proj.bias"] = sources.bf16(np.zeros(heads * DIM))
    patches = rng.standard_normal((_WIDTH, 3, 2, 14, 14)) / 16
    made.tensors["visual.patch_embed.proj.weight"] = sources.bf16(patches)
    for block in range(_BLOCKS):
        _part(made, f"visual.blocks.{block}", _BLOCK, ("norm1", "norm2"), rng)
    _part(made, "visual.merger", _MERGER, ("ln_q",), rng)
    made.write(folder, **_CONFIG)
    (folder / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
    return folder


def _floats(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(shape).astype(np.float32) / 16
    made.tensors[f"{name}.weight"] = sources.bf16(values)
    return values


def _part(
    made: Packed, start: str, layers: dict[str, Matrix], norms: tuple[str, ...], rng: np.random.Generator
) -> None:
    for name, shape in layers.items():
        _floats(made, f"{start}.{name}", shape, rng)
        made.tensors[f"{start}.{name}.bias"] = sources.bf16(np.zeros(shape[0]))
    for name in norms:
        made.tensors[f"{start}.{name}.weight"] = sources.bf16(np.ones(_WIDTH))
        made.tensors[f"{start}.{name}.bias"] = sources.bf16(np.zeros(_WIDTH))

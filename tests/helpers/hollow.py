"""Models in Hugging Face form of which only the headers are there: holes take the place of the weights."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

from ggufrq.models.resolve import embedded_models

#: Qwen3.5-27B, as far as its text model goes.
QWEN35_27B: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
}


def qwen35(folder: Path, config: dict[str, Any]) -> Path:
    """A Qwen3.5 model with the tokenizer of the embedded one."""
    source = embedded_models()["docs-qwen3.5-8m"]
    whole = json.loads((source / "config.json").read_text()) | config
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(whole))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    width, ffn, vocabulary = whole["hidden_size"], whole["intermediate_size"], whole["vocab_size"]
    dim, heads, kv = whole["head_dim"], whole["num_attention_heads"], whole["num_key_value_heads"]
    keys = whole["linear_num_key_heads"] * whole["linear_key_head_dim"]
    value_heads, value_dim = whole["linear_num_value_heads"], whole["linear_value_head_dim"]
    values = value_heads * value_dim
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not whole["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (vocabulary, width)
    for i, kind in enumerate(whole["layer_types"]):
        base = f"model.layers.{i}."
        mixer: dict[str, tuple[int, ...]]
        if kind == "full_attention":
            mixer = {
                "self_attn.q_proj.weight": (2 * heads * dim, width),
                "self_attn.k_proj.weight": (kv * dim, width),
                "self_attn.v_proj.weight": (kv * dim, width),
                "self_attn.o_proj.weight": (width, heads * dim),
                "self_attn.q_norm.weight": (dim,),
                "self_attn.k_norm.weight": (dim,),
            }
        else:
            mixer = {
                "linear_attn.A_log": (value_heads,),
                "linear_attn.dt_bias": (value_heads,),
                "linear_attn.conv1d.weight": (2 * keys + values, 1, whole["linear_conv_kernel_dim"]),
                "linear_attn.in_proj_a.weight": (value_heads, width),
                "linear_attn.in_proj_b.weight": (value_heads, width),
                "linear_attn.in_proj_qkv.weight": (2 * keys + values, width),
                "linear_attn.in_proj_z.weight": (values, width),
                "linear_attn.norm.weight": (value_dim,),
                "linear_attn.out_proj.weight": (width, values),
            }
        mixer |= {
            "mlp.gate_proj.weight": (ffn, width),
            "mlp.up_proj.weight": (ffn, width),
            "mlp.down_proj.weight": (width, ffn),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        tensors |= {base + name: shape for name, shape in mixer.items()}
    header, at = {}, 0
    for name, shape in tensors.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + at)
    return folder

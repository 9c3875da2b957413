"""Small models of random weights of every architecture that can be folded, in f32, with all tensors that may
need care: biases, norms with weights of their own, experts, delta nets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

EMBD, FF, HEADS, KV_HEADS, DIM, EXPERTS, EXPERT_FF = 128, 96, 4, 2, 32, 4, 64
STATE, GROUPS, RANK = 64, 2, 4  # of a delta net
INNER = STATE * RANK

Shapes = dict[str, tuple[int, ...]]

_ATTENTION: Shapes = {
    "attn_norm.weight": (EMBD,),
    "attn_q.weight": (HEADS * DIM, EMBD),
    "attn_k.weight": (KV_HEADS * DIM, EMBD),
    "attn_v.weight": (KV_HEADS * DIM, EMBD),
    "attn_output.weight": (EMBD, HEADS * DIM),
}
_QK_NORM: Shapes = {"attn_q_norm.weight": (DIM,), "attn_k_norm.weight": (DIM,)}
_QKV_BIAS: Shapes = {
    "attn_q.bias": (HEADS * DIM,),
    "attn_k.bias": (KV_HEADS * DIM,),
    "attn_v.bias": (KV_HEADS * DIM,),
}
_FEED_FORWARD: Shapes = {
    "ffn_gate.weight": (FF, EMBD),
    "ffn_up.weight": (FF, EMBD),
    "ffn_down.weight": (EMBD, FF),
}
_NORM: Shapes = {"ffn_norm.weight": (EMBD,)}
_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (EXPERTS, EMBD),
    "ffn_gate_exps.weight": (EXPERTS, EXPERT_FF, EMBD),
    "ffn_up_exps.weight": (EXPERTS, EXPERT_FF, EMBD),
    "ffn_down_exps.weight": (EXPERTS, EMBD, EXPERT_FF),
}
_FUSED_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (EXPERTS, EMBD),
    "ffn_gate_up_exps.weight": (EXPERTS, 2 * EXPERT_FF, EMBD),
    "ffn_down_exps.weight": (EXPERTS, EMBD, EXPERT_FF),
}
_SHARED: Shapes = {
    "ffn_gate_inp_shexp.weight": (EMBD,),
    "ffn_gate_shexp.weight": (EXPERT_FF, EMBD),
    "ffn_up_shexp.weight": (EXPERT_FF, EMBD),
    "ffn_down_shexp.weight": (EMBD, EXPERT_FF),
}
_POST_NORMS: Shapes = {"post_attention_norm.weight": (EMBD,), "post_ffw_norm.weight": (EMBD,)}
_GATED: Shapes = {**_ATTENTION, **_QK_NORM, "attn_q.weight": (2 * HEADS * DIM, EMBD)}
_CHANNELS = 2 * GROUPS * STATE + INNER
_DELTA: Shapes = {
    "attn_norm.weight": (EMBD,),
    "ssm_conv1d.weight": (_CHANNELS, 4),
    "ssm_dt.bias": (RANK,),
    "ssm_a": (RANK,),
    "ssm_norm.weight": (STATE,),
    "ssm_out.weight": (EMBD, INNER),
    "attn_qkv.weight": (_CHANNELS, EMBD),
    "attn_gate.weight": (INNER, EMBD),
}
_DELTA_35: Shapes = {**_DELTA, "ssm_alpha.weight": (RANK, EMBD), "ssm_beta.weight": (RANK, EMBD)}
_DELTA_NEXT: Shapes = {**_DELTA, "ssm_ba.weight": (2 * RANK, EMBD)}
_POST: Shapes = {"post_attention_norm.weight": (EMBD,)}
_DENSE: Shapes = {**_ATTENTION, **_NORM, **_FEED_FORWARD}

#: Tensors of each of the two layers, shapes as numpy has them.
LAYERS: dict[str, tuple[Shapes, Shapes]] = {
    "llama": (_DENSE, {**_ATTENTION, **_NORM, **_FEED_FORWARD, "ffn_up.bias": (FF,), "ffn_gate.bias": (FF,)}),
    "llama-experts": ({**_ATTENTION, **_NORM, **_EXPERTS},) * 2,
    "mistral3": (_DENSE, _DENSE),
    "smollm3": (_DENSE, _DENSE),
    "granite": (_DENSE, _DENSE),
    "qwen2": ({**_DENSE, **_QKV_BIAS},) * 2,
    "qwen2moe": ({**_ATTENTION, **_QKV_BIAS, **_NORM, **_EXPERTS, **_SHARED},) * 2,
    "gemma": (_DENSE, _DENSE),
    "gemma2": ({**_DENSE, **_POST_NORMS},) * 2,
    "gemma3": ({**_DENSE, **_QK_NORM, **_POST_NORMS},) * 2,
    "qwen3": ({**_DENSE, **_QK_NORM},) * 2,
    "qwen3moe": ({**_ATTENTION, **_QK_NORM, **_NORM, **_EXPERTS},) * 2,
    "qwen35": ({**_DELTA_35, **_POST, **_FEED_FORWARD}, {**_GATED, **_POST, **_FEED_FORWARD}),
    "qwen35moe": (
        {**_DELTA_35, **_POST, **_FUSED_EXPERTS, **_SHARED},
        {**_GATED, **_POST, **_EXPERTS, **_SHARED},
    ),
    "qwen3next": (
        {**_DELTA_NEXT, **_POST, **_EXPERTS, **_SHARED},
        {**_GATED, **_POST, **_EXPERTS, **_SHARED},
    ),
}
_MORE: dict[str, dict[str, Any]] = {
    "granite": {"logit_scale": 2.0, "residual_scale": 0.5, "embedding_scale": 3.0, "attention.scale": 0.2},
    "gemma2": {
        "attention.sliding_window": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {"attention.sliding_window": 64},
}


def write(
    name: str,
    path: Path,
    tokenizer: Mapping[str, Any],
    seed: int = 1,
    more: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write the model ``name`` (a key of LAYERS) with the tokenizer in the metadata of another model,
    ``more`` metadata of the architecture's own and ``extra`` tensors."""
    architecture = name.partition("-")[0]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    vocabulary = 0
    for key, value in tokenizer.items():
        if key.startswith("tokenizer.") and isinstance(value, tuple):
            writer.add_array(key, list(value))
        elif key.startswith("tokenizer.ggml.") and isinstance(value, str):
            writer.add_string(key, value)
        if key == "tokenizer.ggml.tokens":
            vocabulary = len(value)
    hybrid = any("ssm_a" in layer for layer in LAYERS[name])
    numbers: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": EMBD,
        "feed_forward_length": FF,
        "block_count": 2,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": DIM,
        "attention.value_length": DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": DIM // 2 if hybrid else DIM,
        "rope.freq_base": 10000.0,
        "vocab_size": vocabulary,
    }
    if any("inp" in tensor for layer in LAYERS[name] for tensor in layer):
        numbers |= {
            "expert_count": EXPERTS,
            "expert_used_count": 2,
            "expert_feed_forward_length": EXPERT_FF,
            "expert_shared_feed_forward_length": EXPERT_FF,
        }
        if name == "llama-experts":
            numbers["feed_forward_length"] = EXPERT_FF
            del numbers["expert_shared_feed_forward_length"]
    if hybrid:
        numbers |= {
            "ssm.conv_kernel": 4,
            "ssm.state_size": STATE,
            "ssm.group_count": GROUPS,
            "ssm.time_step_rank": RANK,
            "ssm.inner_size": INNER,
            "full_attention_interval": 2,
        }
        if architecture.startswith("qwen35"):
            writer.add_array(f"{architecture}.rope.dimension_sections", [3, 3, 2, 0])
    for key, value in (numbers | _MORE.get(architecture, {}) | dict(more or {})).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add = writer.add_string if isinstance(value, str) else add
        add(f"{architecture}.{key}", value)

    def tensor(full: str, shape: tuple[int, ...]) -> None:
        if "norm" in full:
            values = np.exp(0.5 * rng.standard_normal(shape))
        elif full.endswith("ssm_a"):
            values = -np.exp(0.3 * rng.standard_normal(shape))
        elif len(shape) == 1 and "shexp" not in full:
            values = 0.3 * rng.standard_normal(shape)
        else:
            values = 1.5 * rng.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(full, values.astype(np.float32))

    tensor("token_embd.weight", (vocabulary, EMBD))
    tensor("output_norm.weight", (EMBD,))
    if architecture not in ("gemma", "gemma2"):
        tensor("output.weight", (vocabulary, EMBD))
    for number, layer in enumerate(LAYERS[name]):
        for part, shape in layer.items():
            tensor(f"blk.{number}.{part}", shape)
    for full, values in (extra or {}).items():
        writer.add_tensor(full, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

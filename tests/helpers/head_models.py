"""Models of random weights with heads of any size, whose attention is sharp: what is lost of K shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, FF, LAYERS, TOKENS = 128, 192, 2, 128
#: How much larger the weights of Q are than they would have to be for scores of variance 1.
SHARP = 1.0


def _write(path: Path, arch: str, numbers: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    """A model of LAYERS layers with these tensors each, shapes as numpy has them."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", "test")
    writer.add_array("tokenizer.ggml.tokens", [f"tok_{i}" for i in range(TOKENS)])
    writer.add_array("tokenizer.ggml.scores", [0.0] * TOKENS)
    usual = {
        "vocab_size": TOKENS,
        "context_length": 1024,
        "embedding_length": WIDTH,
        "feed_forward_length": FF,
        "block_count": LAYERS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    for key, value in (usual | numbers).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)

    def tensor(name: str, shape: tuple[int, ...]) -> None:
        values = rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) > 1 else np.ones(shape)
        values *= SHARP if ".attn_q." in name else 1
        writer.add_tensor(name, values.astype(np.float32))

    tensor("token_embd.weight", (TOKENS, WIDTH))
    tensor("output_norm.weight", (WIDTH,))
    tensor("output.weight", (TOKENS, WIDTH))
    feed_forward = {
        "ffn_norm": (WIDTH,),
        "ffn_gate": (FF, WIDTH),
        "ffn_up": (FF, WIDTH),
        "ffn_down": (WIDTH, FF),
    }
    for layer in range(LAYERS):
        for name, shape in ({"attn_norm": (WIDTH,)} | shapes | feed_forward).items():
            tensor(f"blk.{layer}.{name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ordinary(path: Path, size: int, *, heads: int = 4, kv_heads: int = 2) -> Path:
    """Architecture llama with heads of ``size`` values."""
    numbers = {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }
    shapes = {
        "attn_q": (heads * size, WIDTH),
        "attn_k": (kv_heads * size, WIDTH),
        "attn_v": (kv_heads * size, WIDTH),
        "attn_output": (WIDTH, heads * size),
    }
    return _write(path, "llama", numbers, shapes)


def latent(path: Path, v: int = 512, rope: int = 64, *, heads: int = 4) -> Path:
    """Architecture deepseek2 with MLA: K is ``v`` latent values, which V is a view of, and ``rope`` more."""
    nope, out = 64, 64
    numbers = {
        "attention.head_count_kv": 1,
        "attention.key_length": v + rope,
        "attention.value_length": v,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": out,
    }
    shapes = {"attn_k_b": (heads, v, nope), "attn_v_b": (heads, out, v)}
    return _compressed(path, v, nope, rope, out, heads, numbers, shapes)


def expanded(path: Path, nope: int, rope: int, v: int, *, heads: int = 4) -> Path:
    """The same architecture with K and V as they are computed from the latent values: ``nope`` and ``rope``
    values of K, the latter turned by RoPE, and ``v`` of V."""
    numbers = {
        "attention.head_count_kv": heads,
        "attention.key_length": nope + rope,
        "attention.value_length": v,
    }
    return _compressed(path, 256, nope, rope, v, heads, numbers, {"attn_kv_b": (heads * (nope + v), 256)})


def _compressed(
    path: Path,
    rank: int,
    nope: int,
    rope: int,
    out: int,
    heads: int,
    numbers: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> Path:
    numbers |= {
        "attention.head_count": heads,
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        "leading_dense_block_count": LAYERS,
        "expert_feed_forward_length": FF,
        "expert_shared_count": 1,
    }
    shapes |= {
        "attn_q": (heads * (nope + rope), WIDTH),
        "attn_kv_a_mqa": (rank + rope, WIDTH),
        "attn_kv_a_norm": (rank,),
        "attn_output": (WIDTH, heads * out),
    }
    return _write(path, "deepseek2", numbers, shapes)

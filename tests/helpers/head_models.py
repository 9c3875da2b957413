"""Models of random weights with heads of any size, whose attention is sharp: what is lost of K shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, FF, LAYERS, TOKENS = 128, 192, 2, 128
#: How much larger the weights of Q are than they would have to be for scores of variance 1.
SHARP = 1.0


Shapes = dict[str, tuple[int, ...]]


def _write(
    path: Path,
    arch: str,
    numbers: dict[str, Any],
    *layers: Shapes,
    width: int = WIDTH,
    others: Shapes | None = None,
) -> Path:
    """A model with these tensors in its layers, shapes as numpy has them: LAYERS of one kind, or one of each;
    and ``others`` in no layer, of which those without a shape are left out."""
    layers = layers * LAYERS if len(layers) == 1 else layers
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", "test")
    writer.add_array("tokenizer.ggml.tokens", [f"tok_{i}" for i in range(TOKENS)])
    writer.add_array("tokenizer.ggml.scores", [0.0] * TOKENS)
    usual = {
        "vocab_size": TOKENS,
        "context_length": 1024,
        "embedding_length": width,
        "feed_forward_length": FF,
        "block_count": len(layers),
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    for key, value in (usual | numbers).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_array if isinstance(value, list) else add)(f"{arch}.{key}", value)

    def tensor(name: str, shape: tuple[int, ...]) -> None:
        values = rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) > 1 else np.ones(shape)
        values *= SHARP if ".attn_q." in name else 1
        values /= np.sqrt(shape[-1]) if ".attn_q_norm." in name else 1  # scores have no scale beside it
        writer.add_tensor(name, values.astype(np.float32))

    usual_tensors = {"token_embd": (TOKENS, width), "output_norm": (width,), "output": (TOKENS, width)}
    for name, shape in (usual_tensors | (others or {})).items():
        if shape:
            tensor(f"{name}.weight", shape)
    feed_forward = {
        "ffn_norm": (width,),
        "ffn_gate": (FF, width),
        "ffn_up": (FF, width),
        "ffn_down": (width, FF),
    }
    for layer, shapes in enumerate(layers):
        for name, shape in ({"attn_norm": (width,)} | shapes | feed_forward).items():
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


def gemma4(path: Path, window: int = 256, whole: int = 512, *, heads: int = 4) -> Path:
    """Architecture gemma4: heads of ``window`` values in layers that see a window of 128 tokens, and of
    ``whole`` in others, one after the other, and two layers that read the K and V of two before them."""
    own = [_of_gemma4(head, heads, width=WIDTH, keeps=True) for head in (window, whole)]
    read = [_of_gemma4(head, heads, width=WIDTH, keeps=False) for head in (window, whole)]
    numbers = _numbers_of_gemma4(window, whole, heads) | {"attention.shared_kv_layers": 2}
    return _write(path, "gemma4", numbers, *own, *read, others={"rope_freqs": (whole // 2,)})


def gemma4_assistant(path: Path, window: int = 256, whole: int = 512, *, heads: int = 4) -> Path:
    """A draft for ``gemma4`` with the same heads, which reads its cache: two layers, half as wide."""
    width = WIDTH // 2
    layers = [_of_gemma4(head, heads, width=width, keeps=False) for head in (window, whole)]
    for layer in layers:
        layer["layer_output_scale"] = (1,)
    numbers = _numbers_of_gemma4(window, whole, heads) | {"attention.shared_kv_layers": 2}
    numbers |= {"nextn_predict_layers": 2, "embedding_length_out": WIDTH}
    numbers["attention.sliding_window_pattern"] = [True, False]
    others: Shapes = {
        "output": (),
        "rope_freqs": (whole // 2,),
        "nextn.pre_projection": (width, 2 * WIDTH),
        "nextn.post_projection": (WIDTH, width),
    }
    return _write(path, "gemma4-assistant", numbers, *layers, width=width, others=others)


def _numbers_of_gemma4(window: int, whole: int, heads: int) -> dict[str, Any]:
    lengths = {
        f"attention.{side}_length{which}": size
        for side in ("key", "value")
        for which, size in (("", whole), ("_swa", window))
    }
    return lengths | {
        "attention.head_count": heads,
        "attention.head_count_kv": 2,
        "attention.sliding_window": 128,
        "attention.sliding_window_pattern": [True, False] * 2,
        "embedding_length_per_layer_input": 0,
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": window,
        "rope.freq_base_swa": 10000.0,
    }


def _of_gemma4(head: int, heads: int, *, width: int, keeps: bool) -> Shapes:
    shapes: Shapes = {
        "attn_q": (heads * head, width),
        "attn_output": (width, heads * head),
        "attn_q_norm": (head,),
        "post_attention_norm": (width,),
        "post_ffw_norm": (width,),
    }
    k_and_v: Shapes = {"attn_k": (2 * head, width), "attn_v": (2 * head, width), "attn_k_norm": (head,)}
    return shapes | k_and_v if keeps else shapes


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
    shapes: Shapes,
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

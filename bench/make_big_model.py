"""Write a Qwen3 model of random weights in Hugging Face form, as large as asked for, to try the factory on.

The tokenizer is an embedded model's. Weights are written as they are made, a tensor at a time, in shards, so
that the memory it takes does not depend on the size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path

import numpy as np

from ggufrq.models.resolve import embedded_models

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2048, 6144, 16, 8, 128
SHARD_BYTES = 1 << 30
TOKENIZER = "docs-qwen3-8m"


def layer(i: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer, output features first."""
    base = f"model.layers.{i}."
    return {
        base + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        base + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        base + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        base + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        base + "self_attn.q_norm.weight": (HEAD_DIM,),
        base + "self_attn.k_norm.weight": (HEAD_DIM,),
        base + "mlp.gate_proj.weight": (FFN, HIDDEN),
        base + "mlp.up_proj.weight": (FFN, HIDDEN),
        base + "mlp.down_proj.weight": (HIDDEN, FFN),
        base + "input_layernorm.weight": (HIDDEN,),
        base + "post_attention_layernorm.weight": (HIDDEN,),
    }


def size(shape: tuple[int, ...]) -> int:
    """Bytes in bfloat16."""
    return 2 * int(np.prod(shape))


def weights(shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Ones for a norm, normal values for a matrix, in bfloat16."""
    if len(shape) == 1:
        values = np.ones(shape, np.float32)
    else:
        values = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the weights")
    args = parser.parse_args()

    source = embedded_models()[TOKENIZER]
    config = json.loads((source / "config.json").read_text())
    per_layer = sum(map(size, layer(0).values()))
    layers = max(1, round((args.gigabytes * 1e9 - 4 * config["vocab_size"] * HIDDEN) / per_layer))
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    config.pop("layer_types", None)
    args.out.mkdir(parents=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    for path in source.iterdir():
        if path.suffix == ".json" and not path.name.startswith(("config", "model", "training")):
            shutil.copyfile(path, args.out / path.name)

    vocabulary = (config["vocab_size"], HIDDEN)
    tensors = {
        "model.embed_tokens.weight": vocabulary,
        "lm_head.weight": vocabulary,
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        tensors |= layer(i)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if sum(map(size, shards[-1].values())) + size(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    rng = np.random.default_rng(1)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(shard, file_name)
        header, at = {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size(shape)]}
            at += size(shape)
        text = json.dumps(header).encode()
        with (args.out / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for shape in shard.values():
                file.write(weights(shape, rng))
    (args.out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    total = sum(map(size, tensors.values())) / 1e9
    print(f"{args.out}: {layers} layers, {total:.2f} GB in {len(shards)} shards")


if __name__ == "__main__":
    main()

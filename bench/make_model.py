"""Write a llama model of random weights in which attention weighs what it weighs in an 8B.

Four layers with 32 query heads and 8 KV heads of 128, as Llama 3.1 8B has them, and narrow matrices beside
them, so that the time of a token at depth is the time of its attention. For speed only: it has no tokenizer.
"""

from __future__ import annotations

import argparse

import gguf
import numpy as np

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 32, 8, 128  # with other heads as many values in all
EMBD, FF, VOCAB = 512, 1024, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="the GGUF file to write")
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    args = parser.parse_args()
    dim = args.head_dim

    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_name("random weights")
    writer.add_context_length(args.context)
    writer.add_embedding_length(EMBD)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS * HEAD_DIM // dim)
    writer.add_head_count_kv(KV_HEADS * HEAD_DIM // dim)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        """Q8_0 of normal values; rows as numpy counts them (output features first)."""
        values = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", VOCAB, EMBD)
    for i in range(LAYERS):
        matrix(f"blk.{i}.attn_q.weight", HEADS * HEAD_DIM, EMBD)
        matrix(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD_DIM, EMBD)
        matrix(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD_DIM, EMBD)
        matrix(f"blk.{i}.attn_output.weight", EMBD, HEADS * HEAD_DIM)
        matrix(f"blk.{i}.ffn_gate.weight", FF, EMBD)
        matrix(f"blk.{i}.ffn_up.weight", FF, EMBD)
        matrix(f"blk.{i}.ffn_down.weight", EMBD, FF)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(EMBD, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(EMBD, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

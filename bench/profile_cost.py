"""Time and memory of a profile from the weights, for a model of random weights with the attention of an 8B.

36 layers with 32 query heads and 8 KV heads of 128 and QK-norm, as Qwen3 8B has them, in Q4_0; only the
tensors of attention are written, since a profile reads no others. For a machine that is idle (POSIX).

    python bench/profile_cost.py --positions 32768
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

LAYERS, HEADS, KV_HEADS, HEAD_DIM, EMBD, FF, VOCAB = 36, 32, 8, 128, 4096, 12288, 1024
_BLOCK, _BLOCK_BYTES = 32, 18  # Q4_0


def write(out: Path) -> None:
    """The model as a GGUF file."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_context_length(40960)
    writer.add_embedding_length(EMBD)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for i in range(LAYERS):
        for name, rows, columns in (
            ("q", HEADS * HEAD_DIM, EMBD),
            ("k", KV_HEADS * HEAD_DIM, EMBD),
            ("v", KV_HEADS * HEAD_DIM, EMBD),
            ("output", EMBD, HEADS * HEAD_DIM),
        ):
            data = rng.integers(0, 256, (rows, columns // _BLOCK, _BLOCK_BYTES), dtype=np.uint8)
            data[:, :, :2] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
            writer.add_tensor(
                f"blk.{i}.attn_{name}.weight",
                data.reshape(rows, -1),
                raw_dtype=gguf.GGMLQuantizationType.Q4_0,
            )
        for name, size in (("attn_norm", EMBD), ("attn_q_norm", HEAD_DIM), ("attn_k_norm", HEAD_DIM)):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=32768)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.gguf")
        # in a process of its own: memory of this one would count for the one that is measured
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(model,))
        writer.start()
        writer.join()
        command = [sys.executable, "-m", "ggufrq", "where", "profile", str(model), "-c", str(args.positions)]
        # a cache of its own, since profiles are kept
        environment = {**os.environ, "GGUFRQ_CACHE": str(Path(folder, "cache"))}
        started = time.perf_counter()
        _, status, used = os.wait4(subprocess.Popen(command, env=environment).pid, 0)
        seconds = time.perf_counter() - started
    if status:
        sys.exit("error: no profile was made")
    peak = used.ru_maxrss / 1024
    print(
        f"{LAYERS} layers, {args.positions} positions: {seconds:.1f} s with the start, {peak:.0f} MiB at most"
    )


if __name__ == "__main__":
    main()

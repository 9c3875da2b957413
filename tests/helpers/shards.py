"""GGUF models of several files, of a few bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def split_model(stem: Path, count: int, *, layers: int = 2, head: int = 128) -> list[Path]:
    """A model of ``count`` shards called after ``stem``, with a tensor in each, heads of ``head`` values, and
    its metadata in the first alone."""
    made = []
    for number in range(count):
        path = stem.with_name(f"{stem.name}-{number + 1:05d}-of-{count:05d}.gguf")
        writer = gguf.GGUFWriter(path, "qwen3")
        if number == 0:
            writer.add_block_count(layers)
            writer.add_context_length(4096)
            writer.add_embedding_length(2 * head)
            writer.add_feed_forward_length(4 * head)
            writer.add_head_count(2)
            writer.add_head_count_kv(1)
            writer.add_key_length(head)
            writer.add_value_length(head)
        else:
            writer.kv_data[0].pop("general.architecture")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        writer.add_tensor(f"blk.{number}.attn_norm.weight", np.ones(2 * head, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        made.append(path)
    return made

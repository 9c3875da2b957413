"""A model with a head for further tokens, made from one without: its last layer with attention once more."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def with_head(model: Path, out: Path) -> Path:
    """Write ``model`` with one more layer that guesses the token after next from the embedding of the next
    one and what the model makes of the last, half of each."""
    reader = gguf.GGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == f"{arch}.block_count":
            value += 1
        if field.name == f"{arch}.attention.recurrent_layers":
            value = [*value, False]
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], sub)
    writer.add_uint32(f"{arch}.nextn_predict_layers", 1)
    names = [tensor.name for tensor in reader.tensors]
    layers = sum(name.endswith(".attn_norm.weight") for name in names)
    last = max(int(name.split(".")[1]) for name in names if name.endswith(".attn_q.weight"))
    width = 0
    for tensor in reader.tensors:
        copies = [tensor.name]
        if tensor.name.startswith(f"blk.{last}."):
            copies.append(tensor.name.replace(f"blk.{last}.", f"blk.{layers}.", 1))
        for name in copies:
            writer.add_tensor(name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        width = int(tensor.shape[0]) if tensor.name == "output_norm.weight" else width
    half = 0.5 * np.eye(width, dtype=np.float32)
    writer.add_tensor(f"blk.{layers}.nextn.eh_proj.weight", np.hstack([half, half]))
    for name in ("enorm", "hnorm"):
        writer.add_tensor(f"blk.{layers}.nextn.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out

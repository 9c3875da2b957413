"""What guesses tokens ahead for a model, made from its own layers: a head, an EAGLE-3 and a DFlash draft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: A layer of a model of architecture qwen3.
_LAYER = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip


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


def eagle(model: Path, out: Path) -> Path:
    """Write an EAGLE-3 draft for ``model`` (architecture qwen3): its last layer, which reads the embedding of
    the next token and what three layers were given, half of each."""
    found = _Weights(model)
    layer = found.layer(found.layers - 1)
    half = {name: 0.5 * np.hstack([layer[name]] * 2) for name in ("attn_q", "attn_k", "attn_v")}
    norms = {"attn_norm_2": layer["attn_norm"]}
    kept = {name: layer[name] for name in layer if not name.endswith(("q_norm", "k_norm"))}
    tensors = {f"blk.0.{name}.weight": value for name, value in (kept | half | norms).items()}
    third = np.eye(found.width, dtype=np.float32) / 3
    tensors |= {"fc.weight": np.hstack([third] * 3), "output_norm.weight": found["output_norm.weight"]}
    numbers = {"target_layers": [1, found.layers // 2, found.layers - 1], "target_hidden_size": found.width}
    return found.write(out, "eagle3", 1, numbers, tensors)


def dflash(model: Path, out: Path) -> Path:
    """Write a DFlash draft for ``model`` (architecture qwen3): its last two layers, which read what two
    others were given beside the tokens, in blocks of four."""
    found = _Weights(model)
    tensors = {
        f"blk.{i}.{name}.weight": value
        for i, il in enumerate((found.layers - 2, found.layers - 1))
        for name, value in found.layer(il).items()
    }
    half = 0.5 * np.eye(found.width, dtype=np.float32)
    norm = found["output_norm.weight"]
    tensors |= {
        "fc.weight": np.hstack([half] * 2),
        "enc.output_norm.weight": norm,
        "output_norm.weight": norm,
    }
    numbers = {"target_layers": [1, found.layers - 1], "block_size": 4}
    return found.write(out, "dflash", 2, numbers, tensors, {"tokenizer.ggml.mask_token_id": 0})


class _Weights:
    """The tensors of a model in f32, by name, and its metadata."""

    def __init__(self, model: Path) -> None:
        self._reader = gguf.GGUFReader(model)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.layers = int(self._number("block_count"))
        self.width = int(self._number("embedding_length"))

    def _number(self, key: str) -> Any:
        return self._reader.fields[f"qwen3.{key}"].contents()

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def layer(self, il: int) -> dict[str, np.ndarray]:
        """The tensors of a layer by their short names."""
        return {name: self[f"blk.{il}.{name}.weight"] for name in _LAYER}

    def write(
        self,
        out: Path,
        arch: str,
        layers: int,
        numbers: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        more: Mapping[str, int] | None = None,
    ) -> Path:
        """A GGUF of another architecture with metadata and vocabulary of the model."""
        writer = gguf.GGUFWriter(out, arch)
        for field in self._reader.fields.values():
            own = field.name.startswith("qwen3.")
            if not own and not field.name.startswith("tokenizer."):
                continue
            value = layers if field.name == "qwen3.block_count" else field.contents()
            sub = field.types[-1] if len(field.types) > 1 else None
            name = field.name.replace("qwen3.", f"{arch}.", 1) if own else field.name
            if name not in (more or {}):
                writer.add_key_value(name, value, field.types[0], sub)
        for key, value in numbers.items():
            add = writer.add_array if isinstance(value, list) else writer.add_uint32
            add(f"{arch}.{key}", value)
        for key, value in (more or {}).items():
            writer.add_uint32(key, value)
        for name, value in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return out

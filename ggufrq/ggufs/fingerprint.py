"""What names a model, whatever it was quantized to."""

from __future__ import annotations

from pathlib import Path

from ggufrq.ggufs.files import shards
from ggufrq.ggufs.header import read_header

_OFFSET, _PRIME = 0xCBF29CE484222325, 0x100000001B3  # FNV-1a, 64 bits
_LAST_NORMS = ("output_norm.weight", "token_embd_norm.weight")  # the second name is that of LFM2


def fingerprint(model: Path) -> str:
    """What names a model whatever its quantization: the hash of architecture, layers, width and last norm.
    Any shard names it. The patched llama.cpp computes the same (src/llama-rq-profile.cpp)."""
    header = read_header(shards(model)[0])  # the others have tensors only
    arch = str(header.values.get("general.architecture", ""))
    blocks, width = (header.values.get(f"{arch}.{key}", 0) for key in ("block_count", "embedding_length"))
    return f"{_hash(f'{arch}/{blocks}/{width}/'.encode() + _last_norm(model)):016x}"


def _hash(data: bytes) -> int:
    value = _OFFSET
    for byte in data:
        value = (value ^ byte) * _PRIME & 0xFFFFFFFFFFFFFFFF
    return value


def _last_norm(model: Path) -> bytes:
    """The bytes of the norm before the output, empty when there is none."""
    found: dict[str, bytes] = {}
    for part in shards(model):
        header = read_header(part)
        for tensor in header.tensors:
            if tensor.name in _LAST_NORMS:
                with part.open("rb") as file:
                    file.seek(header.data_offset + tensor.offset)
                    found[tensor.name] = file.read(tensor.values * {0: 4, 1: 2, 30: 2}.get(tensor.type, 0))
    return next((found[name] for name in _LAST_NORMS if name in found), b"")

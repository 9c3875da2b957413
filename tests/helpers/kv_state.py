"""K and V as llama.cpp computed them, from a file that its programs save their state in.

Two kinds of files are read: those of ``llama-completion --prompt-cache`` (a whole context) and of
llama-server's ``action=save`` (one slot). Their layout belongs to the pinned llama.cpp: another version of it
is refused. Read from ``llama_context::state_save_file``, ``state_seq_save_file`` and
``llama_kv_cache::state_write`` there.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.files import model_header
from ggufrq.ggufs.header import Header
from ggufrq.ggufs.memory_shape import Layer, layers_of

_CONTEXT = (0x6767736E, 10)  # magic and version of a whole context
_SEQUENCE = (0x67677371, 3)  # and of one sequence
_PACKED = (-1, 1)  # mark and version of a list of tokens as llama-server packs it
_FLOATS: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # by ggml's numbers of types
_EXTENSION = 12  # bytes per cell of models with positions in several dimensions
_LAYER = re.compile(r"blk\.(\d+)\.(attn_k|attn_qkv|ssm_\w+)\.")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class KvLayer:
    """K and V of one layer, each [tokens, n_head_kv, head_dim], float16 or float32 as they were kept, K after
    RoPE. Read-only."""

    k: Array
    v: Array


@dataclass(frozen=True)
class KvState:
    """The tokens that a state has K and V of and, by the number of the layer in the model, their K and V."""

    tokens: tuple[int, ...]
    layers: dict[int, KvLayer]


def read_kv_state(path: Path, model: Path) -> KvState:
    """K and V in the state file ``path`` that was saved with the GGUF ``model``, K and V in f16 or f32, flash
    attention on, and one sequence. Recurrent state is skipped. The arrays are read from disk when they are
    used.

    Raises ModelError when the file is damaged, of another version of llama.cpp or of another model, and for
    models that keep K and V in another way (sliding windows, compressed, shared between layers).
    """
    header = model_header(model)
    shape = _Shape.of(header, model)
    reader = _Reader(path)
    tokens = reader.begin(shape.architecture)
    cells = reader.cells()
    if cells not in (
        len(tokens),
        len(tokens) - 1,
    ):  # llama-completion saves before the last token of a prompt
        raise reader.error(f"holds {cells} tokens in its cache, but {len(tokens)} in its list")
    transposed, layers = reader.take("<II")
    if transposed:
        raise reader.error("was saved without flash attention")
    if layers != len(shape.layers):
        raise reader.error(f"has {layers} layers with K and V, but {model.name} has {len(shape.layers)}")
    keys = [reader.rows(cells, layer.k, layer.head_k) for layer in shape.layers.values()]
    values = [reader.rows(cells, layer.v, layer.head_v) for layer in shape.layers.values()]
    if reader.rest and not shape.recurrent:
        raise reader.error(f"goes on for {reader.rest} bytes after K and V")
    return KvState(
        tokens[:cells], {il: KvLayer(k, v) for il, k, v in zip(shape.layers, keys, values, strict=True)}
    )


def check_model(model: Path) -> None:
    """Raise ModelError when K and V of the GGUF ``model`` cannot be read from a state."""
    _Shape.of(model_header(model), model)


def attention_layers(header: Header) -> tuple[int, ...]:
    """Numbers of the layers that keep K and V, in the order of the cache, from the header of a model."""
    arch = header.values.get("general.architecture", "")
    blocks = header.values.get(f"{arch}.block_count", 0)
    blocks -= header.values.get(f"{arch}.nextn_predict_layers", 0)
    has: dict[str, set[int]] = {"k": set(), "ssm": set(), "qkv": set()}
    for tensor in header.tensors:
        found = _LAYER.match(tensor.name)
        if found and int(found[1]) < blocks:
            has[found[2].removeprefix("attn_").partition("_")[0]].add(int(found[1]))
    # a layer with a state-space part names its own projections attn_qkv
    return tuple(sorted(has["k"] | (has["qkv"] - has["ssm"])))


@dataclass(frozen=True)
class _Shape:
    architecture: str
    layers: dict[int, Layer]
    recurrent: bool

    @classmethod
    def of(cls, header: Header, model: Path) -> _Shape:
        values = header.values
        arch = str(values.get("general.architecture", ""))
        for key, what in (
            ("attention.sliding_window", "sliding windows"),
            ("attention.kv_lora_rank", "compressed K and V"),
            ("attention.shared_kv_layers", "K and V shared between layers"),
        ):
            if values.get(f"{arch}.{key}"):
                raise ModelError(f"K and V cannot be read from a state of {model.name}: it has {what}")
        every = layers_of(values)
        layers = {il: every[il] for il in attention_layers(header) if every[il].k and every[il].v}
        if not layers:
            raise ModelError(f"{model.name} does not say how it keeps K and V")
        return cls(arch, layers, any(".ssm_" in tensor.name for tensor in header.tensors))


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            self.data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing") from None
        self.at = 0

    @property
    def rest(self) -> int:
        return len(self.data) - self.at

    def error(self, what: str) -> ModelError:
        return ModelError(f"the state {self.path} {what}", remedy="save it again with this llama.cpp")

    def skip(self, length: int) -> Array:
        if length > self.rest:
            raise self.error("ends too early")
        self.at += length
        return self.data[self.at - length : self.at]

    def take(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(code, self.skip(struct.calcsize(code)).tobytes())

    def begin(self, architecture: str) -> tuple[int, ...]:
        """What comes before K and V: the tokens."""
        if self.rest < 12:
            raise self.error("is no saved state")
        kind = self.take("<II")
        if kind not in (_CONTEXT, _SEQUENCE):
            known = kind[0] in (_CONTEXT[0], _SEQUENCE[0])
            raise self.error(f"is of version {kind[1]}, not {_CONTEXT[1]}" if known else "is no saved state")
        (count,) = self.take("<I")
        tokens = self._plain(self.skip(4 * count).view("<i4").tolist())
        if kind == _CONTEXT:
            (length,) = self.take("<I")
            name = self.skip(length).tobytes().decode(errors="replace")
            if name != architecture:
                raise self.error(f"is of a {name} model, not {architecture}")
        (streams,) = self.take("<I")
        if streams != 1:
            raise self.error("holds several sequences, or K or V in a type of ggufrq; use f16")
        return tokens

    def _plain(self, tokens: list[int]) -> tuple[int, ...]:
        """Tokens without what llama-server packs around them: a mark, a version, how many, and no images."""
        if not tokens or tokens[0] != _PACKED[0]:
            return tuple(tokens)
        count = tokens[2] if len(tokens) > 2 else -1
        if tuple(tokens[:2]) != _PACKED or tokens[3 + count :] != [0]:
            raise self.error("has a list of tokens of another version, or images among them")
        return tuple(tokens[3 : 3 + count])

    def cells(self) -> int:
        """Skips the positions and returns how many cells there are. Some models have an extension in each
        cell: the one reading of the two that gives one sequence with ascending positions is right."""
        count = int(self.take("<I")[0])
        start = self.at
        for extension in (0, _EXTENSION):
            # position, how many sequences (1), extension, sequence (0)
            record = 12 + extension
            if record * count > len(self.data) - start:
                continue
            table = self.data[start : start + record * count].reshape(count, record)
            words = np.ascontiguousarray(table).view("<i4")
            positions, sequences, owner = words[:, 0], words[:, 1], words[:, -1]
            if (sequences == 1).all() and (owner == 0).all() and (np.diff(positions) >= 0).all():
                self.at = start + record * count
                return count
        raise self.error("does not hold one sequence from its start")

    def rows(self, cells: int, width: int, dim: int) -> Array:
        """K or V of one layer, ``width`` values of a token in heads of ``dim``: [cells, heads, dim]."""
        kind, row = self.take("<iQ")
        dtype = _FLOATS.get(kind)
        if dtype is None:
            raise self.error("keeps K or V in another type than f16 or f32")
        if row != width * dtype.itemsize:
            raise self.error(f"has rows of {row} bytes, which are not {width // dim} heads of {dim} values")
        rows: Array = self.skip(row * cells).view(dtype)
        return rows.reshape(cells, width // dim, dim)

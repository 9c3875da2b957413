"""The file of a profile, ``NAME-kv.gguf``: per layer and head of K a matrix for K, its inverse for the
queries, and a mean.

Metadata: ``general.architecture`` and ``general.type`` are ``kv-profile``, ``rq.profile.version`` is 1,
``rq.profile.model`` names the model whatever its quantization, ``rq.profile.source`` tells what the moments
are from, ``rq.profile.tokens`` of how many tokens of text (there where it is one),
``rq.profile.n_ctx`` over how many positions they are averaged. Tensors in 32 bits, shapes as numpy
has them: ``blk.N.k_map`` and ``blk.N.q_map`` [n_head_kv, head_dim, head_dim], symmetric, and ``blk.N.k_mean``
[n_head_kv, head_dim], the mean of K behind RoPE, where it is taken out. Stored is R · k_map · (k - k_mean),
queries are multiplied by R · q_map, R being the rotation of the type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from ggufrq import __version__
from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError, ModelError
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import Header, TensorInfo, read_header

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

KIND = "kv-profile"
VERSION = 1
#: What the moments are from: the weights alone, a text, or random tokens.
Source = Literal["weights", "text", "tokens"]
SOURCES: tuple[Source, ...] = ("weights", "text", "tokens")

_AGAIN = "make it again: ggufrq calibrate"
_TENSOR = re.compile(r"^blk\.(\d+)\.(k_map|q_map|k_mean)$")
_MODEL = re.compile(r"^[0-9a-f]{16}$")
#: How far k_map · q_map may be from the identity, and a map from symmetric, in parts of its largest value.
_INVERSE, _SYMMETRIC = 1e-3, 1e-5


@dataclass(frozen=True)
class LayerProfile:
    """A layer: ``k_map`` and its inverse ``q_map`` [heads, dim, dim], and ``k_mean`` [heads, dim] or None.
    ``gain`` [heads] is by how much the metric makes the foretold noise smaller; known only where it was just
    made."""

    k_map: F32
    q_map: F32
    k_mean: F32 | None = None
    gain: F64 | None = None


@dataclass(frozen=True)
class Profile:
    """A profile: the model's fingerprint, what it was made from, over how many positions, and the layers with
    K."""

    model: str
    source: Source
    n_ctx: int
    layers: dict[int, LayerProfile]
    tokens: int = 0

    def write(self, path: Path) -> None:
        """Write it, under another name first. Raises GgufrqError when that fails or it is not sound."""
        import gguf

        _check(self, str(path))
        try:
            with paths.atomic_path(path) as temporary:
                writer = gguf.GGUFWriter(temporary, KIND)
                writer.add_type(KIND)
                writer.add_string("general.generated_by", f"ggufrq {__version__}")
                writer.add_uint32("rq.profile.version", VERSION)
                writer.add_string("rq.profile.model", self.model)
                writer.add_string("rq.profile.source", self.source)
                writer.add_uint32("rq.profile.n_ctx", self.n_ctx)
                if self.tokens:
                    writer.add_uint32("rq.profile.tokens", self.tokens)
                for il, layer in sorted(self.layers.items()):
                    writer.add_tensor(f"blk.{il}.k_map", layer.k_map)
                    writer.add_tensor(f"blk.{il}.q_map", layer.q_map)
                    if layer.k_mean is not None:
                        writer.add_tensor(f"blk.{il}.k_mean", layer.k_mean)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
                writer.close()
        except OSError as error:
            raise GgufrqError(f"cannot write {path}: {error.strerror}") from error


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ModelError when the file is missing, damaged, no profile, of another version, or
    not sound: shapes that do not fit, values that are not finite, maps that are not each other's inverse."""
    read_gguf(path)
    header = read_header(path)
    values = header.values
    if values.get("general.type") != KIND:
        kind = values.get("general.type") or values.get("general.architecture") or "of no type"
        raise ModelError(f"{path} is no profile of a KV cache but {kind}", remedy=_AGAIN)
    if values.get("rq.profile.version") != VERSION:
        raise ModelError(
            f"{path} is a profile of version {values.get('rq.profile.version')}, but {VERSION} is read here",
            remedy=_AGAIN,
        )
    model, source, n_ctx = (values.get(f"rq.profile.{key}") for key in ("model", "source", "n_ctx"))
    tokens = values.get("rq.profile.tokens", 0)
    if not isinstance(model, str) or source not in SOURCES or not isinstance(n_ctx, int):
        raise ModelError(f"{path} does not say of which model it is and how it was made", remedy=_AGAIN)
    found: dict[int, dict[str, F32]] = {}
    for tensor in header.tensors:
        name = _TENSOR.match(tensor.name)
        if name is None or tensor.type != 0:
            raise ModelError(f"{path} has a tensor that no profile has, {tensor.name}", remedy=_AGAIN)
        found.setdefault(int(name[1]), {})[name[2]] = _values(path, header, tensor)
    for il, parts in found.items():
        if not {"k_map", "q_map"} <= parts.keys():
            raise ModelError(f"{path} is not whole: layer {il} lacks a map", remedy=_AGAIN)
    layers = {il: LayerProfile(p["k_map"], p["q_map"], p.get("k_mean")) for il, p in sorted(found.items())}
    profile = Profile(model, cast(Source, source), n_ctx, layers, tokens if isinstance(tokens, int) else 0)
    _check(profile, str(path))
    return profile


def _values(path: Path, header: Header, tensor: TensorInfo) -> F32:
    with path.open("rb") as file:
        file.seek(header.data_offset + tensor.offset)
        data = np.frombuffer(file.read(4 * tensor.values), "<f4").astype(np.float32)
    return data.reshape(tuple(reversed(tensor.shape)))


def _check(profile: Profile, name: str) -> None:
    """Raises ModelError when the profile is not sound."""
    if not _MODEL.match(profile.model) or profile.n_ctx < 1 or not profile.layers:
        raise ModelError(f"{name} does not say of which model it is, or has no layers", remedy=_AGAIN)
    for il, layer in profile.layers.items():
        why = _wrong(layer)
        if why:
            raise ModelError(f"{name} cannot be used: in layer {il} {why}", remedy=_AGAIN)


def _wrong(layer: LayerProfile) -> str | None:
    """What is wrong with a layer, None when it is sound."""
    shape = layer.k_map.shape
    if len(shape) != 3 or shape[1] != shape[2] or layer.q_map.shape != shape:
        return f"the maps have shapes {shape} and {layer.q_map.shape}, which do not fit"
    if layer.k_mean is not None and layer.k_mean.shape != shape[:2]:
        return f"the mean has shape {layer.k_mean.shape}, which does not fit maps of {shape}"
    parts = [layer.k_map, layer.q_map, *([] if layer.k_mean is None else [layer.k_mean])]
    if any(part.dtype != np.float32 or not np.isfinite(part).all() for part in parts):
        return "there are values that are no finite numbers"
    for part in parts[:2]:
        off = np.abs(part - np.swapaxes(part, 1, 2)).max(initial=0)
        if off > _SYMMETRIC * np.abs(part).max(initial=0):
            return "a map is not symmetric"
    off = np.abs(layer.k_map.astype(np.float64) @ layer.q_map - np.eye(shape[1])).max(initial=0)
    if off > _INVERSE:
        return "the maps of K and of the queries are not each other's inverse"
    return None

"""Calibration of a KV cache: the means of K, which the patched llama.cpp subtracts before it stores K.

A constant added to every key of a head changes all scores of a query by the same amount, and softmax takes
that out again: attention is what it was, but the code has less to describe where K has a large constant part
(Qwen2.5). The means are taken after RoPE, where K is stored, and kept in the rotated basis.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ggufrq import __version__, codec
from ggufrq.base import log, paths
from ggufrq.base.errors import GgufrqError, ModelError, UsageError
from ggufrq.base.progress import progress
from ggufrq.base.results import file_sha256
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvType
from ggufrq.codec.rotate import Family, Mode
from ggufrq.drive import kv_capture
from ggufrq.ggufs.files import shards
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.kv_state import KvState

F64 = npt.NDArray[np.float64]

_VERSION = 1
_MODES = ("full", "block", "hadamard", "none")


@dataclass(frozen=True)
class LayerMean:
    """A layer of the model: the mean of K [n_head_kv, head_dim], rotated, and which share of the squared
    length of K it is (0 to 1), on average over the heads."""

    layer: int
    mean: npt.NDArray[np.float32]
    share: float


@dataclass(frozen=True)
class Calibration:
    """A calibration file that was made: for which model, rotation and layers, from how many tokens."""

    path: Path
    model: Path
    rotation: str
    tokens: int
    layers: tuple[LayerMean, ...]

    @property
    def share(self) -> float:
        """Share of the squared length of K that is constant, over all layers."""
        return float(np.mean([layer.share for layer in self.layers]))


@dataclass
class _Sums:
    """Sums over tokens by layer: of K [n_head_kv, head_dim], and of its squares [n_head_kv]."""

    tokens: int
    k: dict[int, F64]
    squares: dict[int, F64]

    def add(self, other: _Sums) -> None:
        self.tokens += other.tokens
        for il, k in other.k.items():
            self.k[il] = self.k.get(il, 0) + k
            self.squares[il] = self.squares.get(il, 0) + other.squares[il]


def calibrate(
    model: Path,
    text: Path,
    out: Path,
    build: Build,
    *,
    k_type: KvType,
    mode: str = "full",
    n_ctx: int = 2048,
    chunks: int = 8,
    threads: int | None = None,
) -> Calibration:
    """Write the means of K of the GGUF ``model`` over ``text`` to ``out``, for K in ``k_type`` rotated by
    ``mode``. Chunks that an earlier, stopped run has finished are not computed again.

    Raises UsageError when ``k_type`` has no rotation of ours, ModelError when the means cannot be taken from
    this model or not be subtracted exactly, ToolError when llama-server fails.
    """
    if not k_type.ours:
        raise UsageError(f"K in {k_type.name} is not calibrated, only rotated types are", remedy="--kv iso3")
    if mode not in _MODES:
        raise UsageError(f"there is no rotation mode '{mode}'; there are {', '.join(_MODES)}")
    _check_exact(model)
    kept = _folder(model, text, n_ctx)
    total = _Sums(0, {}, {})
    first = _resume(kept, total, chunks)
    if first < chunks:
        with progress("Means of K", chunks, unit="chunks") as bar:
            bar.update(first)
            states = kv_capture.captured(
                model,
                text,
                build,
                n_ctx=n_ctx,
                chunks=chunks,
                first=first,
                threads=threads,
                listener=bar,
            )
            with contextlib.closing(states):  # stops the server, whatever happens
                for i, state in enumerate(states, first):
                    part = _sums(state)
                    _keep(kept / f"{i}.npz", part)
                    total.add(part)
                    bar.update(i + 1)
    family = codec.cache_type(k_type.name).family
    layers = tuple(_layer(il, total, cast(Family, family), cast(Mode, mode)) for il in sorted(total.k))
    made = Calibration(out, model, f"{family}/{mode}/{_rotated_together(total)}", total.tokens, layers)
    _write(made)
    return made


def mode_of_k() -> str:
    """The rotation mode of K that ``LLAMA_RQ_MODE`` asks for; ``full`` without it."""
    return (os.environ.get("LLAMA_RQ_MODE") or "full").split("/")[0]


def _check_exact(model: Path) -> None:
    header = read_header(model)
    arch = header.values.get("general.architecture", "")
    why = None
    if any(".attn_sinks" in tensor.name for tensor in header.tensors):
        why = "has attention sinks"
    elif header.values.get(f"{arch}.attn_logit_softcapping") or arch == "grok":
        why = "caps its attention scores"
    if why is not None:
        raise ModelError(
            f"{model.name} {why}: a constant added to all keys matters there",
            remedy="run it without calibration",
        )


def _sums(state: KvState) -> _Sums:
    k = {il: np.asarray(layer.k, np.float32) for il, layer in state.layers.items()}
    return _Sums(
        len(state.tokens),
        {il: values.sum(axis=0, dtype=np.float64) for il, values in k.items()},
        {il: np.square(values, dtype=np.float64).sum(axis=(0, 2)) for il, values in k.items()},
    )


def _layer(il: int, total: _Sums, family: Family, mode: Mode) -> LayerMean:
    mean = total.k[il] / total.tokens
    if mean.shape[-1] % 64:
        raise ModelError(
            f"heads of {mean.shape[-1]} values cannot be kept in a rotated type", remedy="--kv q8_0"
        )
    share = float(np.mean(np.square(mean).sum(axis=1) * total.tokens / total.squares[il]))
    mean_f32 = mean.astype(np.float32)
    return LayerMean(il, codec.rotate(mean_f32, family, mode, _rotated_together(total)), share)


def _rotated_together(total: _Sums) -> int:
    """How many values llama.cpp rotates together: 256, 128 or 64, the most that the heads of all layers
    allow."""
    return next((n for n in (256, 128) if all(k.shape[-1] % n == 0 for k in total.k.values())), 64)


def _folder(model: Path, text: Path, n_ctx: int) -> Path:
    """Where chunks of this model, text and context are kept."""
    facts = {
        "version": _VERSION,
        "model": [file_sha256(part) for part in shards(model)],
        "text": file_sha256(text),
        "n_ctx": n_ctx,
    }
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return paths.cache_dir() / "calibration" / digest[:32]


def _resume(kept: Path, total: _Sums, chunks: int) -> int:
    """Adds the chunks that are kept and returns how many these are."""
    for i in range(chunks):
        try:
            with np.load(io.BytesIO((kept / f"{i}.npz").read_bytes())) as file:
                names = {name: file[name] for name in file.files}
            part = _Sums(
                int(names.pop("tokens")),
                {int(name[2:]): v for name, v in names.items() if name.startswith("k.")},
                {int(name[2:]): v for name, v in names.items() if name.startswith("s.")},
            )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return i
        total.add(part)
    return chunks


def _keep(path: Path, part: _Sums) -> None:
    values: dict[str, Any] = {f"k.{il}": v for il, v in part.k.items()}
    values |= {f"s.{il}": v for il, v in part.squares.items()}
    with paths.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, tokens=part.tokens, **values)


def _write(made: Calibration) -> None:
    import gguf

    arch = str(read_header(made.model).values.get("general.architecture", ""))
    blocks = int(read_header(made.model).values.get(f"{arch}.block_count", 0))
    try:
        with paths.atomic_path(made.path) as temporary:
            writer = gguf.GGUFWriter(temporary, "kv-calib")
            writer.add_type("kv-calib")
            writer.add_string("general.generated_by", f"ggufrq {__version__}")
            writer.add_uint32("rq.calib.version", _VERSION)
            writer.add_string("rq.calib.arch", arch)
            writer.add_uint32("rq.calib.n_layer", blocks)
            writer.add_string("rq.calib.model", fingerprint(made.model))
            writer.add_string("rq.calib.k_rotation", made.rotation)
            writer.add_uint64("rq.calib.tokens", made.tokens)
            for layer in made.layers:
                writer.add_tensor(f"blk.{layer.layer}.k_mean", layer.mean)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise GgufrqError(f"cannot write {made.path}: {error.strerror}") from error
    log.say(f"{made.path}: means of {len(made.layers)} layers from {made.tokens:,} tokens")

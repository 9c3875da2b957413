"""Compute buffers: what llama.cpp keeps between the operations of a batch. By its own dry run, or by rule.

ggml lays the results of a graph's operations into one buffer and uses places again, so that its size depends
on the order of operations. A dry run (llama-fit-params) lays them out without weights; without a build a rule
of thumb stands in, exact in the masks of attention and in logits, and rough in the rest.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ggufrq.base import proc
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPair, KvPlan
from ggufrq.ggufs.header import Header
from ggufrq.ggufs.memory_shape import MemoryShape
from ggufrq.memory.cells import ContextSettings
from ggufrq.tools import fit_params

_F32, _MASK = 4, 2
#: Tokens of the vocabulary in a model that stands for one whose logits are asked for one token at a time.
_FEW = 32
#: Of one token in a recurrent layer: results of the convolution's width that are there at once, at most.
_CONVOLUTIONS = 4


@dataclass(frozen=True)
class Buffers:
    """Bytes of the compute buffers: ``served`` where the logits of one token of each sequence are asked for
    (llama-server, llama-cli), ``batch`` where those of whole batches are (llama-completion, -perplexity,
    -bench). ``exact`` when llama.cpp itself has said so."""

    served: int
    batch: int
    exact: bool


def estimate(shape: MemoryShape, plan: KvPlan, settings: ContextSettings) -> Buffers:
    """The buffers by rule: masks of attention, what an indexer chooses by, the results of a layer, and
    logits."""
    cells = {
        settings.window_cells(shape.window) if layer.window else settings.cells for layer in shape.cached
    }
    masks = sum(cells) * settings.tokens * _MASK
    layer = settings.tokens * _F32 * _layer_values(shape)
    logits = settings.tokens * _F32 * (shape.vocabulary + 2 * shape.embedding)
    choosing = shape.index_scores * settings.cells + 2 * shape.index_query
    index = round(settings.tokens * _F32 * choosing)
    served = masks + layer + index + _rotations(shape, plan)
    return Buffers(served, max(served, logits), exact=False)


class DryRun:
    """Dry runs over a model of which only headers are there: ``with DryRun(headers, build) as dry:``."""

    def __init__(self, headers: tuple[Header, ...], build: Build, log: Path | None = None) -> None:
        self._headers = headers
        self._tool = build.tool("llama-fit-params")
        self._log = log
        self._folder = tempfile.TemporaryDirectory(prefix="ggufrq-")

    def __enter__(self) -> DryRun:
        folder = Path(self._folder.name)
        self.whole, self._few = folder / "whole.gguf", folder / "few.gguf"
        write_skeleton(self.whole, self._headers, None)
        write_skeleton(self._few, self._headers, _FEW)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def buffers(self, plan: KvPlan, settings: ContextSettings) -> Buffers:
        """The buffers of a context. Raises ToolError when llama.cpp does not take it."""
        served, batch = (self._run(model, plan, settings) for model in (self._few, self.whole))
        return Buffers(served, batch, exact=True)

    def _run(self, model: Path, plan: KvPlan, settings: ContextSettings) -> int:
        plan = plan.with_profile(None)  # its matrices are not laid out without weights
        args = fit_params.arguments(model, plan, n_ctx=settings.ctx, parallel=settings.parallel)
        done = proc.run([self._tool, *args], log=self._log, check=False, timeout=120)
        return fit_params.compute_bytes(done.stdout + done.stderr)


def write_skeleton(path: Path, headers: tuple[Header, ...], vocabulary: int | None) -> None:
    """Write a GGUF with the architecture's own metadata and every tensor in 32 bits, but a hole in place of
    their data, and no tokenizer. ``vocabulary`` is how many tokens it has (None: as many as the model)."""
    import gguf
    import numpy as np

    values, kinds = headers[0].values, headers[0].kinds
    architecture = str(values["general.architecture"])
    tokens = len(values.get("tokenizer.ggml.tokens", ())) or values.get(f"{architecture}.vocab_size", 0)
    wanted = vocabulary or tokens
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if key.startswith(f"{architecture}.") and key != f"{architecture}.vocab_size" and value != ():
            kind, inner = kinds[key]
            writer.add_key_value(key, _plain(value), gguf.GGUFValueType(kind), _as_type(inner))
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(wanted)
    size = 0
    for tensor in (tensor for header in headers for tensor in header.tensors):
        shape = list(tensor.shape)
        inner = tensor.name.startswith("blk.") or (len(shape) == 1 and tensor.name != "output.bias")
        if not inner and shape[-1:] == [tokens]:
            shape[-1] = wanted
        length = _F32
        for rows in shape:
            length *= rows
        writer.add_tensor_info(tensor.name, shape[::-1], np.dtype(np.float32), length)
        size += gguf.GGUFWriter.ggml_pad(length, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0] if writer.fout else None
    assert file is not None
    writer.write_padding(file, file.tell())
    file.truncate(file.tell() + size)
    writer.close()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_type(number: int | None) -> Any:
    import gguf

    return None if number is None else gguf.GGUFValueType(number)


def _layer_values(shape: MemoryShape) -> int:
    """Values of one token that are there at once in the layer that takes most, about."""
    width = shape.embedding
    attention = max((layer.k + layer.v for layer in shape.layers), default=0)
    largest = max(3 * width + shape.query + 3 * shape.ffn, 3 * width + 2 * shape.query + attention)
    if shape.experts:
        largest = max(largest, (3 + shape.experts) * width + 3 * shape.experts * shape.expert_ffn)
    if shape.convolution:
        largest = max(largest, 3 * width + _CONVOLUTIONS * shape.convolution)
    return largest


def _rotations(shape: MemoryShape, plan: KvPlan) -> int:
    """Bytes of the matrices that K and V are rotated by, one for each side: ours are of 256, 128 or 64
    values, upstream's of the largest power of two in a head of K, and of 64 for V."""

    def side(pairs: tuple[KvPair, ...], head: int, *, v: bool) -> int:
        kinds = [pair.v if v else pair.k for pair in pairs]
        if any(kind.ours for kind in kinds):
            size = next((n for n in (256, 128) if head % n == 0), 64)
        elif any(kind.block > 1 for kind in kinds) and head % 64 == 0:
            size = 64 if v else head & -head
        else:
            size = 0
        return size * size * _F32

    heads = [(layer.head_k, layer.head_v) for layer in shape.cached]
    if not heads:
        return 0
    return side(plan.pairs, heads[0][0], v=False) + side(plan.pairs, heads[0][1], v=True)

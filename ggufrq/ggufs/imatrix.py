"""Importance matrices as llama-imatrix writes them: read, merged, written, and what is in them.

For every weight matrix a file has the sums of squares of the activations that it was multiplied with, by
column (``in_sum2``), and over how many tokens these are (``counts``, one for each expert). Sums add up: over
texts, and over parts of a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggufrq.base import paths
from ggufrq.base.errors import ModelError
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.foreign import foreign
from ggufrq.ggufs.header import Header, is_gguf, read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

SUMS, COUNTS = ".in_sum2", ".counts"
_AGAIN = "make it again: ggufrq imatrix make"
#: A column whose mean square is less counts as not active, as in llama-imatrix.
_ACTIVE = 1e-5
#: No activation is so large that its square reaches this, or so small that the largest is below that.
_LARGEST, _NOTHING = 1e20, 1e-20
#: More tokens than any text has.
_MOST = 1e15
#: A column with less than this share of the middle one counts as not seen, and then has that share.
_TINY, _UNSEEN = 1e-12, 1e-2


@dataclass(frozen=True)
class Entry:
    """Of one tensor: ``sums`` [experts, columns] and ``counts`` [experts]."""

    sums: Array
    counts: Array


@dataclass(frozen=True)
class Matrix:
    """An importance matrix: the names of its texts, and over how many chunks of how many tokens it is."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


@dataclass(frozen=True)
class Statistics:
    """Of one tensor, over its columns' mean squares: their sum, mean, largest, and standard deviation, the
    share that is active, and their entropy as a share of the largest that there could be (low: few columns
    matter). ``unseen`` counts experts that no token came to."""

    tensor: str
    columns: int
    experts: int
    unseen: int
    tokens: int
    total: float
    mean: float
    largest: float
    deviation: float
    active: float
    entropy: float


def header_of(path: Path) -> Header:
    """The header of an importance matrix. Raises ModelError when the file is none, or is damaged."""
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    if not is_gguf(path):
        out = f"{path.stem}{'-new' if path.suffix == '.gguf' else ''}.gguf"
        raise foreign(
            path,
            f"{path} is no importance matrix in GGUF form",
            f"where it is one in the older form: llama-imatrix -m MODEL --in-file {path.name} -o {out}",
        )
    read_gguf(path)
    header = read_header(path)
    if header.values.get("general.type") != "imatrix":
        raise ModelError(f"{path} is no importance matrix", remedy="a file that llama-imatrix wrote")
    return header


def read(path: Path) -> Matrix:
    """Read a file. Raises ModelError when it is none, damaged, or has values that cannot be."""
    import gguf
    import numpy as np

    values = header_of(path).values
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    entries = {}
    for name, tensor in tensors.items():
        if not name.endswith(SUMS):
            continue
        base = name.removesuffix(SUMS)
        counts = tensors.get(base + COUNTS)
        if counts is None or tensor.data.dtype != np.float32 or counts.data.dtype != np.float32:
            raise ModelError(f"{path} is damaged: it lacks the counts of {base}", remedy=_AGAIN)
        sums = np.array(tensor.data, ndmin=2)
        entry = Entry(sums.reshape(-1, sums.shape[-1]), np.array(counts.data).reshape(-1))
        if len(entry.counts) not in (1, len(entry.sums)):
            raise ModelError(f"{path} is damaged: {base} has {len(entry.counts)} counts", remedy=_AGAIN)
        if not _sound(entry):
            raise ModelError(
                f"{path} is damaged: {base} has values that are no sums of squares", remedy=_AGAIN
            )
        entries[base] = entry
    if not entries:
        raise ModelError(f"{path} is an importance matrix of nothing", remedy=_AGAIN)
    datasets = values.get("imatrix.datasets", ())
    return Matrix(
        entries,
        tuple(dict.fromkeys(map(str, datasets))),
        int(values.get("imatrix.chunk_count", 0)),
        int(values.get("imatrix.chunk_size", 0)),
    )


def _sound(entry: Entry) -> bool:
    """Whether sums and counts are such as activations give."""
    import numpy as np

    if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
        return False
    if (entry.sums < 0).any() or (entry.counts < 0).any():
        return False
    if ((entry.counts > 0) & (entry.counts < 0.5) | (entry.counts > _MOST)).any():
        return False  # these are numbers of tokens
    counts = np.broadcast_to(entry.counts, (len(entry.sums),)).astype(np.float64)[:, None]
    return bool((entry.sums < _LARGEST * np.maximum(counts, 1)).all())


def _means(entry: Entry) -> npt.NDArray[np.float64]:
    """Mean squares [experts, columns]; 0 for experts that no token came to."""
    import numpy as np

    counts = np.broadcast_to(entry.counts, (len(entry.sums),)).astype(np.float64)[:, None]
    return np.divide(entry.sums, counts, out=np.zeros(entry.sums.shape), where=counts > 0)


def mended(matrix: Matrix) -> tuple[Matrix, tuple[str, ...]]:
    """The matrix as it can be used, and what had to be changed, a line for each tensor; none when it is used
    as it is.

    A weight of zero tells the quantizer that a column does not matter at all, and it writes zeros. So what
    only zeros were counted of counts as not seen: a tensor or expert has no tokens then, and a column gets a
    hundredth of what the tensor's columns have in the middle.
    """
    import numpy as np

    entries, lines = dict(matrix.entries), []
    for name, entry in matrix.entries.items():
        counts = np.array(np.broadcast_to(entry.counts, (len(entry.sums),)), np.float32)
        means = _means(entry)
        seen = counts > 0
        empty = seen & (means.max(axis=1, initial=0.0) < _NOTHING)
        sums = np.where(empty[:, None], np.float32(0), entry.sums)
        counts[empty] = 0
        columns = 0
        for expert in np.flatnonzero(seen & ~empty):
            row = means[expert]
            middle = float(np.median(row[row > _NOTHING]))
            unseen = row < _TINY * middle
            columns += int(unseen.sum())
            sums[expert, unseen] = _UNSEEN * middle * counts[expert]
        if columns or empty.any():
            entries[name] = Entry(sums.astype(np.float32), counts)
            lines.append(f"{name}: {_told(len(sums), int(empty.sum()), columns, means.size)}")
    return Matrix(entries, matrix.datasets, matrix.chunks, matrix.chunk_size), tuple(lines)


def _told(experts: int, empty: int, columns: int, every: int) -> str:
    parts = []
    if empty:
        parts.append(
            "all its sums are zero" if experts == 1 else f"all sums of {empty} of {experts} experts are zero"
        )
    if columns:
        parts.append(f"{columns:,} of {every:,} columns are zero")
    return f"{', '.join(parts)}: taken as not seen"


def merge(matrices: Sequence[Matrix], names: Sequence[str]) -> Matrix:
    """All of them as if their texts had been one. ``names`` stand for them in errors. Raises ModelError when
    they are not of one model."""
    first = matrices[0]
    entries = dict(first.entries)
    for matrix, name in zip(matrices[1:], names[1:], strict=True):
        if matrix.entries.keys() != first.entries.keys():
            odd = sorted(matrix.entries.keys() ^ first.entries.keys())[0]
            raise ModelError(f"{name} is of another model than {names[0]}: only one of them has {odd}")
        if matrix.chunk_size != first.chunk_size:
            raise ModelError(
                f"{name} is over chunks of {matrix.chunk_size} tokens, {names[0]} of {first.chunk_size}"
            )
        for tensor, entry in matrix.entries.items():
            before = entries[tensor]
            if before.sums.shape != entry.sums.shape or before.counts.shape != entry.counts.shape:
                raise ModelError(
                    f"{name} is of another model than {names[0]}: {tensor} has {entry.sums.shape[1]} columns "
                    f"there and {before.sums.shape[1]} here"
                )
            entries[tensor] = Entry(before.sums + entry.sums, before.counts + entry.counts)
    datasets = tuple(dict.fromkeys(text for matrix in matrices for text in matrix.datasets))
    return Matrix(entries, datasets, sum(matrix.chunks for matrix in matrices), first.chunk_size)


def write(matrix: Matrix, path: Path) -> None:
    """Write a file as llama-imatrix does, the tensors sorted by name, and name it when it is whole."""
    import gguf

    with paths.atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(matrix.datasets) or ["unknown"])
        writer.add_uint32("imatrix.chunk_count", matrix.chunks)
        writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
        for name, entry in sorted(matrix.entries.items()):
            writer.add_tensor(name + SUMS, entry.sums)
            writer.add_tensor(name + COUNTS, entry.counts.reshape(-1, 1))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def statistics(matrix: Matrix) -> list[Statistics]:
    """Of every tensor, those with the largest sums first; as llama-imatrix --show-statistics has them."""
    found = [_of_entry(name, entry) for name, entry in matrix.entries.items()]
    return sorted(found, key=lambda it: -it.total)


def _of_entry(name: str, entry: Entry) -> Statistics:
    import numpy as np

    experts, columns = entry.sums.shape
    counts = np.broadcast_to(entry.counts, (experts,)).astype(np.float64)
    seen = counts > 0
    squares = (entry.sums[seen] / counts[seen, None]).astype(np.float64).reshape(-1)
    total = float(squares.sum())
    entropy = 0.0
    if total > 0 and squares.size > 1:
        shares = squares[squares > 0] / total
        entropy = float(-(shares * np.log2(shares)).sum()) / math.log2(squares.size)
    return Statistics(
        tensor=name,
        columns=columns,
        experts=experts,
        unseen=int(experts - seen.sum()),
        tokens=int(counts.sum()),
        total=total,
        mean=float(squares.mean()) if squares.size else 0.0,
        largest=float(squares.max()) if squares.size else 0.0,
        deviation=float(squares.std()) if squares.size else 0.0,
        active=float((squares > _ACTIVE).mean()) if squares.size else 0.0,
        entropy=entropy,
    )

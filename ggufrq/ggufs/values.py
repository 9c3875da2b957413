"""The values of a GGUF model's tensors: whether they are numbers at all, and how far a model that was made of
another is from it.

Floats are looked at to the last one, for a single NaN spoils all that a model says; codes by rows spread over
the tensor, as they are decoded here in numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufrq.base.errors import ModelError
from ggufrq.base.progress import SILENT, Listener, progress
from ggufrq.ggufs.files import read_gguf, shards
from ggufrq.ggufs.opened import Opened
from ggufrq.ggufs.tensors import is_float, type_bits, type_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Floats by type: how they are read, and the bits of the exponent, which are all set in infinities and NaN.
_EXPONENTS = {
    "f64": ("<u8", 0x7FF0000000000000),
    "f32": ("<u4", 0x7F800000),
    "f16": ("<u2", 0x7C00),
    "bf16": ("<u2", 0x7F80),
}
#: What to do about a model whose values are no numbers.
DAMAGED = "its weights are damaged: download it again, or ask its authors"
#: Values that are read at a time, and rows of a tensor that stand for all.
_PIECE, _ROWS = 1 << 22, 64
#: A type of b bits per value has an error of about 2 * 2^-b of the values it codes, by their root mean
#: squares (1.5 to 2.3 for those of llama.cpp on Gaussian values); beyond so many times 2^-b, or
#: where hardly anything is left, something else than the type is at work.
_TIMES, _LEFT = 5.0, 0.95
#: Bits of a value that decide its relative error, for floats: those of the mantissa, and the leading one.
_MANTISSA = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8}


@dataclass(frozen=True)
class Odd:
    """A tensor with values that are no finite numbers: how many of them are NaN, and how many infinite."""

    tensor: str
    nan: int
    infinite: int

    def __str__(self) -> str:
        parts = [f"{self.nan:,} NaN"] if self.nan else []
        parts += [f"{self.infinite:,} infinite values"] if self.infinite else []
        return f"{self.tensor} has {' and '.join(parts)}"


@dataclass(frozen=True)
class Loss:
    """What a tensor lost in being made of another: the root mean square of the error relative to that of the
    values, and the most that its type should cost."""

    tensor: str
    kind: str
    error: float
    most: float


class Values(Opened):
    """The tensors of a model, all its shards, as numbers. A context manager. Raises ModelError when the model
    is damaged."""

    def __init__(self, model: Path) -> None:
        for path in shards(model):
            read_gguf(path)  # all data is there that the header tells of
        super().__init__(model)

    def odd(self, name: str) -> Odd | None:
        """The values of a tensor that are no finite numbers, None when there are none."""
        import numpy as np

        place = self.places[name]
        info, kind, file = place.info, place.kind, place.file
        if kind not in _EXPONENTS:
            rows = None if is_float(kind) else self.rows(name)
            if rows is None or np.isfinite(rows).all():
                return None
            return Odd(name, int(np.isnan(rows).sum()), int(np.isinf(rows).sum()))
        code, exponent = _EXPONENTS[kind]
        file.seek(place.start)
        nan = infinite = 0
        for first in range(0, info.values, _PIECE):
            raw = np.fromfile(file, np.dtype(code), min(_PIECE, info.values - first))
            odd = raw[(raw & raw.dtype.type(exponent)) == exponent]
            if odd.size:
                mantissa = raw.dtype.type(exponent & -exponent) - raw.dtype.type(1)
                nan += int(((odd & mantissa) != 0).sum())
                infinite += int(((odd & mantissa) == 0).sum())
        return Odd(name, nan, infinite) if nan or infinite else None

    def rows(self, name: str) -> npt.NDArray[np.float32] | None:
        """Rows spread evenly over a tensor, those of experts one behind the other, decoded, [rows, columns];
        None for a type that cannot be decoded here."""
        import gguf
        import numpy as np

        place = self.places[name]
        info, file = place.info, place.file
        columns = info.columns
        count = info.values // columns if columns else 0
        if not count:
            return None
        size = type_bytes(place.kind, columns, columns)
        raw = np.empty((min(count, _ROWS), size), np.uint8)
        for i, row in enumerate(np.linspace(0, count - 1, len(raw)).astype(np.int64)):
            file.seek(place.start + int(row) * size)
            raw[i] = np.frombuffer(file.read(size), np.uint8)
        try:
            with np.errstate(all="ignore"):
                decoded: Any = gguf.dequantize(raw, gguf.GGMLQuantizationType(info.type))
        except (NotImplementedError, ValueError, KeyError):
            return None
        return np.asarray(decoded, np.float32).reshape(len(raw), columns)


def first_odd(model: Path, listener: Listener = SILENT) -> Odd | None:
    """The first tensor of a model with values that are no finite numbers, None when all are sound. The
    listener is told of every tensor: all the file is read."""
    with Values(model) as values:
        listener.expect(len(values.places))
        for name in values.places:
            listener.step(name)
            odd = values.odd(name)
            if odd is not None:
                return odd
            listener.advance()
    return None


def losses(source: Path, made: Path) -> Iterator[Loss]:
    """What every tensor of ``made`` lost of that of ``source`` with its name, by rows spread over it. Those
    whose type cannot be decoded here are left out."""
    import numpy as np

    with Values(source) as before, Values(made) as after:
        for name in after.places:
            if name not in before.places:
                continue
            x, y = before.rows(name), after.rows(name)
            if x is None or y is None or x.shape != y.shape:
                continue
            with np.errstate(all="ignore"):  # what is no number gives an error that is none
                wide, error = x.astype(np.float64), y.astype(np.float64) - x
                power, lost = float(np.square(wide).sum()), float(np.square(error).sum())
            relative = (lost / power) ** 0.5 if power else (float("inf") if lost else 0.0)
            yield Loss(name, after.kind(name), relative, cost(after.kind(name)))


def cost(kind: str) -> float:
    """The most that a type should cost of the values that it codes, by their root mean squares."""
    return min(_LEFT, _TIMES * 2.0 ** -_MANTISSA.get(kind, type_bits(kind)))


def require_numbers(model: Path, what: str, *, remedy: str) -> None:
    """Raise ModelError when a tensor of a model, which is called ``what``, holds anything but numbers. A bar
    shows how far it is."""
    with progress(f"Looking at the values of {what}", unit="tensors") as bar:
        odd = first_odd(model, bar)
        if odd is not None:
            raise ModelError(f"{what} computes no numbers: {odd}", remedy=remedy)

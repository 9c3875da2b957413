"""The tensors of a model as the quantizer sees them: names, shapes, types, and which of them it quantizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from ggufrq.base.errors import UsageError

#: Types that releases of the ``gguf`` package do not know yet: number, values and bytes per block.
_NEWER = {"q2_0": (42, 64, 18)}
#: Types with blocks of 256, and the one that llama.cpp takes where rows are no multiple of 256
#: (``tensor_type_fallback`` in src/llama-quant.cpp).
_FALLBACKS = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
#: Where not even that fits.
_LAST_RESORT = "f16"
_FLOATS = ("f64", "f32", "f16", "bf16", "i8", "i16", "i32", "i64")


@cache
def _types() -> dict[str, tuple[int, int, int]]:
    """Name in lower case -> number, values per block, bytes per block."""
    import gguf

    known = {kind.name.lower(): (int(kind), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    return _NEWER | known


def type_name(number: int) -> str | None:
    """ggml's name of a type in lower case (``q5_k``), None for a number that it does not have."""
    return {number: name for name, (number, _, _) in _types().items()}.get(number)


def type_number(name: str) -> int:
    """ggml's number of a type. KeyError for one that it does not have."""
    return _types()[name][0]


def check_type(name: str) -> str:
    """A type's name in lower case. Raises UsageError for one that ggml does not have."""
    known = name.strip().lower()
    if known not in _types():
        raise UsageError(f"llama.cpp has no tensor type '{name}'; it has {', '.join(sorted(_types()))}")
    return known


def type_bytes(name: str, values: int, row: int) -> int:
    """Bytes of ``values`` values in rows of ``row``; the rows must fill whole blocks."""
    _, block, size = _types()[name]
    return values // row * (-(-row // block) * size)


def type_bits(name: str) -> float:
    """Bits per value, scales included."""
    _, block, size = _types()[name]
    return 8 * size / block


def is_float(name: str) -> bool:
    """Whether the type is a plain number and no code."""
    return name in _FLOATS


def fallback(name: str, row: int) -> str:
    """The type that llama.cpp takes for rows of ``row`` values when ``name`` is asked for: the same where
    they fill whole blocks."""
    fits = _types()
    if row % fits[name][1] == 0:
        return name
    other = _FALLBACKS.get(name, _LAST_RESORT)
    return other if row % fits[other][1] == 0 else _LAST_RESORT


@dataclass(frozen=True)
class Tensor:
    """``shape`` begins with the row length; ``type`` is ggml's name in lower case; ``quantizable`` tells
    whether llama-quantize changes it at all."""

    name: str
    shape: tuple[int, ...]
    type: str
    quantizable: bool

    @property
    def values(self) -> int:
        """How many values it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def is_kept_code(self) -> bool:
        """Whether it is quantized already and stays so (see ``Inventory.with_codes_kept``)."""
        return not self.quantizable and not is_float(self.type)

    def bytes_as(self, name: str) -> int:
        """Its bytes in the type ``name``."""
        return type_bytes(name, self.values, self.shape[0])


@dataclass(frozen=True)
class Inventory:
    """The tensors of a model in the order in which llama-quantize writes them."""

    architecture: str
    tensors: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    @property
    def quantizable(self) -> list[Tensor]:
        """Those that llama-quantize quantizes."""
        return [tensor for tensor in self.tensors if tensor.quantizable]

    def with_codes_kept(self) -> Inventory:
        """The same, but what is quantized already stays as it is."""
        tensors = tuple(replace(t, quantizable=t.quantizable and is_float(t.type)) for t in self.tensors)
        return Inventory(self.architecture, tensors)

    def bytes_as(self, types: dict[str, str]) -> int:
        """Bytes of all data with these types by tensor name."""
        return sum(tensor.bytes_as(types[tensor.name]) for tensor in self.tensors)

    def bits_as(self, types: dict[str, str]) -> float:
        """Bits per weight with these types."""
        return 8 * self.bytes_as(types) / sum(tensor.values for tensor in self.tensors)

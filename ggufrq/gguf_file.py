"""Reading GGUF files: whether one is whole, what it holds, and the shape of the KV cache that it needs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.errors import ModelError

_K_QUANT = re.compile(r"^(Q[2-6]_K)(?:_[SML])?$")


@dataclass(frozen=True)
class GgufFacts:
    """A whole GGUF file: tensors, how many of each type, weights, bytes of their data, bytes of the file, and
    the name of its file type (``Q4_K_M``)."""

    tensors: int
    types: dict[str, int]
    weights: int
    data_bytes: int
    file_bytes: int
    file_type: str
    architecture: str
    split: int

    @property
    def bits(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.data_bytes / self.weights if self.weights else 0.0

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is neither float nor integer."""
        return any(
            name not in ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64") for name in self.types
        )


def read_gguf(path: Path) -> GgufFacts:
    """Open a GGUF file and check that all its tensors lie within it. Raises ModelError when it is damaged."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
        size = path.stat().st_size
        if end > size:
            raise ModelError(
                f"{path} is damaged: it ends {end - size} bytes too early", remedy="make or download it again"
            )
        kind = _field(reader, "general.file_type")
        return GgufFacts(
            tensors=len(reader.tensors),
            types=dict(Counter(t.tensor_type.name for t in reader.tensors)),
            weights=sum(int(t.n_elements) for t in reader.tensors),
            data_bytes=sum(int(t.n_bytes) for t in reader.tensors),
            file_bytes=size,
            file_type=_file_type(kind),
            architecture=str(_field(reader, "general.architecture") or ""),
            split=int(_field(reader, "split.count") or 0),
        )
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"{path} is damaged or no GGUF file: {error}", remedy="make or download it again"
        ) from error


def verify_quantized(facts: GgufFacts, type_name: str, tensors: int, fallbacks: int = 0) -> None:
    """Check that a file has the type and the number of tensors that it was made with. Raises ModelError."""
    if facts.tensors != tensors:
        raise ModelError(f"the quantized model has {facts.tensors} tensors instead of {tensors}")
    if facts.file_type not in (type_name, ""):
        raise ModelError(f"the quantized model says it is {facts.file_type} instead of {type_name}")
    found = _K_QUANT.match(type_name)
    main = (
        found[1]
        if found
        else type_name
        if type_name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_XS", "IQ4_NL")
        else None
    )
    if main is not None and not fallbacks and main not in facts.types:
        raise ModelError(f"no tensor of the quantized model is {main}; there are {', '.join(facts.types)}")


def _file_type(kind: Any) -> str:
    import gguf

    if kind is None:
        return ""
    try:
        name = gguf.LlamaFileType(int(kind)).name
    except ValueError:
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field is not None else None

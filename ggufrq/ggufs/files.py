"""GGUF files: whether one is whole, what it holds, which shards belong to it, and whether it is what was
planned."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ggufrq.base.errors import ModelError
from ggufrq.base.results import file_sha256
from ggufrq.ggufs.foreign import foreign
from ggufrq.ggufs.header import Header, TensorInfo, pad, read_header
from ggufrq.ggufs.tensors import is_float, type_bytes, type_name

_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
_AGAIN = "make or download it again"


@dataclass(frozen=True)
class GgufFacts:
    """A whole GGUF model: tensors, how many of each type, weights, bytes of their data, bytes of its files,
    and the name of its file type (``Q4_K_M``).

    ``split`` is the number of shards it says it has (0 when it is in one piece), ``tensor_types`` the type of
    each tensor in lower case.
    """

    tensors: int
    types: dict[str, int]
    weights: int
    data_bytes: int
    file_bytes: int
    file_type: str
    architecture: str
    split: int
    tensor_types: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.data_bytes / self.weights if self.weights else 0.0

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is neither float nor integer."""
        return any(not is_float(name.lower()) for name in self.types)


def read_gguf(path: Path) -> GgufFacts:
    """Read the header of one file and check that all its tensors lie within it. Raises ModelError when it is
    damaged."""
    header = read_header(path)
    size = path.stat().st_size
    types: dict[str, str] = {}
    total = end = last = 0
    for tensor in header.tensors:
        kind, length = _measured(tensor, path)
        if tensor.offset != end:
            raise ModelError(f"{path} is damaged: {tensor.name} is not where it must be", remedy=_AGAIN)
        end = pad(tensor.offset + length, header.alignment)
        total += length
        types[tensor.name] = kind
        last = header.data_offset + tensor.offset + length
    if last > size:
        cut = f"{path} is damaged: it has {size:,} of {last:,} bytes, the rest is missing"
        raise foreign(path, cut, _AGAIN)
    return GgufFacts(
        tensors=len(header.tensors),
        types=dict(Counter(kind.upper() for kind in types.values())),
        weights=sum(tensor.values for tensor in header.tensors),
        data_bytes=total,
        file_bytes=size,
        file_type=file_type_name(header.values.get("general.file_type")),
        architecture=str(header.values.get("general.architecture", "")),
        split=_split_count(header),
        tensor_types=types,
    )


def read_model(path: Path) -> GgufFacts:
    """As ``read_gguf``, over all shards when ``path`` is one of several. Raises ModelError when one is
    missing, damaged or of another model."""
    parts = [read_gguf(shard) for shard in shards(path)]
    if len(parts) == 1:
        return parts[0]
    model_headers(path)
    types: dict[str, str] = {}
    for part in parts:
        types |= part.tensor_types
    return GgufFacts(
        tensors=len(types),
        types=dict(Counter(kind.upper() for kind in types.values())),
        weights=sum(part.weights for part in parts),
        data_bytes=sum(part.data_bytes for part in parts),
        file_bytes=sum(part.file_bytes for part in parts),
        file_type=parts[0].file_type,
        architecture=parts[0].architecture,
        split=len(parts),
        tensor_types=types,
    )


def shards(path: Path) -> list[Path]:
    """All files of the model that ``path`` is one of, in order. Raises ModelError when one is missing."""
    count = _split_count(read_header(path))
    if count <= 1:
        return [path]
    found = _SHARD.match(path.name)
    if found is None or int(found[3]) != count:
        raise ModelError(
            f"{path.name} says that it is one of {count} shards, but is not named so",
            remedy=f"rename it to NAME-00001-of-{count:05d}.gguf, and the others alike",
        )
    every = [path.with_name(f"{found[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [shard.name for shard in every if not shard.is_file()]
    if missing:
        raise ModelError(f"{missing[0]} is missing from {path.parent}", remedy=f"download {missing[0]} again")
    return every


def first_file(path: Path) -> Path:
    """The file that stands for the model which ``path`` is, or is a shard of. Raises ModelError as
    ``shards``."""
    return shards(path)[0] if _SHARD.match(path.name) else path


def file_bytes(path: Path) -> int:
    """Bytes of all files of a model. Raises ModelError as ``shards``."""
    files = shards(path) if _SHARD.match(path.name) else [path]
    return sum(file.stat().st_size for file in files)


def model_headers(path: Path) -> tuple[Header, ...]:
    """The headers of all files of the model that ``path`` is, or is a shard of, in order. Raises ModelError
    when one is missing, damaged or of another model."""
    files = shards(path)
    headers = tuple(map(read_header, files))
    if len(files) == 1:
        return headers
    names = {tensor.name for header in headers for tensor in header.tensors}
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        if header.values.get("split.no") != number or _split_count(header) != len(files):
            said = f"shard {header.values.get('split.no', 0) + 1} of {_split_count(header)}"
            raise _mixed(f"{file.name} says that it is {said}")
        expected = header.values.get("split.tensors.count")
        if len(names) != sum(len(one.tensors) for one in headers) or expected != len(names):
            raise _mixed(f"the shards of {path.name} have {len(names)} tensors, but the model has {expected}")
    return headers


def model_header(path: Path) -> Header:
    """As ``model_headers`` in one: the metadata, which the first file has, and the tensors of all. Where a
    tensor lies only its own file tells."""
    headers = model_headers(path)
    if len(headers) == 1:
        return headers[0]
    return replace(headers[0], tensors=tuple(tensor for header in headers for tensor in header.tensors))


def content_hash(model: Path) -> str:
    """sha256 of a model's file, or of the hashes of its shards."""
    parts = [file_sha256(shard) for shard in shards(model)]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _mixed(why: str) -> ModelError:
    return ModelError(why, remedy="the shards are of different models; download them again")


def verify_types(facts: GgufFacts, planned: Mapping[str, str], file_type: str = "") -> None:
    """Check that a model has exactly the planned tensors and types, and the file type when one is given.
    Raises ModelError that names the first difference."""
    if facts.tensors != len(planned):
        raise ModelError(f"the quantized model has {facts.tensors} tensors instead of {len(planned)}")
    for name, kind in planned.items():
        got = facts.tensor_types.get(name)
        if got != kind:
            raise ModelError(f"{name} of the quantized model is {got or 'missing'} instead of {kind}")
    if file_type and facts.file_type not in (file_type, ""):
        raise ModelError(f"the quantized model says it is {facts.file_type} instead of {file_type}")


def open_with_gguf(path: Path) -> None:
    """Open a file with the ``gguf`` package, as other tools do. Raises ModelError when that cannot read
    it."""
    import gguf

    known = {kind.name for kind in gguf.GGMLQuantizationType}
    if not read_gguf(path).types.keys() <= known:
        return  # a type that this release of the package does not know yet
    try:
        gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ModelError(f"the gguf package cannot read {path}: {error}", remedy=_AGAIN) from error


def file_type_name(kind: object) -> str:
    """The name of a number in ``general.file_type``, as llama-quantize writes it; empty when unknown."""
    import gguf

    try:
        name = gguf.LlamaFileType(int(str(kind))).name
    except ValueError:
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _measured(tensor: TensorInfo, path: Path) -> tuple[str, int]:
    """Type and bytes of a tensor."""
    kind = type_name(tensor.type)
    if kind is None:
        raise ModelError(
            f"{path} is damaged, or newer than ggufrq: {tensor.name} has the unknown type {tensor.type}",
            remedy=_AGAIN,
        )
    if not tensor.values:
        return kind, 0
    return kind, type_bytes(kind, tensor.values, tensor.columns)


def _split_count(header: Header) -> int:
    count = header.values.get("split.count", 0)
    return count if isinstance(count, int) else 0

"""The files of a GGUF model, held open, and where in them its tensors lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from ggufrq.ggufs.files import shards
from ggufrq.ggufs.header import Header, TensorInfo, read_header
from ggufrq.ggufs.tensors import type_name

Self = TypeVar("Self", bound="Opened")


@dataclass(frozen=True)
class Place:
    """A tensor, ggml's name of its type (empty for one that is not known), and where its data begin."""

    info: TensorInfo
    kind: str
    start: int
    file: BinaryIO


class Opened:
    """All files of a model; ``places`` are its tensors by name, in the order of the files. A context manager.
    Raises ModelError when a header is damaged."""

    def __init__(self, model: Path) -> None:
        self.paths = shards(model)
        self.header: Header = read_header(self.paths[0])
        self.places: dict[str, Place] = {}
        self._files: list[BinaryIO] = []
        for path in self.paths:
            header = read_header(path)
            file = path.open("rb")
            self._files.append(file)
            for info in header.tensors:
                kind = type_name(info.type) or ""
                self.places[info.name] = Place(info, kind, header.data_offset + info.offset, file)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def kind(self, name: str) -> str:
        """The type of a tensor, by ggml's name."""
        return self.places[name].kind

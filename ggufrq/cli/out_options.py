"""Types of options that are files to write: whether that can be done is known before the work, and what is
there already is only replaced by its like."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ggufrq.base.errors import GgufrqError, UsageError
from ggufrq.ggufs.header import read_header
from ggufrq.make.recipe import load


@dataclass(frozen=True)
class Kind:
    """What a file is called, and how one is read, which fails on any other."""

    name: str
    read: Callable[[Path], object]
    gguf: bool = False  # of which the header alone is read


def _read_gguf(*kinds: str) -> Callable[[Path], object]:
    def read(path: Path) -> None:
        if read_header(path).values.get("general.type") not in kinds:
            raise ValueError

    return read


JSON = Kind("JSON", lambda path: json.loads(path.read_bytes()))
RECIPE = Kind("recipe", lambda path: load(path))
MATRIX = Kind("importance matrix", _read_gguf("imatrix"), gguf=True)
PROFILE = Kind("profile", _read_gguf("kv-profile", "kv-calib"), gguf=True)
#: Bytes of a text of ours at most; what is larger is not read to see what it is.
_LARGEST = 1 << 26


def require_folder(folder: Path) -> None:
    """Raise UsageError when no file can be written into a folder."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", remedy="make it, or name another one")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written", remedy="a file in another folder")


def require_writable(path: Path, kind: Kind) -> None:
    """Raise UsageError when a file of this kind cannot be written to ``path``, or something else would be
    lost by it."""
    require_folder(path.parent)
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    try:
        if path.is_file() and (kind.gguf or path.stat().st_size <= _LARGEST):  # and no device
            kind.read(path)
            return
    except (GgufrqError, ValueError, OSError):
        pass
    raise UsageError(f"{path} is there, and no {kind.name}: it would be lost", remedy="another name")


class OutFile(click.Path):
    """A file of a kind that is going to be written."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)
        require_writable(path, self.kind)
        return path

"""What a file is that was taken for a model, and how it becomes one."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

from ggufrq.base.errors import ModelError

_PART = re.compile(r"^(.*?)[.-]?part[-_.]?(\d+)[-_.]?of[-_.]?(\d+)$", re.IGNORECASE)
_POINTER = b"version https://git-lfs.github.com/spec/"
_OLD = (b"ggml", b"lmgg", b"ggjt", b"tjgg", b"ggmf", b"fmgg")
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
_LOOKED_AT = 512


def foreign(path: Path, what: str, remedy: str) -> ModelError:
    """The error ``what`` of a file that is not what its name says, with what it is and the command that mends
    it; with ``remedy`` where nothing is known of it."""
    found = _known(path)
    if found is None:
        return ModelError(what, remedy=remedy)
    return ModelError(f"{what}: it is {found[0]}", remedy=found[1])


def _known(path: Path) -> tuple[str, str] | None:
    """What a file is, and what to do with it; None where that cannot be told."""
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT)
    again = f"download {path.name} again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return "empty", again
    if start.startswith(_POINTER):
        pull = f"git -C {path.absolute().parent} lfs pull --include {path.name}"
        return "a pointer of Git LFS, not the file itself", pull
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page that was saved in its place", f"{again}: hf download REPOSITORY {path.name}"
    part = _PART.match(path.name)
    if part is not None:
        pieces = " ".join(str(_piece(path, part, i)) for i in range(1, int(part[3]) + 1))
        whole = path.with_name(part[1])
        return f"part {int(part[2])} of {int(part[3])} of a file that was cut up", f"cat {pieces} > {whole}"
    if start.startswith(b"GGUF") and len(start) >= 8 and struct.unpack(">I", start[4:8])[0] <= 0xFFFF:
        return "a GGUF file for big-endian machines", f"gguf-convert-endian {path} little"
    if start.startswith(_OLD):
        return "in a form from before GGUF", "convert the original model again"
    if start.startswith(b"\x80\x02") or zipfile.is_zipfile(path):
        return "a file of PyTorch, or an archive", "a repository with safetensors; an archive: unpack it"
    if start.startswith(_COMPRESSED):
        return "compressed", "unpack it first"
    return None


def _piece(path: Path, part: re.Match[str], number: int) -> Path:
    """Another piece, its number with as many digits as that of this one."""
    name = path.name
    return path.with_name(f"{name[: part.start(2)]}{number:0{len(part[2])}d}{name[part.end(2) :]}")

"""What a program or library for macOS asks of the system that it runs on: libraries, and how new it is.

The format: <mach-o/loader.h> of Apple's xnu.
"""

from __future__ import annotations

import struct
from pathlib import Path

from ggufrq.build.systems import Binary

_MAGIC = 0xFEEDFACF  # 64 bits
_PROCESSORS = {0x01000007: "x86_64", 0x0100000C: "arm64"}
_RPATH, _BUILD = 0x8000001C, 0x32
#: Load it, or do without, pass it on, or on first use.
_LOADS = (0x0C, 0x80000018, 0x8000001F, 0x20)
#: The folders that stand before the name of a library that is looked for.
_LOOKED_FOR = ("@rpath/", "@loader_path/")
#: The library of the system that every program loads; its version is that of macOS.
SYSTEM = "/usr/lib/libSystem.B.dylib"


def read(file: Path) -> Binary | None:
    """What ``file`` asks for, the oldest macOS that it is for as a version of ``SYSTEM`` (``macOS_14.0``);
    None when it is no Mach-O file of 64 bits and one processor, or damaged, or loads nothing."""
    data = file.read_bytes()
    try:
        return _parse(data)
    except (struct.error, ValueError):
        return None


def _parse(data: bytes) -> Binary | None:
    magic, processor, _, _, count = struct.unpack_from("<5I", data)
    if magic != _MAGIC:
        return None
    needed, folders, versions = [], [], {}
    at = 32
    for _ in range(count):
        kind, size, first = struct.unpack_from("<3I", data, at)
        command = data[at : at + size]
        if kind in _LOADS:
            needed.append(_text(command, first))
        elif kind == _RPATH:
            folders.append(_text(command, first).replace("@loader_path", "$ORIGIN"))
        elif kind == _BUILD:
            (least,) = struct.unpack_from("<I", command, 12)
            versions[SYSTEM] = (f"macOS_{least >> 16}.{least >> 8 & 255}",)
        at += max(size, 8)
    if not needed:
        return None
    return Binary(
        _PROCESSORS.get(processor, str(processor)),
        tuple(_name(library) for library in needed),
        ":".join(folders),
        versions,
    )


def _text(command: bytes, start: int) -> str:
    return command[start : command.index(b"\0", start)].decode()


def _name(library: str) -> str:
    """As it is called beside a program; of others the whole path."""
    found = next((folder for folder in _LOOKED_FOR if library.startswith(folder)), "")
    return library.removeprefix(found)

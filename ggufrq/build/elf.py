"""What a program or library for Linux asks of the system that it runs on: libraries, and versions of their
symbols.

The format: https://gabi.xinuos.com and, of versions, the Linux Standard Base, "Symbol Versioning".
"""

from __future__ import annotations

import struct
from pathlib import Path

from ggufrq.build.systems import Binary

_MACHINES = {62: "x86_64", 183: "aarch64"}
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRINGS, _RPATH, _RUNPATH = 1, 5, 15, 29
_VERNEED, _VERNEED_COUNT = 0x6FFFFFFE, 0x6FFFFFFF


def read(file: Path) -> Binary | None:
    """What ``file`` asks for; None when it is no ELF file of 64 bits, or damaged, or loads nothing."""
    data = file.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    try:
        return _parse(data)
    except (struct.error, ValueError, IndexError, KeyError, StopIteration):
        return None


def _parse(data: bytes) -> Binary | None:
    (machine,) = struct.unpack_from("<H", data, 18)
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    loaded = [(start, offset, length) for kind, _, offset, start, _, length in segments if kind == _LOAD]

    def place(address: int) -> int:
        at, offset = next((at, offset) for at, offset, length in loaded if at <= address < at + length)
        return int(address - at + offset)

    dynamic = next(((offset, length) for kind, _, offset, _, _, length in segments if kind == _DYNAMIC), None)
    if dynamic is None:
        return None
    entries = list(struct.iter_unpack("<QQ", data[dynamic[0] : sum(dynamic)]))
    values = dict(reversed(entries))
    strings = place(values[_STRINGS])

    def text(offset: int) -> str:
        return data[strings + offset : data.index(b"\0", strings + offset)].decode()

    versions: dict[str, tuple[str, ...]] = {}
    at = place(values[_VERNEED]) if _VERNEED in values else 0
    for _ in range(values.get(_VERNEED_COUNT, 0)):
        _, many, library, first, following = struct.unpack_from("<HHIII", data, at)
        names, one = [], at + first
        for _ in range(many):
            _, _, _, name, after = struct.unpack_from("<IHHII", data, one)
            names.append(text(name))
            one += after
        versions[text(library)] = tuple(names)
        at += following
    path = next((text(values[tag]) for tag in (_RUNPATH, _RPATH) if tag in values), "")
    needed = tuple(text(value) for tag, value in entries if tag == _NEEDED)
    return Binary(_MACHINES.get(machine, str(machine)), needed, path, versions)


def version_key(text: str) -> tuple[int, ...]:
    """``2.31`` as (2, 31), to be compared; what is no number counts as the smallest."""
    return tuple(int(part) if part.isdecimal() else -1 for part in text.split("."))

"""Made-up ELF files: what they load and which versions of symbols they take, and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

_BASE = 0x400000
MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}


def write(
    path: Path,
    needed: Sequence[str] = (),
    versions: Mapping[str, Sequence[str]] | None = None,
    *,
    path_entry: str = "$ORIGIN",
    new_tags: bool = False,
    arch: str = "x86_64",
    text: bytes = b"",
) -> Path:
    """A library with these names in its dynamic section; ``text`` makes its content differ."""
    strings = bytearray(b"\0")

    def name(value: str) -> int:
        strings.extend(value.encode() + b"\0")
        return len(strings) - len(value.encode()) - 1

    tags = [(1, name(one)) for one in needed]
    if path_entry:
        tags.append((29 if new_tags else 15, name(path_entry)))
    wanted = bytearray()
    libraries = list((versions or {}).items())
    for number, (library, names) in enumerate(libraries):
        after = 0 if number == len(libraries) - 1 else 16 + 16 * len(names)
        wanted += struct.pack("<HHIII", 1, len(names), name(library), 16, after)
        for at, one in enumerate(names):
            wanted += struct.pack("<IHHII", 0, 0, 2, name(one), 0 if at == len(names) - 1 else 16)
    start = 64 + 2 * 56
    length = 16 * (len(tags) + 1 + 2 * bool(libraries) + 1)
    tags.append((5, _BASE + start + length + len(wanted)))
    if libraries:
        tags += [(0x6FFFFFFE, _BASE + start + length), (0x6FFFFFFF, len(libraries))]
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in [*tags, (0, 0)])
    assert len(dynamic) == length
    body = dynamic + bytes(wanted) + bytes(strings) + text
    whole = start + len(body)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, MACHINES[arch], 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, whole, whole, 4096)
    part = struct.pack("<IIQQQQQQ", 2, 6, start, _BASE + start, _BASE + start, length, length, 8)
    path.write_bytes(header + load + part + body)
    path.chmod(0o755)
    return path

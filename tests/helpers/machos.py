"""Made-up Mach-O files: what they load, and the macOS that they are for, and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

PROCESSORS = {"arm64": 0x0100000C, "x86_64": 0x01000007, "arm": 12}


def write(
    path: Path,
    needed: Sequence[str] = (),
    *,
    folders: Sequence[str] = ("@loader_path",),
    arch: str = "arm64",
    least: tuple[int, int] = (15, 0),
) -> Path:
    """A library with these load commands, and with libSystem as every program has it."""
    commands = [
        *(_named(0x8000001C, 12, folder) for folder in folders),
        struct.pack("<6I", 0x32, 24, 1, least[0] << 16 | least[1] << 8, 15 << 16, 0),
        _named(0x0D, 24, f"@rpath/{path.name}"),  # its own name, which it does not load
        *(_named(0x0C, 24, one) for one in (*needed, "/usr/lib/libSystem.B.dylib")),
    ]
    whole = b"".join(commands)
    head = struct.pack("<8I", 0xFEEDFACF, PROCESSORS[arch], 0, 6, len(commands), len(whole), 0, 0)
    path.write_bytes(head + whole)
    path.chmod(0o755)
    return path


def _named(kind: int, start: int, text: str) -> bytes:
    data = text.encode() + b"\0"
    data += bytes(-len(data) % 8)
    return struct.pack("<3I", kind, start + len(data), start) + bytes(start - 12) + data

"""The CPU backend: always there, needs only a C++ compiler."""

from __future__ import annotations

from ggufrq.base import machine
from ggufrq.build import cmake_files, toolchain
from ggufrq.build.toolchain import Missing


def definitions(*, native: bool) -> dict[str, str]:
    """``native`` compiles for exactly this processor; without it the result runs on any of its
    architecture.
    """
    return {"GGML_NATIVE": "ON" if native else "OFF", **cmake_files.options("cpu")}


def identity(*, native: bool) -> str:
    """A native build must not be taken for current on another processor that shares the cache folder."""
    processor = machine.processor()
    return f"{processor.arch} {processor.name} {' '.join(processor.flags)}" if native else processor.arch


def missing() -> list[Missing]:
    """A C++ compiler that runs."""
    if toolchain.compiler() is None:
        return [Missing("no C++ compiler was found", toolchain.remedy("compiler"))]
    return []


def detected() -> bool:
    """There is always a processor."""
    return True


def versions() -> dict[str, str]:
    """Nothing beyond the compiler, which every build stamps."""
    return {}

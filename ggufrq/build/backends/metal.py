"""Apple's GPUs. A build needs only the command line tools of Xcode: kernels are embedded as source, which
macOS compiles when a program starts.
"""

from __future__ import annotations

import platform

from ggufrq.build import cmake_files
from ggufrq.build.backends import cpu
from ggufrq.build.toolchain import Missing


def detected() -> bool:
    """Whether this is a Mac with a GPU of Apple's own: others lack matrices, which the kernels need."""
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def definitions(*, native: bool) -> dict[str, str]:
    """The CPU backend's, too: what the GPU does not do runs there."""
    return {**cpu.definitions(native=native), **cmake_files.options("metal")}


def identity(*, native: bool) -> str:
    """The processor; the GPU is not compiled for in advance."""
    return cpu.identity(native=native)


def missing() -> list[Missing]:
    """macOS and a C++ compiler."""
    if platform.system() != "Darwin":
        return [Missing("Metal is a part of macOS, and this is not macOS", "ggufrq build --backend cpu")]
    return cpu.missing()


def versions() -> dict[str, str]:
    """The system, whose compiler the kernels go through."""
    return {"macos": platform.mac_ver()[0]}

"""macOS, on a Mac: Apple's compiler, and a C++ library that every Mac has."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base.errors import UsageError
from ggufrq.build import macho, systems, toolchain
from ggufrq.build.base_system import BaseSystem, linked_with, tool
from ggufrq.build.systems import Binary, System

#: The oldest macOS that programs are for, which is the oldest that the release's workflow tries them on.
LEAST = "15.0"
_COMPILERS = {"gcc": "clang", "g++": "clang++"}


@dataclass(frozen=True)
class Macos(BaseSystem):
    """``arch`` as macOS names processors: ``arm64``, ``x86_64``."""

    @property
    def system(self) -> System:
        return systems.MACOS

    @property
    def triplet(self) -> str:
        return f"{self.arch}-apple-macos{LEAST}"

    @property
    def name(self) -> str:
        return f"macOS {LEAST}"

    @property
    def backend(self) -> str:
        """Metal where every Mac has it: others than Apple's own GPUs lack matrices, which the kernels
        take."""
        return "metal" if self.arch == "arm64" else "cpu"

    def compiler(self, name: str) -> str:
        """Path of Clang by the name of GCC's. Raises BuildError without it."""
        return tool(_COMPILERS[name], toolchain.remedy("compiler"), self.name)

    def asks(self, file: Path) -> Binary | None:
        return macho.read(file)

    def definitions(self, build: Path) -> dict[str, str]:
        return {
            **super().definitions(build),
            "CMAKE_OSX_ARCHITECTURES": self.arch,
            "CMAKE_OSX_DEPLOYMENT_TARGET": LEAST,
            **linked_with("-Wl,-S,-x"),
            # Apple's Clang has none; Homebrew's would have to come along
            "GGML_OPENMP": "OFF",
        }

    def library(self, name: str) -> Path | None:
        """None: what is not beside the programs is the system's."""
        return None

    def _newer(self) -> str:
        return "Xcode 16 or newer"

    def _strip(self) -> list[str]:
        return []  # Clang warns of it where nothing is linked


def here(arch: str) -> Macos:
    """macOS on this processor, whose name may be Linux's. Raises UsageError elsewhere."""
    arch = "arm64" if arch == "aarch64" else arch
    if (platform.system(), platform.machine()) != (systems.MACOS.name, arch):
        raise UsageError(
            f"programs for macOS on {arch} are made on such a Mac; here is {systems.machine()}",
            remedy="ggufrq bundle --system macos there; .github/workflows/release.yml has one of each",
        )
    return Macos(arch)

"""Windows, for which Debian's mingw-w64 compiles: GCC, and libraries of C and C++ that come along."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.base.errors import UsageError
from ggufrq.base.results import file_sha256
from ggufrq.build import systems
from ggufrq.build.base_system import BaseSystem, linked_with, tool
from ggufrq.build.systems import Binary, System

ARCH = "x86_64"
_PACKAGE = "g++-mingw-w64-x86-64-posix"
_NEEDED = re.compile(r"^\s*DLL Name: (\S+)", re.MULTILINE)
#: Functions of Vulkan's loader that ggml-vulkan is linked to, of Vulkan 1.1; it asks these for all others.
_VULKAN = ("vkCmdCopyBuffer", "vkGetDeviceProcAddr", "vkGetInstanceProcAddr", "vkGetPhysicalDeviceFeatures2")
#: No time of linking in the files.
_LINKED = "-Wl,--no-insert-timestamp"


@dataclass(frozen=True)
class Mingw(BaseSystem):
    """Windows on x86-64."""

    @property
    def system(self) -> System:
        return systems.WINDOWS

    @property
    def triplet(self) -> str:
        return f"{self.arch}-w64-mingw32"

    @property
    def name(self) -> str:
        return "mingw-w64"

    def compiler(self, name: str) -> str:
        """Path of its ``gcc`` or ``g++`` with threads as C++ has them, or of a tool of binutils. Raises
        BuildError without it."""
        threads = "-posix" if name.startswith("g") else ""
        return tool(f"{self.triplet}-{name}{threads}", f"apt-get install {_PACKAGE}", self.system.name)

    def asks(self, file: Path) -> Binary | None:
        """What objdump tells of it, names in small letters, as Windows takes them for the same."""
        done = proc.run([self.compiler("objdump"), "-p", file], check=False, timeout=60, env={"LC_ALL": "C"})
        if done.rc != 0 or "file format pei-x86-64" not in done.stdout:
            return None
        return Binary(ARCH, tuple(sorted({name.lower() for name in _NEEDED.findall(done.stdout)})))

    def definitions(self, build: Path) -> dict[str, str]:
        return {
            **super().definitions(build),
            "CMAKE_RC_COMPILER": self.compiler("windres"),
            "Vulkan_LIBRARY": str(build / "vulkan.a"),
            **linked_with(_LINKED),
            # ggml's own threads do, and a library less comes along
            "GGML_OPENMP": "OFF",
        }

    def prepare(self, build: Path) -> None:
        """Make in the folder ``build`` what stands in for Vulkan's loader at link time: an SDK for Linux has
        none for Windows. Raises BuildError without binutils, ToolError when they fail."""
        names = build / "vulkan.def"
        names.write_text("\n".join(["LIBRARY vulkan-1.dll", "EXPORTS", *_VULKAN, ""]), encoding="utf-8")
        proc.run([self.compiler("dlltool"), "-d", names, "-l", build / "vulkan.a"], timeout=60)

    def library(self, name: str) -> Path | None:
        """As of every base, without what only debuggers read: nine tenths of libstdc++."""
        whole = super().library(name)
        if whole is None:
            return None
        stripped = paths.cache_dir() / f"mingw-{file_sha256(whole)[:12]}" / name
        if not stripped.is_file():
            with paths.atomic_path(stripped) as making:
                # with the time in the file as it was, not that of now
                proc.run([self.compiler("strip"), "-p", "-o", making, whole], timeout=60)
        return stripped

    def _made(self) -> str:
        return " ".join(_VULKAN)

    def _flags(self, first: list[str]) -> list[str]:
        """GCC puts wide registers on a stack that Windows keeps at 16 bytes, by moves that take more for
        granted (its bug 54412). Debian's is patched; the assembler holds it for every GCC and all code."""
        return ["-Wa,-muse-unaligned-vector-move"]


def windows(arch: str) -> Mingw:
    """Windows on a processor. Raises UsageError where none of these is compiled for, or not here."""
    if platform.system() != "Linux" or arch != ARCH:
        raise UsageError(
            f"programs for Windows are made on Linux, for {ARCH}; here is {systems.machine()}, and {arch} "
            "was asked for",
            remedy=f"--system windows --arch {ARCH}, on Debian or in a container of it",
        )
    return Mingw(arch)

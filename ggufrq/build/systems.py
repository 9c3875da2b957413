"""What differs between the systems that programs are given away for: how files are named, which libraries
every such system has, the archive and the wheel."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Binary:
    """What a program or library asks for: the processor, the libraries that it loads at its start, the
    folders that these are looked for in first (``$ORIGIN`` is its own, where Windows always looks), and
    versions of symbols (``GLIBC_2.31``) by the library that has them."""

    arch: str
    needed: tuple[str, ...]
    path: str = "$ORIGIN"
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """A system by its name in Python (``platform.system()``); ``title`` is that for people.

    ``module`` fits modules, which ggml looks for beside the programs, and libraries that others ask for
    anyway. ``libraries`` are those of the system, by name or by the folder in it; ``drivers`` begin the names
    of what comes with a driver or toolkit: where it is missing the module that asks for it is not loaded.
    ``licences`` are those of what is brought along: file in the archive and Debian's package, by library;
    ``licence`` is that of all, in SPDX's words. ``archive`` is the ending of its name. ``tags`` are the
    platforms of wheels by processor; empty where what files ask for makes the tag.
    """

    name: str
    title: str
    module: re.Pattern[str]
    libraries: frozenset[str]
    drivers: tuple[str, ...]
    licences: Mapping[str, tuple[str, str]]
    licence: str
    archive: str
    tags: Mapping[str, str]

    def has(self, library: str) -> bool:
        """Whether a library, as a file names it, is one of every such system."""
        return library in self.libraries or any(
            library.startswith(folder) for folder in self.libraries if folder.endswith("/")
        )


LINUX = System(
    name="Linux",
    title="Linux",
    module=re.compile(r"libggml-[\w.-]+?\.so"),
    # PEP 600, and the policies of auditwheel 6.8
    libraries=frozenset(
        (
            *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6", "libmvec.so.1"),
            *("libdl.so.2", "librt.so.1", "libpthread.so.0", "libutil.so.1", "libresolv.so.2", "libanl.so.1"),
            *("libgcc_s.so.1", "libstdc++.so.6", "libatomic.so.1"),
        )
    ),
    drivers=(
        *("libcuda", "libcudart", "libcublas", "libcublasLt", "libnccl", "libvulkan"),
        *("libamdhip64", "libhipblas", "librocblas", "libhsa-runtime64"),
    ),
    licences={"libgomp.so.1": ("libgomp.txt", "libgomp1")},
    licence="MIT AND GPL-3.0-or-later WITH GCC-exception-3.1",
    archive=".tar.xz",
    tags={},
)

WINDOWS = System(
    name="Windows",
    title="Windows",
    module=re.compile(r"ggml-[\w.-]+?\.dll"),
    # what mingw-w64 links by itself, sockets, certificates and processes
    libraries=frozenset(
        f"{name}.dll"
        for name in (
            *("kernel32", "msvcrt", "advapi32", "user32", "shell32", "ws2_32", "crypt32", "bcrypt"),
            *("ole32", "iphlpapi", "psapi", "dbghelp", "powrprof", "version"),
        )
    ),
    drivers=("vulkan-1.dll",),
    licences={
        "libstdc++-6.dll": ("gcc.txt", "gcc-mingw-w64-base"),
        "libgcc_s_seh-1.dll": ("gcc.txt", "gcc-mingw-w64-base"),
        # of its start-up code in every program, too
        "libwinpthread-1.dll": ("mingw-w64.txt", "mingw-w64-x86-64-dev"),
    },
    licence="MIT AND GPL-3.0-or-later WITH GCC-exception-3.1 AND ZPL-2.1 AND BSD-3-Clause",
    archive=".zip",
    tags={"x86_64": "win_amd64"},
)

MACOS = System(
    name="Darwin",
    title="macOS",
    # as CMake names modules there, too
    module=LINUX.module,
    libraries=frozenset(("/usr/lib/", "/System/Library/")),
    drivers=(),
    licences={},
    licence="MIT",
    archive=".tar.xz",
    tags={},
)


def machine(system: str | None = None, arch: str | None = None) -> str:
    """A system and a processor for people, ``macOS on arm64``; this machine's unless given."""
    system, arch = system or platform.system(), arch or platform.machine()
    title = next((one.title for one in (LINUX, WINDOWS, MACOS) if one.name == system), system)
    return f"{title} on {arch}"

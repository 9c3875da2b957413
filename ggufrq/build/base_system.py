"""The system that programs are made for, where they are to be given away: an older Debian, whose C and C++
libraries they are linked against, so that they run there and on what is newer; or this one.

The libraries are unpacked into the cache; the compiler is this machine's GCC, for its processor or another.
Nothing of what it makes names a folder of this machine, so that the same source gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.base.errors import BuildError, UsageError
from ggufrq.base.locks import locked
from ggufrq.base.paths import read_json
from ggufrq.build import debian, elf, systems
from ggufrq.build.systems import Binary, System

#: Debian 11: glibc 2.31 and libstdc++ of GCC 10, the oldest one that Debian's mirrors have.
RELEASE, GCC = "bullseye", "10"
_PACKAGES = (
    *("libc6", "libc6-dev", "linux-libc-dev", "libcrypt-dev"),
    *("libstdc++6", f"libstdc++-{GCC}-dev", "libgcc-s1", f"libgcc-{GCC}-dev"),
    *("libgomp1", f"gcc-{GCC}-base"),
)
_VERSIONS = "versions.json"
#: What llama.cpp's modules for the newest processors are compiled with, and the first GCC that knows it.
_NEWEST = {
    "x86_64": ("-mamx-int8", "-mavxvnni"),
    "aarch64": ("-march=armv9.2-a+sme",),
    "arm64": ("-march=armv9.2-a+sme",),
}
_FIRST = {"x86_64": 11, "aarch64": 14}
#: What code of newer compilers calls and an older C++ library lacks: from GCC 14 on, where an exception would
#: leave a function that lets none out (libstdc++'s ABI, CXXABI_1.3.15).
_RUNTIME = """\
namespace std { [[noreturn]] void terminate() noexcept; }
extern "C" void * __cxa_begin_catch(void *) noexcept;
extern "C" [[noreturn]] void __cxa_call_terminate(void * exception) noexcept;
extern "C" void __cxa_call_terminate(void * exception) noexcept {
    if (exception) {
        __cxa_begin_catch(exception);
    }
    std::terminate();
}
"""


@dataclass(frozen=True)
class BaseSystem:
    """``arch`` as Linux names processors; ``root`` of the unpacked libraries, None for this system's own;
    ``versions`` of Debian's packages in it."""

    arch: str
    root: Path | None = None
    versions: tuple[tuple[str, str], ...] = ()

    @property
    def system(self) -> System:
        """The names of its files, and what it has."""
        return systems.LINUX

    @property
    def triplet(self) -> str:
        """The name of the processor and system in compilers and folders."""
        return f"{self.arch}-linux-gnu"

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"Debian {RELEASE}" if self.root is not None else "this system"

    @property
    def backend(self) -> str:
        """What programs for it have unless something else is asked for."""
        return "cpu"

    def identity(self) -> str:
        """What of it a build depends on, wherever its libraries lie. Raises BuildError without a compiler."""
        parts = [self.definitions(Path("build")), self.versions, self._made()]
        defined = json.dumps(parts, sort_keys=True)
        return defined.replace(os.fspath(self.root), "base") if self.root is not None else defined

    def compiler(self, name: str) -> str:
        """Path of GCC's ``gcc``, ``g++`` or ``gcc-ar`` for it. Raises BuildError without it."""
        package = "g++" if self.arch == platform.machine() else f"g++-{self.triplet.replace('_', '-')}"
        return tool(f"{self.triplet}-{name}", f"apt-get install {package}", self.arch)

    def asks(self, file: Path) -> Binary | None:
        """What a program or library asks for; None when it is none for the system."""
        return elf.read(file)

    def require_modules(self) -> None:
        """Raise BuildError when its compiler is missing, or too old for the module of the newest
        processors."""
        flags = _NEWEST[self.arch]
        compiler = self.compiler("g++")
        done = proc.run([compiler, *flags, "-x", "c++", "-E", os.devnull], check=False, timeout=60)
        if done.rc != 0:
            raise BuildError(
                f"{compiler} does not take {' '.join(flags)}, by which one of the modules is compiled",
                remedy=self._newer(),
            )

    def definitions(self, build: Path) -> dict[str, str]:
        """CMake's definitions of a build in the folder ``build``. Raises BuildError without the compiler."""
        here = [f"-ffile-prefix-map={build / 'src'}=src", "-ffile-prefix-map=../src=src"]
        defined = {
            "CMAKE_C_COMPILER": self.compiler("gcc"),
            "CMAKE_CXX_COMPILER": self.compiler("g++"),
            "CMAKE_C_FLAGS": shlex.join([*here, *self._strip(), *self._flags([])]),
            "CMAKE_CXX_FLAGS": shlex.join([*here, *self._strip(), *self._flags(self._cxx_headers())]),
            "CMAKE_CUDA_FLAGS": shlex.join(f"-Xcompiler={one}" for one in here),
            "CMAKE_HIP_FLAGS": shlex.join(here),
            # of CUDA's module, whose own flags the linker does not get
            "CMAKE_MODULE_LINKER_FLAGS_INIT": "-s",
        }
        if (self.system.name, self.arch) != (platform.system(), platform.machine()):
            defined |= {"CMAKE_SYSTEM_NAME": self.system.name, "CMAKE_SYSTEM_PROCESSOR": self.arch}
        if self.root is not None:
            defined |= {"CMAKE_SYSROOT": os.fspath(self.root)}
            defined |= {"CMAKE_CXX_STANDARD_LIBRARIES": f'"{build / "runtime.a"}"'}
            defined |= {f"CMAKE_FIND_ROOT_PATH_MODE_{kind}": "ONLY" for kind in ("LIBRARY", "INCLUDE")}
        return defined

    def prepare(self, build: Path) -> None:
        """Make in the folder ``build`` what ``definitions`` name there: of an older system, the archive that
        its C++ library lacks, of which a program gets what it calls. Raises BuildError without the compiler,
        ToolError when it fails."""
        if self.root is None:
            return
        source, made = build / "runtime.cpp", build / "runtime.o"
        source.write_text(_RUNTIME, encoding="utf-8")
        options = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden")
        proc.run([self.compiler("g++"), *options, "-c", source, "-o", made], timeout=60)
        proc.run([self.compiler("gcc-ar"), "rcsD", build / "runtime.a", made], timeout=60)

    def library(self, name: str) -> Path | None:
        """The file of a library that programs for it load, None where it is not known."""
        if self.root is not None:
            found = self.root / "usr" / "lib" / self.triplet / name
        else:
            said = proc.run([self.compiler("g++"), f"-print-file-name={name}"], timeout=60).stdout
            found = Path(said.strip())
        return found.resolve() if found.is_absolute() and found.is_file() else None

    def licence(self, library: str) -> Path | None:
        """The text of the licences of a library that is brought along; None where it is not known."""
        _, package = self.system.licences.get(library, ("", ""))
        text = (self.root or Path("/")) / "usr" / "share" / "doc" / package / "copyright"
        return text if package and text.is_file() else None

    def _made(self) -> str:
        """What ``prepare`` makes something of."""
        return _RUNTIME if self.root is not None else ""

    def _newer(self) -> str:
        """What to do about a compiler that is too old."""
        return f"GCC {_FIRST[self.arch]} or newer; Debian 13, or a container of it, has 14"

    def _strip(self) -> list[str]:
        """For the compiler, which takes it along to the linker: no symbols but those that others ask for."""
        return ["-s"]

    def _cxx_headers(self) -> list[str]:
        return [f"c++/{GCC}", f"{self.triplet}/c++/{GCC}", f"c++/{GCC}/backward"]

    def _flags(self, first: list[str]) -> list[str]:
        """Its headers in place of this system's, with ``first`` before those of C, and its libraries."""
        if self.root is None:
            return []
        usr = self.root / "usr"
        own = proc.run([self.compiler("gcc"), "-print-file-name=include"], timeout=60).stdout.strip()
        headers = [*(usr / "include" / name for name in first), Path(own)]
        headers += [usr / "include" / self.triplet, usr / "include"]
        libraries = [usr / "lib" / "gcc" / self.triplet / GCC, usr / "lib" / self.triplet]
        libraries.append(self.root / "lib" / self.triplet)
        flags = [f"-ffile-prefix-map={self.root}=base", "-nostdinc", *(["-nostdinc++"] if first else [])]
        for header in headers:
            flags += ["-isystem", os.fspath(header)]
        return [*flags, f"-B{usr / 'lib' / self.triplet}", *(f"-L{library}" for library in libraries)]


def linked_with(flags: str) -> dict[str, str]:
    """CMake's definitions that give the linker flags, whatever is linked."""
    return {f"CMAKE_{kind}_LINKER_FLAGS_INIT": flags for kind in ("EXE", "SHARED", "MODULE")}


def tool(program: str, remedy: str, target: str) -> str:
    """Path of a program that compiles for ``target``. Raises BuildError with the remedy without it."""
    path = shutil.which(program)
    if path is None:
        raise BuildError(f"there is no {program}, which compiles for {target}", remedy=remedy)
    return path


def old(arch: str) -> BaseSystem:
    """Debian 11 for a processor; its libraries are fetched on first use. Raises BuildError."""
    _require_known(arch)
    digest = hashlib.sha256(" ".join([RELEASE, arch, *_PACKAGES]).encode()).hexdigest()[:12]
    root = paths.cache_dir() / f"debian-{RELEASE}-{arch}-{digest}"
    with locked(root.with_name(root.name + ".lock"), f"another ggufrq is getting Debian's {RELEASE}"):
        if not root.is_dir():
            with paths.atomic_path(root) as making:
                versions = debian.unpack(making, release=RELEASE, alone=_PACKAGES, arch=arch)
                _keep_links_inside(making)
                (making / _VERSIONS).write_text(json.dumps(versions) + "\n", encoding="utf-8")
    found = read_json(root / _VERSIONS) or {}
    return BaseSystem(arch, root, tuple(sorted(found.items())))


def here(arch: str) -> BaseSystem:
    """This system. Raises UsageError for another processor, whose libraries it does not have."""
    _require_known(arch)
    if arch != platform.machine():
        raise UsageError(
            f"this system is for {platform.machine()}, not for {arch}",
            remedy=f"--arch {arch} alone, which takes the libraries of Debian's {RELEASE}",
        )
    return BaseSystem(arch)


def _keep_links_inside(root: Path) -> None:
    """Links to ``/lib/x`` mean a file below ``root``, not this system's."""
    for link in root.rglob("*"):
        if link.is_symlink() and (target := link.readlink()).is_absolute():
            inside = root / target.relative_to(target.anchor)
            link.unlink()
            link.symlink_to(os.path.relpath(inside, link.parent))


def _require_known(arch: str) -> None:
    if platform.system() != "Linux" or arch not in debian.ARCHITECTURES:
        raise UsageError(
            f"programs to give away are made on Linux, for {' or '.join(debian.ARCHITECTURES)}; here is "
            f"{systems.machine()}, and {arch} was asked for",
            remedy="ggufrq build, for this machine",
        )

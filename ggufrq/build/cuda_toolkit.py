"""NVIDIA's compiler and libraries: from the system, from NVIDIA's PyPI wheels, or some from each.

CMake wants one toolkit folder. Where no single one has all parts, as with the wheels (whose libraries lack
the names that a linker looks for) or a system that has the compiler but no cuBLAS, a folder of links is made
in the cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.base.errors import BuildError, ToolError
from ggufrq.build import toolchain
from ggufrq.build.toolchain import Missing

#: What brings all parts through pip; one CUDA version, or the compiler meets headers of another.
WHEELS = tuple(
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl", "cublas")
)

#: Functions of the driver that ggml-cuda is linked to. Where no driver is installed a library that only names
#: them stands in for it at link time; it is never loaded.
_DRIVER = (
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
)


@dataclass(frozen=True)
class Toolkit:
    """A complete toolkit: its root, nvcc in it, nvcc's version, and where its parts came from."""

    root: Path
    nvcc: Path
    version: str
    parts: tuple[Path, ...]


@dataclass(frozen=True)
class Card:
    """A GPU that the driver shows: name, compute capability ("9.0"), memory in MiB, driver version."""

    name: str
    capability: str
    memory: int
    driver: str

    @property
    def architecture(self) -> str:
        """As CMake names it: "90"; consumer Blackwell and newer need the form with "a"."""
        number = self.capability.replace(".", "")
        return number + ("a" if int(number) >= 120 else "")


@functools.lru_cache(maxsize=1)
def cards() -> tuple[Card, ...]:
    """The NVIDIA cards of this machine, by nvidia-smi; none where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        text = proc.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], timeout=60).stdout
    except ToolError:
        return ()
    return parse_cards(text)


def parse_cards(text: str) -> tuple[Card, ...]:
    """What ``nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version`` printed as bare CSV."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and re.fullmatch(r"\d+\.\d+", fields[1]):
            memory = int(float(fields[2])) if re.fullmatch(r"[\d.]+", fields[2]) else 0
            found.append(Card(fields[0], fields[1], memory, fields[3]))
    return tuple(found)


def roots() -> list[Path]:
    """Folders that hold a toolkit or parts of one: the one that the user chose by ``$CUDA_PATH``,
    ``$CUDA_HOME`` or ``$CUDACXX``, else the system's; then those of the wheels.
    """
    chosen = [Path(os.environ[name]) for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    if os.environ.get("CUDACXX"):
        chosen.append(Path(os.environ["CUDACXX"]).parent.parent)
    nvcc = shutil.which("nvcc")
    system = [Path(nvcc).resolve().parent.parent] if nvcc else []
    found: dict[Path, None] = {}
    for path in (*(chosen or [*system, Path("/usr/local/cuda")]), *_wheel_folders()):
        # a part of a toolkit, not a wrapper in some bin folder
        if _has(path, "include/cuda_runtime.h", "include/cublas_v2.h", "nvvm/bin/cicc"):
            found[path.resolve()] = None
    return list(found)


def _wheel_folders() -> Iterator[Path]:
    """nvidia/cu13 and its like in this Python's packages, newest first; before CUDA 13 a folder per wheel."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(place).glob("cu[0-9]*"), reverse=True)
        yield from (Path(place) / name for name in ("cuda_nvcc", "cuda_runtime", "cublas"))


def _has(root: Path, *names: str) -> bool:
    return any((root / name).exists() for name in names)


_PARTS = {
    "the compiler (nvcc)": ("bin/nvcc",),
    "the headers of the runtime": ("include/cuda_runtime.h",),
    "the runtime library": ("lib64/libcudart.so", "lib/libcudart.so", "lib/libcudart.so.13"),
    "cuBLAS with its headers": ("include/cublas_v2.h",),
}


def missing() -> list[Missing]:
    """What of a toolkit is found nowhere."""
    found = roots()
    absent = [what for what, names in _PARTS.items() if not any(_has(root, *names) for root in found)]
    if not absent:
        return []
    remedy = f"{sys.executable} -m pip install " + " ".join(f"'{wheel}'" for wheel in WHEELS)
    return [Missing("of the CUDA toolkit " + ", ".join(absent) + " was not found", remedy)]


def find() -> Toolkit:
    """The toolkit to build with; makes the folder of links where it takes one.

    Raises BuildError when parts are missing.
    """
    toolchain.require(missing())
    found = roots()
    compiler = next(root for root in found if _has(root, "bin/nvcc"))
    whole = _has(compiler, "include/cublas_v2.h") and _has(compiler, "lib64/libcublas.so")
    root = compiler if whole and _driver_library(compiler) else _linked(compiler, found)
    parts = (compiler,) if root == compiler else tuple(found)
    return Toolkit(root, root / "bin" / "nvcc", _version(compiler / "bin" / "nvcc"), parts)


def definitions(toolkit: Toolkit) -> dict[str, str]:
    """CMake's definitions that make it take this toolkit. It counts the toolkit's libraries among those that
    the loader finds by itself, which those of the wheels are not: hence the path.
    """
    return {
        "CMAKE_INSTALL_RPATH": f"$ORIGIN;{toolkit.root / 'lib64'}",
        "CMAKE_CUDA_COMPILER": str(toolkit.nvcc),
        "CUDAToolkit_ROOT": str(toolkit.root),
    }


def wheel_paths(toolkit: Toolkit) -> tuple[str, ...]:
    """Where the libraries of NVIDIA's wheels lie, as the loader is told it, for programs that are given away
    in ``PACKAGE/bin`` of a wheel: the folders of ``_wheel_folders``."""
    major = int(toolkit.version.partition(".")[0])
    parts = (f"cu{major}",) if major >= 13 else ("cuda_runtime", "cublas")
    return tuple(f"$ORIGIN/../../nvidia/{part}/lib" for part in parts)


def _version(nvcc: Path) -> str:
    text = proc.run([nvcc, "--version"], timeout=60).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", text)
    return release[1] if release else "unknown"


def _driver_library(root: Path) -> Path | None:
    """libcuda.so to link to: a stub of the toolkit, else the driver's own."""
    places = [root / "lib64" / "stubs", root / "lib" / "stubs"]
    places += [Path(p) for p in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")]
    places += [Path("/usr/local/nvidia/lib64")]
    names = [place / name for place in places for name in ("libcuda.so", "libcuda.so.1")]
    return next((name for name in names if name.exists()), None)


def _linked(compiler: Path, found: list[Path]) -> Path:
    """A folder that links to the parts of several, the one of the compiler first."""
    order = [compiler, *(root for root in found if root != compiler)]
    digest = hashlib.sha256("\n".join(map(str, order)).encode()).hexdigest()[:12]
    target = paths.cache_dir() / "cuda" / digest
    if all(_has(target, *names) for names in _PARTS.values()):
        return target
    paths.remove_tree(target)  # links to packages that are gone
    with paths.atomic_path(target) as making:
        for folder in ("bin", "include", "lib64"):
            (making / folder).mkdir(parents=True)
        _link_all(making / "bin", (compiler / "bin").iterdir())
        nvvm = next((root / "nvvm" for root in order if (root / "nvvm" / "bin").is_dir()), None)
        if nvvm is not None:
            (making / "nvvm").symlink_to(nvvm, target_is_directory=True)
        for root in order:
            _link_all(making / "include", (root / "include").glob("*"))
            for lib in ("lib64", "lib"):
                _link_all(making / "lib64", (path for path in (root / lib).glob("*") if path.name != "stubs"))
        for library in list((making / "lib64").glob("lib*.so.*")):
            plain = making / "lib64" / (library.name.split(".so.")[0] + ".so")
            if not plain.exists():
                plain.symlink_to(library.name)
        driver = _driver_library(compiler)
        stubs = making / "lib64" / "stubs"
        stubs.mkdir()
        if driver is not None:
            (stubs / "libcuda.so").symlink_to(driver)
        else:
            _make_stub(stubs / "libcuda.so")
    return target


def _link_all(folder: Path, files: Iterable[Path]) -> None:
    for file in files:
        link = folder / file.name
        if not link.is_symlink():
            link.symlink_to(file, target_is_directory=file.is_dir())


def _make_stub(target: Path) -> None:
    compiler = toolchain.compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found", remedy=toolchain.remedy("compiler"))
    source = target.with_suffix(".c")
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in _DRIVER), encoding="utf-8")
    proc.run([compiler.path, "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", target])
    source.unlink()

"""The bundle of gpu_check.py: what a finished build for CUDA is run with, on a machine without a network.

Programs and their libraries stripped, the embedded models, a text, ggufrq itself; no source, nothing is
compiled there. cuBLAS, the driver, glibc and numpy are that machine's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ggufrq.base import paths, proc
from ggufrq.base.errors import BuildError, UsageError
from ggufrq.base.results import file_sha256
from ggufrq.build import manifest
from ggufrq.build.toolchain import compiler

PROGRAMS = ("test-backend-ops", "llama-bench", "llama-perplexity")
#: Bytes of a bundle at most.
LIMIT = 62 << 20

#: Found on every machine, or there with the driver.
_SYSTEM = re.compile(r"ld-linux.*|lib(c|m|dl|pthread|rt|util|resolv|cuda)\.so(\..*)?")
#: Far too large to bring: the toolkit there, or its wheels, must have them.
_LARGE = re.compile(r"lib(cublas|cublasLt|nccl|cudnn).*\.so(\..*)?")

#: The exit status of `gpu_check.py run` where all is there but a card.
NO_DEVICE = 4

_FATBIN = struct.Struct("<IHHQ")
_FATBIN_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct("<HHIQ")
_PTX, _MACHINE_CODE = 1, 2


# ---- what a program needs ----


def needed(path: Path) -> list[str]:
    """Names of the libraries that a program or library is linked to."""
    text = proc.run(["readelf", "-d", path]).stdout
    return re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", text)


def libraries(programs: Sequence[Path], folders: Sequence[Path]) -> tuple[dict[str, Path], set[str]]:
    """All libraries that the programs load, by name, found in ``folders`` and else where the system has them;
    and the names of those that are left to the machine that they run on.

    Raises BuildError for one that is nowhere.
    """
    carried: dict[str, Path] = {}
    left: set[str] = set()
    todo = list(programs)
    while todo:
        for name in needed(todo.pop()):
            if name in carried or name in left or _SYSTEM.fullmatch(name):
                continue
            found = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if _LARGE.fullmatch(name):
                left.add(name)
                todo += [found] if found else []  # cuBLAS takes two
                continue
            found = found or _system_library(name)
            if found is None:
                raise BuildError(
                    f"the library {name} of the build was not found", remedy="ggufrq build --tests"
                )
            carried[name] = found.resolve()
            todo.append(carried[name])
    return carried, left


def _system_library(name: str) -> Path | None:
    text = proc.run([shutil.which("ldconfig") or "/sbin/ldconfig", "-p"]).stdout
    found = re.search(rf"^\s+{re.escape(name)} \(libc6,x86-64[^)]*\) => (.+)$", text, re.MULTILINE)
    return Path(found[1]) if found else None


# ---- what of a file is not needed ----


def only_origin(path: Path) -> list[str]:
    """Let a file look for its libraries beside itself alone; returns the folders that it named.

    In place: the path that it had is ended after ``$ORIGIN``.
    """
    data = path.read_bytes()
    text = proc.run(["readelf", "-d", path]).stdout
    gone = []
    for value in re.findall(r"\((?:RPATH|RUNPATH)\)\s+Library (?:rpath|runpath): \[(.*)\]", text):
        if value == "$ORIGIN":
            continue
        old = value.encode() + b"\0"
        new = b"$ORIGIN" if len(value) >= len("$ORIGIN") else b""
        if data.count(b"\0" + old) != 1:
            raise BuildError(f"{path.name}: its path of libraries is not where it was looked for")
        data = data.replace(b"\0" + old, b"\0" + new.ljust(len(old), b"\0"))
        gone += [folder for folder in value.split(":") if folder != "$ORIGIN"]
    if gone:
        path.write_bytes(data)
    return gone


def _fatbin_entries(data: bytes, begin: int, end: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Of each fat binary in a section its entries: kind, architecture, start and size of the content."""
    at = begin
    while at + _FATBIN.size <= end:
        magic, _, header, size = _FATBIN.unpack_from(data, at)
        if magic != _FATBIN_MAGIC:
            at += 8
            continue
        entries = []
        entry, stop = at + header, at + header + size
        while entry + 32 <= stop:
            kind, _, own_header, content = _ENTRY.unpack_from(data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            entries.append((kind, architecture, entry + own_header, content))
            entry += own_header + content
        if entry != stop:
            raise BuildError("the device code of the build is not laid out as nvcc 13 does it")
        yield entries
        at = stop


def _section(data: bytes, name: str) -> tuple[int, int] | None:
    """Begin and end of a section of a 64-bit ELF file, None without it."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, strings = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names = sections[strings][4]
    for section in sections:
        begin = names + section[0]
        if data[begin : data.index(b"\0", begin)] == name.encode():
            return section[4], section[4] + section[5]
    return None


def drop_ptx(path: Path, architecture: int) -> int:
    """Blank the PTX of a library, for a card that its machine code for ``architecture`` serves; returns how
    many bytes. The driver takes machine code where there is any, and zeros pack to nothing. Sizes stay.

    Raises BuildError where some code is there as PTX alone.
    """
    code = path.read_bytes()
    place = _section(code, ".nv_fatbin")
    if place is None:
        return 0
    data = bytearray(code)
    gone = 0
    for entries in _fatbin_entries(code, *place):
        if not any(kind == _MACHINE_CODE and arch == architecture for kind, arch, _, _ in entries):
            raise BuildError(
                f"{path.name} has kernels without machine code for sm_{architecture}",
                remedy=f"ggufrq build --tests --backend cuda --cuda-arch {architecture}",
            )
        for kind, _, start, size in entries:
            if kind == _PTX:
                data[start : start + size] = bytes(size)
                gone += size
    path.write_bytes(data)
    return gone


# ---- pack ----


def find_cuda_build(patch_set: str) -> Path:
    """A complete build for CUDA with this patch set and all programs: one for any processor before one for
    this, then the newest. Raises BuildError without one."""
    found = []
    for root in paths.builds_dir().iterdir():
        facts = manifest.read(root) if root.is_dir() else None
        if not facts or facts["backend"] != "cuda" or facts["patch_set"] != patch_set:
            continue
        if set(PROGRAMS) <= set(facts["programs"]):
            found.append((facts["native"], -(root / manifest.MANIFEST).stat().st_mtime, root))
    if not found:
        raise BuildError(
            "there is no build for CUDA of these patches with " + ", ".join(PROGRAMS),
            remedy="ggufrq build --tests --no-native --backend cuda --cuda-arch 90",
        )
    return min(found)[2]


def library_folders(build: Path) -> list[Path]:
    """Where the libraries of a build are, its own and those that it was linked to."""
    source = build / "obj" / "bin"
    found = [source]
    for path in sorted(source.glob("*.so")):
        text = proc.run(["readelf", "-d", path]).stdout
        for value in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", text):
            found += [Path(folder) for folder in value.split(":") if folder.startswith("/")]
    return list(dict.fromkeys(found))


def fill(root: Path, build: Path, architecture: int) -> dict[str, Any]:
    """Put programs and libraries of a build into ``root/bin``; returns facts for bundle.json."""
    facts = manifest.read(build)
    if facts is None:
        raise UsageError(f"{build} is no finished build", remedy="a folder that `ggufrq build --json` names")
    programs = [build / "obj" / "bin" / name for name in PROGRAMS]
    for path in programs:
        if not path.is_file():
            raise BuildError(f"the build in {build} has no {path.name}", remedy="ggufrq build --tests")
    carried, left = libraries(programs, library_folders(build))
    target = root / "bin"
    target.mkdir()
    before = after = ptx = 0
    for name, path in {**{path.name: path for path in programs}, **carried}.items():
        copy = Path(shutil.copy(path, target / name))
        copy.chmod(0o755)
        before += copy.stat().st_size
        proc.run(["strip", "--strip-unneeded", copy])
        only_origin(copy)
        after += copy.stat().st_size
        ptx += drop_ptx(copy, architecture)
    return {
        "commit": facts["llama_cpp"]["commit"],
        "patch_set": facts["patch_set"],
        "backend": facts["backend"],
        "versions": facts["versions"],
        "native": facts["native"],
        "cpu": facts["cpu"],
        "architecture": architecture,
        "left": sorted(left),
        "bytes": {"built": before, "stripped": after, "ptx": ptx},
    }


def _models(root: Path, source: Path) -> list[str]:
    """The embedded models in Q8_0, which halves them."""
    from ggufrq.models.convert import convert
    from ggufrq.models.resolve import embedded_models

    quantizers = sorted(paths.builds_dir().glob("*/obj/bin/llama-quantize"))
    if not quantizers:
        raise BuildError("no build has llama-quantize", remedy="ggufrq build")
    names = []
    for name, folder in embedded_models().items():
        f16 = convert(folder, root / f"{name}-f16.gguf", source)
        proc.run([quantizers[-1], f16, root / f"{name}.gguf", "Q8_0"])
        f16.unlink()
        names.append(name)
    return names


def collect(root: Path, build: Path, architecture: int, *, models: bool = True) -> dict[str, Any]:
    """Fill the empty folder of a bundle; returns what bundle.json says."""
    import ggufrq
    from ggufrq.base.machine import processor

    facts = fill(root, build, architecture)
    leave = shutil.ignore_patterns("data", "__pycache__", "cli")
    shutil.copytree(Path(ggufrq.__file__).parent, root / "ggufrq", ignore=leave)
    shutil.copy(paths.data_dir("texts") / "heldout.txt", root)
    shutil.copy(Path(__file__).with_name("gpu_check.py"), root)
    facts["models"] = _models(root, build / "src") if models else []
    facts["flags"] = list(processor().flags) if facts["native"] else []
    facts["files"] = {
        path.relative_to(root).as_posix(): file_sha256(path)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    write_facts(root, facts)
    return facts


def write_facts(root: Path, facts: dict[str, Any]) -> None:
    """bundle.json."""
    (root / "bundle.json").write_text(json.dumps(facts, indent=2) + "\n")


def pack(out: Path, build: Path | None, architecture: int) -> None:
    """Write the bundle, say how large it is, and prove that it is complete.

    ``build`` is the folder of a build, None for the newest that fits. Raises BuildError when the bundle is
    larger than ``LIMIT`` or does not start without what is here.
    """
    from ggufrq.patchset.series import default_patch_set

    build = build or find_cuda_build(default_patch_set().hash)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch, paths.atomic_path(out) as making:
        root = Path(scratch) / "gpu-check"
        root.mkdir()
        facts = collect(root, build, architecture)
        with tarfile.open(making, "w:xz", preset=6) as tar:
            tar.add(root, "gpu-check")
        size = making.stat().st_size
        if size > LIMIT:
            largest = sorted(root.rglob("*"), key=lambda path: path.stat().st_size)[-1]
            raise BuildError(
                f"the bundle takes {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}; its largest file "
                f"is {largest.relative_to(root)}",
                remedy=f"a build for one architecture: --cuda-arch {architecture}",
            )
        said = prove(making, build)
    sizes = {name: f"{value / 2**20:.1f}" for name, value in facts["bytes"].items()}
    print(
        f"{said}\n{out}: {size / 2**20:.1f} MiB (programs and libraries {sizes['built']} MiB, stripped "
        f"{sizes['stripped']}, of which {sizes['ptx']} PTX, blanked)"
    )
    if facts["left"]:
        print("looked for on the machine with the card: " + ", ".join(facts["left"]))


# ---- the proof ----


def stub_driver(folder: Path, programs: Path) -> None:
    """A libcuda.so.1 with every function of the driver that something in ``programs`` calls; each answers "no
    device" (CUDA_ERROR_NO_DEVICE)."""
    names = {"cuInit", "cuDriverGetVersion"}
    for path in programs.iterdir():
        text = proc.run(["nm", "-D", "--undefined-only", path], check=False).stdout
        names |= set(re.findall(r"\bU (cu[A-Z]\w*)", text))  # not cudaX and cublasX
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(names)))
    found = compiler()
    if found is None:
        raise BuildError("no C compiler was found for the stub of the driver")
    options = ["-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    proc.run([found.path, *options, "-o", folder / "libcuda.so.1", source])


def prove(bundle: Path, build: Path) -> str:
    """Run the bundle in an empty folder with the stub driver, cuBLAS and numpy and nothing else, up to "no
    device"; returns what it said. Raises BuildError with its last lines when it ends otherwise."""
    import numpy

    with tempfile.TemporaryDirectory(prefix="gpu-check-proof-") as temporary:
        empty = Path(temporary)
        stubs, packages = empty / "stubs", empty / "packages"
        stubs.mkdir()
        packages.mkdir()
        with tarfile.open(bundle) as tar:
            tar.extractall(empty, filter="data")
        root = empty / "gpu-check"
        stub_driver(stubs, root / "bin")
        folders = library_folders(build)
        for name in json.loads((root / "bundle.json").read_text())["left"]:
            found = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if found is None:
                raise BuildError(f"{name}, which the build was linked to, is gone", remedy="ggufrq doctor")
            (stubs / name).symlink_to(found.resolve())
        where = Path(numpy.__file__).parent
        for path in (where, where.with_name("numpy.libs")):
            if path.exists():
                (packages / path.name).symlink_to(path)
        command: list[str | Path] = [sys.executable, "-S", "-s", root / "gpu_check.py", "run", bundle]
        command += ["--work", empty / "work", "--results", empty / "results", "--libraries", stubs]
        done = subprocess.run(
            [os.fspath(part) for part in command],
            cwd=empty,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(packages), "HOME": str(empty)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    if done.returncode != NO_DEVICE or "no device" not in done.stdout:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        raise BuildError(f"the bundle does not start in an empty folder (status {done.returncode}):\n{tail}")
    return done.stdout.strip()

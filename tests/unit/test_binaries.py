"""Builds to be given away, from made-up files: what is collected, what it asks of the system, archive and
wheel, and which programs are used where there are several."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import elves
import machos
import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename

import ggufrq
from ggufrq import cli
from ggufrq.base import paths, proc
from ggufrq.base.errors import BuildError, GgufrqError, UsageError
from ggufrq.build import (
    base_system,
    builds,
    debian,
    doctor,
    elf,
    ggml_library,
    macho,
    macos,
    mingw,
    prebuilt,
    project,
    toolchain,
    vulkan_toolkit,
)
from ggufrq.build.base_system import BaseSystem
from ggufrq.build.macos import Macos
from ggufrq.build.mingw import Mingw
from ggufrq.build.project import Build, BuildOptions, build_key, llama_project
from ggufrq.drive.run import programs_for
from ggufrq.flows.binaries import contents, job, needs
from ggufrq.make import ready

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders for Linux, with modes and links")

LIBC = {"libc.so.6": ["GLIBC_2.2.5", "GLIBC_2.30"], "libm.so.6": ["GLIBC_2.29"]}
CXX = {"libstdc++.so.6": ["GLIBCXX_3.4", "GLIBCXX_3.4.26", "CXXABI_1.3.9"], **LIBC}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseSystem:
    """An older system with an OpenMP, and a compiler that only says its version."""
    root = tmp_path / "older"
    (root / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    (root / "usr/share/doc/libgomp1").mkdir(parents=True)
    (root / "usr/share/doc/libgomp1/copyright").write_text("GPL, and an exception\n")
    elves.write(root / "usr/lib/x86_64-linux-gnu/libgomp.so.1", ["libc.so.6"], path_entry="")
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho g++ 12.2.0\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(BaseSystem, "compiler", lambda *_: str(compiler))
    return BaseSystem("x86_64", root, (("libc6", "2.31"),))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Programs over libllama, modules of ggml, tests that stay behind, and a tree with the converter."""
    root = tmp_path / "a build"
    folder, source = root / "obj" / "bin", root / "src"
    folder.mkdir(parents=True)
    for name in project.TARGETS:
        elves.write(folder / name, ["libllama.so.0", "libggml.so.0", "libc.so.6"], LIBC)
    for name, needed in (("llama", ["libggml.so.0"]), ("ggml", ["libggml-base.so.0"]), ("ggml-base", [])):
        real = elves.write(folder / f"lib{name}.so.0.5.0", [*needed, "libstdc++.so.6"], CXX)
        (folder / f"lib{name}.so.0").symlink_to(real.name)
        (folder / f"lib{name}.so").symlink_to(real.name)
    for name in ("haswell", "x64"):
        elves.write(folder / f"libggml-cpu-{name}.so", ["libggml-base.so.0", "libgomp.so.1"])
    elves.write(folder / "libggml-cuda.so", ["libggml-base.so.0", "libcublas.so.13"])
    elves.write(folder / "test-backend-ops")
    (source / "licenses").mkdir(parents=True)
    (source / "LICENSE").write_text("llama.cpp's\n")
    (source / "licenses" / "LICENSE-x").write_text("x's\n")
    for name in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/x.py", "src/llama-vocab.cpp"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "src" / "llama.cpp").write_text("stays behind")
    found = llama_project()
    pin = {"commit": found.pin.commit, "tree": found.pin.tree, "date": found.pin.date}
    facts = {"llama_cpp": pin, "patch_set": found.patch_set.hash, "backend": "cpu", "cpu": "of this machine"}
    return Build("key", root, folder, source, {**facts, "native": False})


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Path]:
    path = tmp_path / "docs-qwen3-8m-Q8_0.gguf"
    path.write_bytes(b"GGUF")
    return {path.name: path}


@pytest.fixture
def bundle(build: Build, base: BaseSystem, model: dict[str, Path], tmp_path: Path) -> job.Bundle:
    return job.write(tmp_path / "out", build, base, model)


@pytest.fixture
def unpacked(bundle: job.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive in a folder of its own, on a Linux that is new enough."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    with tarfile.open(bundle.archive) as tar:
        tar.extractall(tmp_path / "elsewhere")
    (folder,) = (tmp_path / "elsewhere").iterdir()
    return folder


@pytest.fixture
def wheel(
    bundle: job.Bundle, unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The wheel as it lies in an environment."""
    site = tmp_path / "site"
    zipfile.ZipFile(bundle.wheel).extractall(site)
    monkeypatch.syspath_prepend(str(site))
    sys.modules.pop(prebuilt.PACKAGE, None)
    yield site / prebuilt.PACKAGE
    sys.modules.pop(prebuilt.PACKAGE, None)


# what files ask for


def test_what_an_elf_file_asks_for(tmp_path: Path) -> None:
    found = elf.read(elves.write(tmp_path / "x", ["liba.so.1", "libc.so.6"], CXX, arch="aarch64"))
    assert found is not None
    assert (found.arch, found.needed, found.path) == ("aarch64", ("liba.so.1", "libc.so.6"), "$ORIGIN")
    assert found.versions == {name: tuple(versions) for name, versions in CXX.items()}
    newer = elf.read(elves.write(tmp_path / "y", path_entry="/opt:$ORIGIN", new_tags=True))
    assert newer is not None and newer.path == "/opt:$ORIGIN" and newer.versions == {}


def test_what_is_no_elf_file_or_damaged(tmp_path: Path) -> None:
    whole = elves.write(tmp_path / "x", ["libc.so.6"], LIBC).read_bytes()
    for data in (b"", b"#!/bin/sh\n", whole[:40], whole[:190], b"\x7fELF\x01" + whole[5:]):
        (tmp_path / "y").write_bytes(data)
        assert elf.read(tmp_path / "y") is None


@pytest.mark.parametrize(
    ("newest", "tag"),
    [
        ({"GLIBC": "2.17", "GLIBCXX": "3.4.19"}, "manylinux_2_17"),
        ({"GLIBC": "2.18"}, "manylinux_2_28"),
        ({"GLIBC": "2.30", "GLIBCXX": "3.4.28", "CXXABI": "1.3.9", "GCC": "3.0"}, "manylinux_2_31"),
        ({"GLIBC": "2.17", "GLIBCXX": "3.4.29"}, "manylinux_2_34"),
        ({"GLIBC": "2.9"}, "manylinux_2_17"),
        ({"GLIBC": "2.99"}, "linux"),
        ({"LIBATOMIC": "1.0"}, "linux"),
    ],
)
def test_the_tag_is_the_oldest_system_that_has_it_all(newest: dict[str, str], tag: str) -> None:
    assert needs.Needs(newest, {}).tag("x86_64") == f"{tag}_x86_64"
    assert needs.Needs(newest, {"libfoo.so.1": "libx.so"}).tag("aarch64") == "linux_aarch64"


# what is collected


def test_programs_and_all_that_they_load(build: Build, base: BaseSystem) -> None:
    files, asked = contents.programs(build, base)
    libraries = {name for name in files if ".so" in name}
    assert libraries == {
        *("libllama.so.0", "libggml.so.0", "libggml-base.so.0", "libgomp.so.1"),
        *("libggml-cpu-haswell.so", "libggml-cpu-x64.so", "libggml-cuda.so"),
    }
    assert files.keys() - libraries == set(project.TARGETS)
    assert all(not path.is_symlink() for path in files.values()) and files.keys() == asked.keys()
    found = needs.of(asked)
    assert found.versions == {"CXXABI": "1.3.9", "GLIBC": "2.30", "GLIBCXX": "3.4.26"}
    assert found.outside == {"libcublas.so.13": "libggml-cuda.so"}


def test_what_cannot_be_given_away(build: Build, base: BaseSystem) -> None:
    program = build.bin / "llama-cli"
    for file, message in (
        ({"needed": ["libfoo.so.1"]}, "llama-cli takes libfoo.so.1, which is neither in the build nor"),
        ({"arch": "aarch64"}, "it is for aarch64, not x86_64"),
        ({"needed": ["libllama.so.0"], "path_entry": "/home/me"}, "does not look for its libraries beside"),
        (
            {"path_entry": "$ORIGIN:/opt/cuda/lib64"},
            "llama-cli looks for libraries in /opt/cuda/lib64, of this",
        ),
    ):
        elves.write(program, **file)  # type: ignore[arg-type]
        with pytest.raises(BuildError, match=message):
            contents.programs(build, base)
    program.write_text("#!/bin/sh\n")
    with pytest.raises(BuildError, match="it is no program for Linux"):
        contents.programs(build, base)
    program.unlink()
    with pytest.raises(GgufrqError, match="no program 'llama-cli'"):
        contents.programs(build, base)


def test_an_archive_says_what_is_in_it(bundle: job.Bundle, unpacked: Path) -> None:
    assert bundle.archive.name == f"ggufrq-bin-{ggufrq.__version__}-linux-x86_64.tar.xz"
    sums = dict(line.split("  ")[::-1] for line in (unpacked / job.SUMS).read_text().splitlines())
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert sums.keys() == held - {job.SUMS}
    for name, digest in sums.items():
        assert hashlib.sha256((unpacked / name).read_bytes()).hexdigest() == digest, name
        assert bool((unpacked / name).stat().st_mode & 0o111) == name.startswith("bin/"), name
    assert {name for name in held if not name.startswith("bin/")} == {
        *("README.txt", "SHA256SUMS", "manifest.json", "models/docs-qwen3-8m-Q8_0.gguf"),
        *(f"licenses/{name}" for name in ("ggufrq.txt", "llama.cpp.txt", "llama.cpp-LICENSE-x.txt")),
        *("licenses/libgomp.txt", "licenses/texts-of-the-models.md"),
        *("source/convert_hf_to_gguf.py", "source/conversion/base.py", "source/gguf-py/gguf/x.py"),
        "source/src/llama-vocab.cpp",
    }
    facts = json.loads((unpacked / "manifest.json").read_text())
    assert facts == bundle.manifest and facts["needs"]["GLIBC"] == "2.30"
    assert facts["tag"] == "linux_x86_64" and facts["outside"]  # for the module that takes CUDA's libraries
    assert facts["base"] == {"name": "Debian bullseye", "packages": {"libc6": "2.31"}}
    assert "glibc 2.30 and newer" in (unpacked / "README.txt").read_text()


def test_a_wheel_of_the_same(build: Build, base: BaseSystem, model: dict[str, Path], tmp_path: Path) -> None:
    (build.bin / "libggml-cuda.so").unlink()
    made = job.write(tmp_path / "out", build, base, model)
    name, version, _, tags = parse_wheel_filename(made.wheel.name)
    assert (name, str(version)) == ("ggufrq-bin", ggufrq.__version__)
    assert {str(tag) for tag in tags} == {"py3-none-manylinux_2_31_x86_64"}
    whole = zipfile.ZipFile(made.wheel)
    runs = {one.filename for one in whole.infolist() if one.external_attr >> 16 & 0o111}
    assert runs == {one for one in whole.namelist() if one.startswith("ggufrq_bin/bin/")}
    info = f"ggufrq_bin-{version}.dist-info"
    said = whole.read(f"{info}/METADATA").decode()
    assert f"Name: ggufrq-bin\nVersion: {version}\n" in said and "License-File: libgomp.txt\n" in said
    assert whole.read(f"{info}/licenses/libgomp.txt").startswith(b"GPL")
    facts = json.loads(whole.read("ggufrq_bin/manifest.json"))
    assert all(f"ggufrq_bin/{name}" in whole.namelist() for name in facts["files"])


def test_pip_puts_a_wheel_for_cuda_in_place_of_another_and_brings_its_libraries(
    build: Build, base: BaseSystem, tmp_path: Path
) -> None:
    cuda = replace(build, manifest={**build.manifest, "backend": "cuda"})
    made = job.write(tmp_path / "out", cuda, base, {})
    assert made.archive.name == f"ggufrq-bin-{ggufrq.__version__}-cuda-linux-x86_64.tar.xz"
    name, version, _, _ = parse_wheel_filename(made.wheel.name)
    assert (name, str(version)) == ("ggufrq-bin", f"{ggufrq.__version__}+cuda")
    assert SpecifierSet(f"=={ggufrq.__version__}").contains(version)  # what the extra asks for
    said = zipfile.ZipFile(made.wheel).read(f"ggufrq_bin-{version}.dist-info/METADATA").decode()
    assert f"\nVersion: {version}\n" in said and "\nRequires-Dist: nvidia-cublas>=13.0,<14\n" in said
    platform_of_it = ["--platform", "linux_x86_64", "--only-binary", ":all:"]  # whatever this one is
    _, *command = shlex.split(prebuilt.INSTALL.replace("DIR", str(made.wheel.parent)))
    proc.run([sys.executable, *command, "--target", tmp_path / "site", *platform_of_it])
    assert (tmp_path / "site" / prebuilt.PACKAGE / prebuilt.MANIFEST).is_file()  # without its libraries
    older = needs.Needs({}, {"libcudart.so.12": "x", "libcublasLt.so.12": "x", "libcuda.so.1": "x"})
    assert older.wheels == {
        "libcudart.so.12": "nvidia-cuda-runtime-cu12",
        "libcublasLt.so.12": "nvidia-cublas-cu12",
    }


def test_the_same_build_elsewhere_makes_the_same_bytes(
    build: Build, base: BaseSystem, model: dict[str, Path], bundle: job.Bundle, tmp_path: Path
) -> None:
    moved = tmp_path / "another place"
    shutil.copytree(build.root, moved, symlinks=True)
    for path in moved.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    (moved / "src" / "conversion" / "__pycache__").mkdir()
    (moved / "src" / "conversion" / "__pycache__" / "x.pyc").write_bytes(b"left by a run")
    facts = {**build.manifest, "cpu": "another", "date": "2030-01-01"}
    again = Build("other", moved, moved / "obj" / "bin", moved / "src", facts)
    other = replace(base, root=base.root and base.root.rename(tmp_path / "moved, too"))
    second = job.write(tmp_path / "again", again, other, model)
    assert second.archive.read_bytes() == bundle.archive.read_bytes()
    assert second.wheel.read_bytes() == bundle.wheel.read_bytes()
    assert str(tmp_path) not in json.dumps(second.manifest)


def test_the_time_of_files(bundle: job.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(bundle.archive) as tar:
        times = {entry.mtime for entry in tar}
    assert times == {job._epoch(llama_project().pin.date)}
    monkeypatch.setenv(job.EPOCH, "1700000000")
    assert job._epoch("2026-01-01") == 1_700_000_000
    monkeypatch.setenv(job.EPOCH, "yesterday")
    with pytest.raises(UsageError, match="a number of seconds, not 'yesterday'"):
        job._epoch("2026-01-01")


# the system that it is for


def test_a_base_makes_another_build_wherever_it_lies(
    base: BaseSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BuildOptions.portable()
    keys = [
        build_key(llama_project(), replace(plain, base=one))
        for one in (
            None,
            BaseSystem("x86_64"),
            BaseSystem("aarch64"),
            BaseSystem("x86_64", tmp_path / "a", (("libc6", "1"),)),
            BaseSystem("x86_64", tmp_path / "b", (("libc6", "2"),)),
        )
    ]
    assert len(set(keys)) == len(keys)
    other = BaseSystem("x86_64", tmp_path / "elsewhere", (("libc6", "1"),))
    assert build_key(llama_project(), replace(plain, base=other)) == keys[3]
    monkeypatch.setattr(BaseSystem, "_flags", lambda *_: ["-O1"])
    assert build_key(llama_project(), replace(plain, base=other)) != keys[3]
    assert not plain.native and "-DGGML_CPU_ALL_VARIANTS=ON" in plain.cmake_args


def test_definitions_name_its_headers_and_libraries_alone(base: BaseSystem, tmp_path: Path) -> None:
    defined = base.definitions(tmp_path / "a place" / "b")
    assert defined["CMAKE_SYSROOT"] == str(base.root)
    mapped = f"-ffile-prefix-map={tmp_path / 'a place' / 'b' / 'src'}=src"
    assert f"-Xcompiler={mapped}" in shlex.split(defined["CMAKE_CUDA_FLAGS"])
    assert mapped in shlex.split(defined["CMAKE_HIP_FLAGS"])
    for language in ("C", "CXX"):
        flags = shlex.split(defined[f"CMAKE_{language}_FLAGS"])
        assert mapped in flags
        assert "-nostdinc" in flags and f"-L{base.root}/usr/lib/x86_64-linux-gnu" in flags
    assert "c++/10" in defined["CMAKE_CXX_FLAGS"] and "c++/10" not in defined["CMAKE_C_FLAGS"]
    assert "CMAKE_SYSROOT" not in BaseSystem(platform.machine()).definitions(tmp_path)


def test_a_compiler_that_is_too_old_for_a_module_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "aarch64-linux-gnu-g++"
    compiler.write_text("#!/bin/sh\ncase $1 in *+sme) exit 1;; esac\n")
    compiler.chmod(0o755)
    (tmp_path / "x86_64-linux-gnu-g++").symlink_to(compiler)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(base_system, "old", BaseSystem)
    monkeypatch.setattr(builds, "ensure_build", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(BuildError, match=r"does not take -march=armv9.2-a\+sme") as caught:
        job.make(tmp_path / "out", arch="aarch64")
    assert "GCC 14" in str(caught.value.remedy)
    BaseSystem("x86_64").require_modules()


def test_debian_is_asked_for_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unpack(target: Path, **given: Any) -> dict[str, str]:
        asked.append(given["arch"])
        (target / "lib").mkdir(parents=True)
        (target / "lib" / "real.so").touch()
        (target / "lib" / "link.so").symlink_to("/lib/real.so")
        return {"libc6": "2.31"}

    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(debian, "unpack", unpack)
    made = base_system.old("aarch64")
    assert made == base_system.old("aarch64") and asked == ["aarch64"]
    assert made.versions == (("libc6", "2.31"),) and made.root is not None
    assert made.root.parent == cache
    assert (made.root / "lib" / "link.so").resolve() == made.root / "lib" / "real.so"
    with pytest.raises(UsageError, match="for x86_64 or aarch64"):
        base_system.old("riscv64")


@pytest.mark.usefixtures("no_programs")
def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(debian.Unreachable, match="there is no apt-get") as caught:
        debian.unpack(tmp_path / "x", release="bullseye", alone=["libc6"])
    assert "Debian" in (caught.value.remedy or "") and not list(tmp_path.iterdir())
    with pytest.raises(BuildError, match="no aarch64-linux-gnu-g\\+\\+, which compiles for aarch64"):
        BaseSystem("aarch64").compiler("g++")


@pytest.mark.skipif(platform.system() != "Linux", reason="bundles are made on Linux")
def test_options_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.invoke(["bundle", "--backend", "cuda", "-o", str(tmp_path / "out")]) == UsageError.exit_code
    assert "try: --backend cuda --here" in capsys.readouterr().err
    found = vulkan_toolkit.Toolkit(tmp_path, "2024.1", Path("/usr/include"), "1.4.309", tmp_path, tmp_path)
    monkeypatch.setattr(vulkan_toolkit, "find", lambda: found)
    assert cli.invoke(["bundle", "--backend", "vulkan", "-o", str(tmp_path / "out")]) == UsageError.exit_code
    assert "try: VULKAN_SDK=FOLDER" in capsys.readouterr().err
    other = next(name for name in debian.ARCHITECTURES if name != platform.machine())
    loader = elves.write(tmp_path / "libvulkan.so", arch=other)
    monkeypatch.setattr(vulkan_toolkit, "find", lambda: replace(found, include=tmp_path, loader=loader))
    assert cli.invoke(["bundle", "--backend", "vulkan", "-o", str(tmp_path / "out")]) == UsageError.exit_code
    assert f"Vulkan's loader in this SDK is for {other}, not for" in capsys.readouterr().err
    assert (
        cli.invoke(["bundle", "--here", "--arch", other, "-o", str(tmp_path / "out")]) == UsageError.exit_code
    )
    assert f"not for {other}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# for Windows

LOGS = Path(__file__).resolve().parent.parent / "logs" / "build"
OBJDUMP = LOGS / "objdump-ggml.dll.txt"
#: Of mingw-w64's compiler and binutils what is asked for; what objdump prints of a file is the file.
TOOLS = {
    "g++-posix": "name=${{1#-print-file-name=}}; if test -f {folder}/$name; then echo {folder}/$name; "
    "else echo g++ 14-posix; fi",
    "gcc-posix": "",
    "windres": "",
    "objdump": 'cat "$2"',
    "strip": 'cp "$4" "$3"',
    "dlltool": 'cp "$2" "$4"',
}


def _asks(file: Path, *needed: str) -> None:
    listed = "".join(f"\tDLL Name: {name}\n\t00031a30  <none>  0124  Sleep\n" for name in needed)
    file.write_text(f"\n{file.name}:     file format pei-x86-64\n{listed}")


@pytest.fixture
def windows(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Mingw:
    """mingw-w64 with the libraries that come along, and the licences of these."""
    folder = tmp_path / "mingw"
    folder.mkdir()
    for name, text in TOOLS.items():
        tool = folder / f"x86_64-w64-mingw32-{name}"
        tool.write_text(f"#!/bin/sh\n{text.format(folder=folder)}\n")
        tool.chmod(0o755)
    for name in ("libwinpthread-1.dll", "libgcc_s_seh-1.dll", "libstdc++-6.dll"):
        _asks(folder / name, "KERNEL32.dll", "msvcrt.dll", *(path.name for path in folder.glob("lib*.dll")))
        licence = Mingw("x86_64").system.licences[name][1]
        (folder / "usr/share/doc" / licence).mkdir(parents=True, exist_ok=True)
        (folder / "usr/share/doc" / licence / "copyright").write_text(f"of {licence}\n")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(Mingw, "licence", lambda self, name: _licence(folder, self, name))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    return mingw.windows("x86_64")


def _licence(folder: Path, base: Mingw, name: str) -> Path | None:
    return BaseSystem.licence(replace(base, root=folder), name)


@pytest.fixture
def windows_build(build: Build) -> Build:
    """The same build for Windows, as mingw-w64 names its files."""
    shutil.rmtree(build.bin)
    build.bin.mkdir()
    runtime = ("libstdc++-6.dll", "libgcc_s_seh-1.dll", "KERNEL32.dll", "msvcrt.dll")
    for name in project.TARGETS:
        _asks(build.bin / f"{name}.exe", "libllama.dll", "ggml.dll", "WS2_32.dll", *runtime)
    _asks(build.bin / "libllama.dll", "ggml.dll", "ggml-base.dll", *runtime)
    _asks(build.bin / "ggml.dll", "ggml-base.dll", *runtime)
    for name in ("base", "cpu-haswell", "cpu-x64", "rpc"):
        _asks(build.bin / f"ggml-{name}.dll", *([] if name == "base" else ["ggml-base.dll"]), *runtime)
    _asks(build.bin / "test-backend-ops.exe")
    return build


@pytest.fixture
def windows_bundle(
    windows_build: Build, windows: Mingw, model: dict[str, Path], tmp_path: Path
) -> job.Bundle:
    return job.write(tmp_path / "out", windows_build, windows, model)


def test_what_a_dll_asks_for(windows: Mingw) -> None:
    found = windows.asks(OBJDUMP)
    assert found is not None and found.arch == "x86_64"
    assert found.needed == (
        *("ggml-base.dll", "ggml-cpu.dll", "ggml-rpc.dll", "ggml-vulkan.dll", "kernel32.dll"),
        *("libgcc_s_seh-1.dll", "libstdc++-6.dll", "msvcrt.dll"),
    )
    assert windows.asks(Path(elves.__file__)) is None


def test_a_bundle_for_windows(windows_bundle: job.Bundle, windows: Mingw) -> None:
    name = f"ggufrq-bin-{ggufrq.__version__}-windows-x86_64"
    assert windows_bundle.archive.name == f"{name}.zip" and windows_bundle.tag == "win_amd64"
    assert windows_bundle.wheel.name == f"ggufrq_bin-{ggufrq.__version__}-py3-none-win_amd64.whl"
    assert not windows_bundle.needs.outside and windows_bundle.manifest["system"] == "Windows"
    whole = zipfile.ZipFile(windows_bundle.archive)
    held = {one.removeprefix(f"{name}/") for one in whole.namelist()}
    assert {one for one in held if one.startswith("bin/")} == {
        *(f"bin/{program}.exe" for program in project.TARGETS),
        *("bin/libllama.dll", "bin/ggml.dll", "bin/ggml-base.dll", "bin/ggml-rpc.dll"),
        *("bin/ggml-cpu-haswell.dll", "bin/ggml-cpu-x64.dll"),
        *("bin/libstdc++-6.dll", "bin/libgcc_s_seh-1.dll", "bin/libwinpthread-1.dll"),
    }
    assert {"licenses/gcc.txt", "licenses/mingw-w64.txt", "source/convert_hf_to_gguf.py"} <= held
    assert "models/docs-qwen3-8m-Q8_0.gguf" in held
    for line in whole.read(f"{name}/{job.SUMS}").decode().splitlines():
        digest, file = line.split("  ")
        assert hashlib.sha256(whole.read(f"{name}/{file}")).hexdigest() == digest, file
    readme = whole.read(f"{name}/README.txt").decode()
    assert "for Windows on x86_64." in readme and r"bin\llama-cli -m models/docs" in readme
    assert {one.date_time for one in whole.infolist()} == {(2026, 10, 1, 0, 0, 0)}
    assert whole.namelist() == sorted(whole.namelist())


def test_vulkan_for_windows(windows_build: Build, windows: Mingw, tmp_path: Path) -> None:
    build = replace(windows_build, manifest={**windows_build.manifest, "backend": "vulkan"})
    _asks(build.bin / "ggml-vulkan.dll", "ggml-base.dll", "vulkan-1.dll")
    made = job.write(tmp_path / "out", build, windows, {})
    assert made.needs.outside == {"vulkan-1.dll": "ggml-vulkan.dll"} and made.tag == "win_amd64"
    assert made.archive.name == f"ggufrq-bin-{ggufrq.__version__}-vulkan-windows-x86_64.zip"
    windows.prepare(tmp_path)
    library = Path(windows.definitions(tmp_path)["Vulkan_LIBRARY"])
    told = library.read_text().splitlines()
    assert told[:2] == ["LIBRARY vulkan-1.dll", "EXPORTS"] and "vkGetInstanceProcAddr" in told


def test_what_windows_does_not_have_is_refused(windows_build: Build, windows: Mingw) -> None:
    program = windows_build.bin / "llama-cli.exe"
    _asks(program, "libfoo-1.dll")
    with pytest.raises(
        BuildError, match=r"llama-cli\.exe takes libfoo-1\.dll, which is neither in the build nor"
    ):
        contents.programs(windows_build, windows)
    program.write_text("ELF")
    with pytest.raises(BuildError, match="it is no program for Windows"):
        contents.programs(windows_build, windows)


def test_wide_registers_and_times_of_linking(windows: Mingw, tmp_path: Path) -> None:
    defined = windows.definitions(tmp_path)
    for language in ("C", "CXX"):
        assert "-Wa,-muse-unaligned-vector-move" in shlex.split(defined[f"CMAKE_{language}_FLAGS"])
    for kind in ("EXE", "SHARED", "MODULE"):
        assert defined[f"CMAKE_{kind}_LINKER_FLAGS_INIT"] == "-Wl,--no-insert-timestamp"
    assert (defined["CMAKE_SYSTEM_NAME"], defined["CMAKE_SYSTEM_PROCESSOR"]) == ("Windows", "x86_64")
    plain = BuildOptions.portable()
    keys = {
        build_key(llama_project(), replace(plain, base=one)) for one in (None, BaseSystem("x86_64"), windows)
    }
    assert len(keys) == 3


@pytest.mark.parametrize("chosen", ["wheel", "archive"])
def test_programs_are_found_on_windows(
    chosen: str, windows_bundle: job.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(windows_bundle.wheel if chosen == "wheel" else windows_bundle.archive).extractall(site)
    if chosen == "wheel":
        folder = site / prebuilt.PACKAGE
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, prebuilt.PACKAGE, raising=False)
    else:
        (folder,) = site.iterdir()
        monkeypatch.setenv(prebuilt.VARIABLE, str(folder))
    monkeypatch.setattr(builds, "find_build", lambda *_, **__: None)
    with pytest.raises(BuildError, match="is for Windows on x86_64, and this is Linux on "):
        builds.require_build()
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "machine", lambda: "ARM64")
    with pytest.raises(BuildError, match="and this is Windows on ARM64"):
        builds.require_build()
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    found = builds.require_build()
    assert found.root == folder
    assert found.tool("llama-completion") == folder / "bin" / "llama-completion.exe"
    assert ready.model_file("docs-qwen3-8m") == folder / "models" / "docs-qwen3-8m-Q8_0.gguf"
    sys.modules.pop(prebuilt.PACKAGE, None)


def test_the_module_for_this_processor_is_loaded(
    windows_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded:
        def __init__(self, path: str, mode: int = 0) -> None:
            self.name = Path(path).name

        def ggml_backend_score(self) -> int:
            return {"ggml-cpu-haswell.dll": 64, "ggml-cpu-x64.dll": 1}[self.name]

    monkeypatch.setattr(ctypes, "CDLL", Loaded)
    for name, file in (("ggml-base", "ggml-base.dll"), ("ggml-cpu", "ggml-cpu-haswell.dll")):
        assert ggml_library.library(windows_build.bin, name).name == file  # type: ignore[attr-defined]


@pytest.mark.skipif(platform.system() != "Linux", reason="bundles are made on Linux")
def test_without_mingw_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builds, "ensure_build", lambda *_, **__: pytest.fail("it was built"))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    command = ["bundle", "--system", "windows", "--arch", "x86_64", "-o", str(tmp_path / "out")]
    assert cli.invoke(command) == BuildError.exit_code
    said = capsys.readouterr().err
    assert "there is no x86_64-w64-mingw32-g++-posix, which compiles for Windows" in said
    assert "try: apt-get install g++-mingw-w64-x86-64-posix" in said
    for more, message in (
        (["--here"], "made by mingw-w64"),
        (["--backend", "cuda"], "made by mingw-w64"),
        (["--arch", "aarch64"], "aarch64 was asked for"),
    ):
        assert cli.invoke([*command, *more]) == UsageError.exit_code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# for macOS

OTOOL = LOGS / "otool-libggml-base.dylib.txt"
SDK = "/System/Library/Frameworks/{0}.framework/Versions/A/{0}"


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Macos:
    """A Mac of Apple's with its compiler."""
    folder = tmp_path / "xcode"
    folder.mkdir()
    for name in ("clang", "clang++"):
        (folder / name).write_text("#!/bin/sh\necho Apple clang version 17.0.0\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    return macos.here("aarch64")


@pytest.fixture
def mac_build(build: Build) -> Build:
    """The same build for macOS, as CMake names its files there."""
    shutil.rmtree(build.bin)
    build.bin.mkdir()
    runtime = ("/usr/lib/libc++.1.dylib",)
    for name in project.TARGETS:
        machos.write(build.bin / name, ["@rpath/libllama.0.dylib", "@rpath/libggml-base.0.dylib", *runtime])
    for name, needed in (("llama", ["@rpath/libggml-base.0.dylib"]), ("ggml-base", [])):
        real = machos.write(build.bin / f"lib{name}.0.5.0.dylib", [*needed, *runtime])
        (build.bin / f"lib{name}.0.dylib").symlink_to(real.name)
        (build.bin / f"lib{name}.dylib").symlink_to(real.name)
    for name, framework in (
        ("cpu-apple_m1", "Accelerate"),
        ("cpu-apple_m4", "Accelerate"),
        ("metal", "Metal"),
    ):
        module = build.bin / f"libggml-{name}.so"
        machos.write(module, ["@rpath/libggml-base.0.dylib", SDK.format(framework), *runtime])
    machos.write(build.bin / "test-backend-ops")
    return replace(build, manifest={**build.manifest, "backend": "metal"})


def test_what_a_mach_o_file_asks_for() -> None:
    """The head of a library by Clang 22, against what llvm-otool says of it."""
    said = OTOOL.read_text()
    found = macho.read(OTOOL.with_name("libggml-base.dylib.head"))
    assert found is not None and found.arch == "arm64" and found.path == "$ORIGIN"
    loaded = re.findall(r"cmd LC_LOAD_DYLIB\n.*\n +name (\S+)", said)
    assert found.needed == tuple(loaded) and "path @loader_path " in said and "minos 15.0" in said
    assert found.versions == {macho.SYSTEM: ("macOS_15.0",)}


def test_what_is_no_mach_o_file_or_damaged(tmp_path: Path) -> None:
    file = machos.write(
        tmp_path / "x", ["@rpath/liba.dylib"], folders=["@loader_path", "/opt"], arch="x86_64"
    )
    found = macho.read(file)
    assert found is not None and (found.arch, found.path) == ("x86_64", "$ORIGIN:/opt")
    assert found.needed == ("liba.dylib", macho.SYSTEM)
    whole = file.read_bytes()
    fat = b"\xca\xfe\xba\xbe" + whole[4:]
    for data in (b"", b"#!/bin/sh\n", whole[:40], whole[:-30], elves.write(file).read_bytes(), fat):
        file.write_bytes(data)
        assert macho.read(file) is None


def test_a_bundle_for_macos(mac_build: Build, mac: Macos, model: dict[str, Path], tmp_path: Path) -> None:
    made = job.write(tmp_path / "out", mac_build, mac, model)
    name = f"ggufrq-bin-{ggufrq.__version__}-macos-arm64"  # Metal is in every such Mac, and not named
    assert made.archive.name == f"{name}.tar.xz"
    assert made.wheel.name == f"ggufrq_bin-{ggufrq.__version__}-py3-none-macosx_15_0_arm64.whl"
    assert made.needs.versions == {"macOS": "15.0"} and not made.needs.outside
    with tarfile.open(made.archive) as tar:
        tar.extractall(tmp_path)
    held = {path.name for path in (tmp_path / name / "bin").iterdir()}
    assert held == {
        *project.TARGETS,
        *("libllama.0.dylib", "libggml-base.0.dylib"),
        *("libggml-cpu-apple_m1.so", "libggml-cpu-apple_m4.so", "libggml-metal.so"),
    }
    readme = (tmp_path / name / "README.txt").read_text()
    assert "for macOS on arm64, macOS 15.0 and newer." in readme and "com.apple.quarantine" in readme
    said = zipfile.ZipFile(made.wheel).read(f"ggufrq_bin-{ggufrq.__version__}.dist-info/METADATA").decode()
    assert "\nLicense-Expression: MIT\n" in said
    plain = job.write(
        tmp_path, replace(mac_build, manifest={**mac_build.manifest, "backend": "cpu"}), mac, {}
    )
    assert plain.archive.name == f"{name.replace('-macos', '-cpu-macos')}.tar.xz"


def test_what_macos_does_not_have_is_refused(mac_build: Build, mac: Macos, tmp_path: Path) -> None:
    homebrew = tmp_path / "opt" / "libomp.dylib"
    homebrew.parent.mkdir()
    machos.write(homebrew)
    for wrong, message in (
        ({"needed": [str(homebrew)]}, r"libomp\.dylib, which is neither in the build nor in macOS 15\.0"),
        ({"folders": ["/opt/lib"]}, "llama-cli looks for libraries in /opt/lib, of this machine"),
        ({"arch": "x86_64"}, "it is for x86_64, not arm64"),
    ):
        machos.write(mac_build.bin / "llama-cli", **wrong)  # type: ignore[arg-type]
        with pytest.raises(BuildError, match=message):
            contents.programs(mac_build, mac)
    (mac_build.bin / "llama-cli").write_text("MZ")
    with pytest.raises(BuildError, match="it is no program for macOS"):
        contents.programs(mac_build, mac)


@pytest.mark.parametrize(("least", "tag"), [("11.0", "11_0"), ("14.0", "14_0"), ("13.3", "14_0")])
def test_pip_knows_macos_by_whole_numbers(least: str, tag: str) -> None:
    assert needs.Needs({"macOS": least}, {}).tag("arm64") == f"macosx_{tag}_arm64"


def test_a_build_for_macos_is_for_older_ones_and_takes_nothing_of_homebrew(
    mac: Macos, tmp_path: Path
) -> None:
    defined = mac.definitions(tmp_path)
    assert defined["CMAKE_OSX_DEPLOYMENT_TARGET"] == "15.0" and defined["GGML_OPENMP"] == "OFF"
    assert defined["CMAKE_CXX_COMPILER"].endswith("/clang++")
    assert not any("-s" in shlex.split(value) for value in defined.values())  # which Clang warns of
    assert defined["CMAKE_MODULE_LINKER_FLAGS_INIT"] == "-Wl,-S,-x"  # nor folders for debuggers
    assert "CMAKE_SYSTEM_NAME" not in defined and mac.library("libc++.1.dylib") is None
    mac.require_modules()
    Path(mac.compiler("g++")).write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BuildError, match=r"does not take -march=armv9.2-a\+sme") as caught:
        mac.require_modules()
    assert caught.value.remedy == "Xcode 16 or newer"


@pytest.mark.parametrize(("least", "here"), [("15.0", "15.5"), ("16.0", "15.5"), ("16.0", "10.16")])
def test_programs_are_found_on_macos(
    least: str,
    here: str,
    mac_build: Build,
    mac: Macos,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = int(least.split(".")[0])
    machos.write(mac_build.bin / "llama-cli", ["@rpath/libllama.0.dylib"], least=(number, 0))
    made = job.write(tmp_path / "out", mac_build, mac, {})
    with tarfile.open(made.archive) as tar:
        tar.extractall(tmp_path / "x")
    (folder,) = (tmp_path / "x").iterdir()
    monkeypatch.setenv(prebuilt.VARIABLE, str(folder))
    monkeypatch.setattr(platform, "mac_ver", lambda: (here, ("", "", ""), "arm64"))
    if (least, here) == ("16.0", "15.5"):
        with pytest.raises(BuildError, match=r"takes macOS 16\.0, and here is 15\.5"):
            builds.require_build()
        return
    assert builds.require_build().tool("llama-cli") == folder / "bin" / "llama-cli"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(BuildError, match="is for macOS on arm64, and this is macOS on x86_64"):
        builds.require_build()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--here"], "there is no --here for macOS, whose programs are made by Apple's compiler"),
        (["--backend", "vulkan"], "there is no vulkan for macOS"),
        (["--arch", "x86_64"], "for macOS on x86_64 are made on such a Mac; here is macOS on arm64"),
        (["--system", "linux"], "are made on Linux"),
        (["--system", "linux", "--backend", "metal"], "Metal is a part of macOS"),
        ([], "there is no clang++, which compiles for macOS 15.0"),
    ],
)
def test_what_a_mac_is_asked_for(
    more: list[str],
    message: str,
    mac: Macos,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(builds, "ensure_build", lambda *_, **__: pytest.fail("it was built"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.invoke(["bundle", "-o", str(tmp_path / "out"), *more]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# which programs are used


def test_the_wheel_is_found(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builds.require_build()
    assert (found.root, found.bin, found.source) == (wheel, wheel / "bin", wheel / "source")
    assert found.tool("llama-cli") == wheel / "bin" / "llama-cli"
    assert builds.usable_build() == found
    assert ready.model_file("docs-qwen3-8m") == wheel / "models" / "docs-qwen3-8m-Q8_0.gguf"


def test_ones_own_build_goes_first_and_the_variable_before_it(
    wheel: Path, unpacked: Path, cache: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, "find_build", lambda *_, **__: build)
    assert builds.require_build() == build
    monkeypatch.setenv(prebuilt.VARIABLE, str(unpacked))
    assert builds.require_build().root == unpacked
    assert "the archive in" in prebuilt.named(builds.require_build())
    monkeypatch.setenv(prebuilt.VARIABLE, str(unpacked / "nowhere"))
    with pytest.raises(BuildError, match="nowhere is not there"):
        builds.require_build()
    assert builds.usable_build() is None


@pytest.mark.parametrize("what", ["patch_set", "llama_cpp"])
def test_a_wheel_of_another_series_is_refused(wheel: Path, cache: Path, what: str) -> None:
    facts = json.loads((wheel / "manifest.json").read_text())
    facts[what] = {**facts[what], "commit": "f" * 40} if what == "llama_cpp" else "f" * 64
    (wheel / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(BuildError, match=f"of another series than ggufrq {ggufrq.__version__}") as caught:
        builds.require_build()
    assert f'"ggufrq-bin=={ggufrq.__version__}"' in (caught.value.remedy or "")
    assert "ffffffff" in caught.value.message


def test_what_is_not_for_this_machine_or_not_whole(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(platform, "libc_ver", lambda: ("glibc", "2.28"))
        with pytest.raises(BuildError, match=r"takes glibc 2\.30, and here is glibc 2\.28"):
            builds.require_build()
        patch.setattr(platform, "libc_ver", lambda: ("", ""))
        with pytest.raises(BuildError, match="and here is another C library"):
            builds.require_build()
        patch.setattr(platform, "machine", lambda: "aarch64")
        with pytest.raises(BuildError, match="is for Linux on x86_64, and this is Linux on aarch64"):
            builds.require_build()
    (wheel / "bin" / "llama-server").write_bytes(b"")
    with pytest.raises(BuildError, match="is not whole: bin/llama-server"):
        builds.require_build()
    for text in ("{}", '{"format": 1}'):
        (wheel / "manifest.json").write_text(text)
        with pytest.raises(BuildError, match=r"has no manifest\.json that this ggufrq reads"):
            builds.require_build()


def test_without_compiler_the_remedy_is_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "PACKAGE", "ggufrq_bin_that_is_not_there")
    monkeypatch.setattr(toolchain, "names_compiler", lambda: False)
    with pytest.raises(BuildError, match="has not been built yet") as caught:
        builds.require_build()
    assert f'--no-index --no-deps --find-links DIR "ggufrq-bin=={ggufrq.__version__}"' in str(
        caught.value.remedy
    )


def test_doctor_needs_no_compiler_beside_the_wheel(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compiler", "git", "cmake", "ninja", "ccache"):
        monkeypatch.setattr(toolchain, name, lambda: None)
    monkeypatch.setattr(proc, "run", lambda command, **_: proc.Completed([str(command[0])], 0, "", "", 0.0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    checks = {check.name: check for check in doctor.examine()}
    assert checks["build"].state == "ok" and f"the wheel ggufrq-bin in {wheel}" in checks["build"].found
    assert "`ggufrq build` would add" in checks["build"].found
    lacks = ("C++ compiler", "git", "cmake", "ninja", "llama.cpp source")
    assert {checks[name].state for name in lacks} == {"optional"}
    (wheel / "bin" / "llama-cli").unlink()
    checks = {check.name: check for check in doctor.examine()}
    assert checks["build"].state == "missing" == checks["git"].state
    assert "not whole" in checks["build"].found


def test_that_no_gpu_has_run_a_backend_is_said_at_first_use(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "and on no GPU yet; "
    programs_for(None)
    assert said not in capsys.readouterr().err
    facts = json.loads((wheel / "manifest.json").read_text())
    (wheel / "manifest.json").write_text(json.dumps({**facts, "backend": "vulkan", "key": "other"}))
    programs_for(None)
    told = capsys.readouterr().err
    assert said in told and told.endswith("LLAMA_ARG_DEVICE=none takes the processor instead\n")
    programs_for(None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(proc, "run", lambda command, **_: proc.Completed([str(command[0])], 0, "", "", 0.0))
    (build,) = (check for check in doctor.examine() if check.name == "build")
    assert said in build.found


def test_a_gpu_that_is_passed_over_is_told(
    wheel: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs_for(None)
    assert capsys.readouterr().err == ""  # of the processor alone
    facts = json.loads((wheel / "manifest.json").read_text())
    (wheel / "manifest.json").write_text(json.dumps({**facts, "backend": "cuda"}))
    ldd = tmp_path / "tools" / "ldd"
    ldd.parent.mkdir()
    ldd.write_text("#!/bin/sh\necho '\tlibc.so.6 => /lib/libc.so.6 (0x1)'\n")
    ldd.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ldd.parent}:{os.environ['PATH']}")
    programs_for(None)
    assert capsys.readouterr().err == ""
    ldd.write_text("#!/bin/sh\nprintf '\\t%s => not found\\n' libcuda.so.1 libcublas.so.13\n")
    for _ in range(2):
        programs_for(None)
        told = capsys.readouterr().err
        assert "libggml-cuda.so is not loaded, all runs on the processor: no libcuda.so.1, libcublas" in told
        assert told.endswith("pip install 'nvidia-cublas>=13.0,<14'\n")


def test_a_build_says_what_it_adds_to_the_wheel(
    wheel: Path,
    cache: Path,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = {"seconds": 1, "date": "2026-01-01", **build.manifest}
    monkeypatch.setattr(builds, "ensure_build", lambda *_, **__: replace(build, manifest=facts))
    assert cli.invoke(["build", "--backend", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(build.bin)
    assert f"the wheel ggufrq-bin in {wheel} is used so far; `ggufrq build` would add code for just" in err


def test_the_extra_is_the_wheel_of_this_version() -> None:
    text = (paths.checkout_dir() / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"ggufrq-bin=={ggufrq.__version__}; ' in text

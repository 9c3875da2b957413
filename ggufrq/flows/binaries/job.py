"""A bundle: a build for other machines, collected into an archive and into the wheel ggufrq-bin."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import platform
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ggufrq import __version__
from ggufrq.base import paths, proc
from ggufrq.base.errors import UsageError
from ggufrq.build import (
    base_system,
    builds,
    cuda_toolkit,
    elf,
    macos,
    mingw,
    prebuilt,
    systems,
    vulkan_toolkit,
)
from ggufrq.build.base_system import BaseSystem
from ggufrq.build.project import Build, BuildOptions
from ggufrq.build.systems import System
from ggufrq.flows import wheels
from ggufrq.flows.binaries import contents, needs
from ggufrq.flows.binaries.needs import Needs
from ggufrq.make.family import make_family
from ggufrq.make.plan import Request, Want
from ggufrq.make.ready import WEIGHTS
from ggufrq.models.resolve import embedded_models

#: Environment variable with the time that files get, in seconds; that of llama.cpp's commit unless set.
EPOCH = "SOURCE_DATE_EPOCH"
SUMS = "SHA256SUMS"
Content = Mapping[str, bytes | Path]

_README = """\
llama.cpp {commit} with the cache types of ggufrq {version}, for {system} on {arch}{least}.

    {run} -m models/docs-qwen3-8m-Q8_0.gguf -ctk iso3 -ctv iso3 -p "The CREATE TABLE statement"
    {variable}ggufrq run docs-qwen3-8m -p "The CREATE TABLE statement" --raw --kv iso3

The folder can be moved. {sums} has the sha256 of every file, and manifest.json says what went in.
{note}"""
#: How a program is run in the folder of the archive, and the variable set for one command.
_SHELL = {
    "Linux": ("bin/llama-cli", "GGUFRQ_BIN=$PWD "),
    "Darwin": ("bin/llama-cli", "GGUFRQ_BIN=$PWD "),
    "Windows": (r"bin\llama-cli", 'set "GGUFRQ_BIN=%CD%" && '),
}
#: What a system must have, by its name in ``Needs``.
_LEAST = {"GLIBC": "glibc", "macOS": "macOS"}
_NOTES = {
    "Darwin": "If a browser fetched it, it runs only after this, here: xattr -dr com.apple.quarantine .\n"
}


@dataclass(frozen=True)
class Bundle:
    """An archive, the same as a wheel, what both ask of the system, and the manifest in them."""

    archive: Path
    wheel: Path
    needs: Needs
    tag: str
    manifest: dict[str, Any]


def make(
    out: Path,
    *,
    arch: str,
    system: str = "linux",
    here: bool = False,
    backend: str | None = None,
    with_models: bool = True,
    cmake_args: tuple[str, ...] = (),
    jobs: int | None = None,
    source: str = "auto",
) -> Bundle:
    """Build for other machines with processor ``arch`` (``x86_64``, ``aarch64``, of macOS ``arm64``) and
    ``system`` (``linux``, ``windows``, ``macos``) and write archive and wheel into the folder ``out``.
    ``here``: against this system's libraries, not those of an older Debian; ``backend`` is the base's unless
    given; ``with_models``: with the embedded models; ``source`` is as in ``obtain.pristine``.

    Raises UsageError, and what ``ensure_build`` and ``make_family`` raise.
    """
    base = _base(system, arch, here=here, backend=backend)
    backend = backend or base.backend
    base.require_modules()
    if backend == "cuda":  # whose own path is the folder of this machine's toolkit
        beside = ";".join(["$ORIGIN", *cuda_toolkit.wheel_paths(cuda_toolkit.find())])
        cmake_args = (f"-DCMAKE_INSTALL_RPATH={beside}", *cmake_args)
    options = BuildOptions.portable(backend, base=base, jobs=jobs, cmake_args=cmake_args)
    build = builds.ensure_build(options, source=source)
    ready: Mapping[str, Path] = {}
    if with_models:
        # programs for another processor or system do not run here
        runs = (base.system.name, base.arch) == (platform.system(), platform.machine())
        ready = models(build, build if runs else builds.ensure_build(source=source))
    return write(out, build, base, ready)


def _base(system: str, arch: str, *, here: bool, backend: str | None) -> BaseSystem:
    if system == "macos":
        base = macos.here(arch)
        _require_options(systems.MACOS, here, backend, ("cpu", base.backend), "by Apple's compiler")
        return base
    if backend == "metal":
        raise UsageError("Metal is a part of macOS", remedy="--system macos, on a Mac")
    other = system == "windows"
    if other:
        _require_options(systems.WINDOWS, here, backend, ("cpu", "vulkan"), "by mingw-w64")
    if here:
        return base_system.here(arch)
    if backend not in (None, "cpu", "vulkan"):
        raise UsageError(
            f"the compiler of {backend} takes this system's libraries", remedy=f"--backend {backend} --here"
        )
    if backend == "vulkan":
        sdk = vulkan_toolkit.find()
        if sdk.of_the_system:
            here_too = "" if other else "; or --backend vulkan --here"
            raise UsageError(
                "Vulkan's headers are among this system's, which do not go with the libraries of another one",
                remedy=f"VULKAN_SDK=FOLDER, with LunarG's SDK{here_too}",
            )
        loader = None if other else elf.read(sdk.loader.resolve())
        if loader is not None and loader.arch != arch:
            raise UsageError(
                f"Vulkan's loader in this SDK is for {loader.arch}, not for {arch}",
                remedy=f"--arch {loader.arch}, or VULKAN_SDK=FOLDER with one for {arch}",
            )
    return mingw.windows(arch) if other else base_system.old(arch)


def _require_options(
    system: System, here: bool, backend: str | None, known: tuple[str, ...], how: str
) -> None:
    """Raise UsageError for what a system's only way of making programs does not have."""
    if here or backend not in (None, *known):
        raise UsageError(
            f"there is no {'--here' if here else backend} for {system.title}, whose programs are made {how}",
            remedy=f"--system {system.title.lower()} without --here, and with no --backend but {known[-1]}",
        )


def models(build: Build, maker: Build) -> dict[str, Path]:
    """The embedded models in the type that they are run in, by file name, made by the programs of ``maker``
    and kept in the folder of the build."""
    made = {}
    for name in embedded_models():
        folder = build.root / "embedded" / name
        file = make_family(Request(name, (Want(WEIGHTS),), out=folder), maker).file(WEIGHTS)
        made[file.name] = file
    return made


def write(out: Path, build: Build, base: BaseSystem, ready: Mapping[str, Path]) -> Bundle:
    """Archive and wheel of a build with models that are ``ready`` to run. Raises BuildError as
    ``contents.programs``."""
    programs, asked = contents.programs(build, base)
    wanted = needs.of(asked, base.system)
    files: dict[str, bytes | Path] = {f"bin/{name}": path for name, path in programs.items()}
    files |= {f"source/{name}": path for name, path in contents.converter(build.source)}
    files |= {f"licenses/{name}": path for name, path in contents.licences(build, base, programs)}
    files |= {f"models/{name}": path for name, path in ready.items()}
    facts = _facts(build, base, wanted)
    run, variable = _SHELL[base.system.name]
    files["README.txt"] = _README.format(
        commit=facts["llama_cpp"]["commit"][:9],
        version=__version__,
        system=base.system.title,
        arch=base.arch,
        least="".join(
            f", {name} {wanted.versions[key]} and newer"
            for key, name in _LEAST.items()
            if key in wanted.versions
        ),
        note=_NOTES.get(base.system.name, ""),
        run=run,
        variable=variable,
        sums=SUMS,
    ).encode()
    sums = {name: _sum(held) for name, held in sorted(files.items())}
    facts["files"] = {name: {"size": size, "sha256": digest} for name, (size, digest) in sums.items()}
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    facts["key"] = f"{facts['llama_cpp']['commit'][:9]}-{facts['backend']}-{base.arch}-{whole[:12]}"
    files[prebuilt.MANIFEST] = (json.dumps(facts, indent=1) + "\n").encode()
    sums[prebuilt.MANIFEST] = _sum(files[prebuilt.MANIFEST])
    files[SUMS] = "".join(f"{sums[name][1]}  {name}\n" for name in sorted(sums)).encode()
    backend, tag = facts["backend"], facts["tag"]
    usual = backend == base.backend
    kind = "" if usual else f"-{backend}"
    name = f"{prebuilt.DISTRIBUTION}-{__version__}{kind}-{base.system.title.lower()}-{base.arch}"
    archive = out / f"{name}{base.system.archive}"
    write_archive = _write_zip if base.system.archive == ".zip" else _write_tar
    write_archive(archive, name, files, _epoch(facts["llama_cpp"]["date"]))
    # a local version, so that pip puts one in place of another: both are the same package
    version = __version__ if usual else f"{__version__}+{backend}"
    others = sorted(set(wanted.wheels.values()))
    wheel = _write_wheel(out, version, files, tag, base.system.licence, others)
    return Bundle(archive, wheel, wanted, tag, facts)


def _facts(build: Build, base: BaseSystem, wanted: Needs) -> dict[str, Any]:
    """The manifest but for its files: nothing of the machine or the hour."""
    compiler = proc.run([base.compiler("g++"), "--version"], timeout=60, env={"LC_ALL": "C"}).stdout
    return {
        "format": prebuilt.FORMAT,
        "llama_cpp": build.manifest["llama_cpp"],
        "patch_set": build.manifest["patch_set"],
        "backend": build.manifest["backend"],
        "native": False,
        "system": base.system.name,
        "arch": base.arch,
        "tag": base.system.tags.get(base.arch) or wanted.tag(base.arch),
        "needs": wanted.versions,
        "outside": wanted.outside,
        "wheels": wanted.wheels,
        "base": {"name": base.name, "packages": dict(base.versions)},
        "versions": {"ggufrq": __version__, "compiler": compiler.splitlines()[0]},
    }


def _sum(held: bytes | Path) -> tuple[int, str]:
    data = wheels.data_of(held)
    return len(data), hashlib.sha256(data).hexdigest()


def _epoch(date: str) -> int:
    given = os.environ.get(EPOCH)
    if given is None:
        return int(datetime.fromisoformat(date).replace(tzinfo=timezone.utc).timestamp())
    if not given.isdecimal():
        raise UsageError(f"{EPOCH} is a number of seconds, not '{given}'", remedy=f"unset {EPOCH}")
    return int(given)


def _write_tar(path: Path, folder: str, files: Content, epoch: int) -> None:
    """A tar of the files below ``folder``, sorted, of nobody, all of one time."""
    with (
        paths.atomic_path(path) as temporary,
        lzma.open(temporary, "wb", preset=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name in sorted(files):
            data = wheels.data_of(files[name])
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mtime = len(data), epoch
            entry.mode = 0o755 if name.startswith("bin/") else 0o644
            tar.addfile(entry, io.BytesIO(data))


def _write_zip(path: Path, folder: str, files: Content, epoch: int) -> None:
    """A zip of the files below ``folder``, sorted, all of one time."""
    with paths.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(files):
            data = wheels.data_of(files[name])
            wheels.add(archive, f"{folder}/{name}", data, name.startswith("bin/"), epoch)


def _write_wheel(out: Path, version: str, files: Content, tag: str, licence: str, others: list[str]) -> Path:
    """The wheel whose package is the folder of the archive, and which asks pip for ``others``."""
    name, package = prebuilt.DISTRIBUTION, prebuilt.PACKAGE
    whole = f"py3-none-{tag}"
    info = wheels.dist_info(name, version)
    licences = sorted(name for name in files if name.startswith("licenses/"))
    inside: dict[str, bytes | Path] = {f"{package}/{name}": held for name, held in files.items()}
    inside[f"{package}/__init__.py"] = b'"""Programs of llama.cpp with the cache types of ggufrq."""\n'
    inside |= {f"{info}/{name}": files[name] for name in licences}
    head = [
        *("Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"),
        "Summary: The programs of ggufrq: llama.cpp with three-bit KV caches, ready to run",
        f"License-Expression: {licence}",
        *(f"License-File: {licence.removeprefix('licenses/')}" for licence in licences),
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {other}" for other in others),
    ]
    inside[f"{info}/METADATA"] = ("\n".join(head) + "\n\nFor `pip install ggufrq[bin]`.\n").encode()
    path = out / wheels.file_name(name, version, whole)
    wheels.write(path, name, version, whole, inside, f"{package}/bin/")
    return path

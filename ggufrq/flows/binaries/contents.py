"""The files of a build that are given away: programs and libraries as they load each other, what the
converter of models takes, licences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ggufrq.base import paths
from ggufrq.base.errors import BuildError
from ggufrq.build import elf, project
from ggufrq.build.base_system import BaseSystem
from ggufrq.build.elf import Elf
from ggufrq.build.project import Build
from ggufrq.flows.binaries.needs import OF_DRIVERS, OF_THE_SYSTEM

#: Modules that ggml looks for beside the programs; the libraries of this name are asked for by others anyway.
_MODULE = re.compile(r"libggml-[\w.-]+?\.so")
#: What of llama.cpp's tree the converter takes, and the names of the pre-tokenizers.
_CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py/gguf", "src/llama-vocab.cpp")
#: Licences of the libraries that are brought along, by Debian's package.
_LICENCES = {"libgomp.so.1": ("libgomp1", "libgomp.txt")}


def programs(build: Build, base: BaseSystem) -> tuple[dict[str, Path], dict[str, Elf]]:
    """Files of the folder ``bin`` by name: the usual programs, modules, and all libraries that these load and
    the system does not have. What each asks for stands beside it.

    Raises BuildError for a file that is missing or that would not find the others.
    """
    files: dict[str, Path] = {}
    asked: dict[str, Elf] = {}
    wanted = {name: build.tool(name) for name in project.TARGETS}
    wanted |= {path.name: path for path in sorted(build.bin.iterdir()) if _MODULE.fullmatch(path.name)}
    if not any(build.bin.glob("libggml-cpu*")):
        raise BuildError(f"{build.bin} has no code for processors", remedy="ggufrq bundle")
    while wanted:
        name, path = wanted.popitem()
        found = elf.read(path.resolve())
        if found is None or found.arch != base.arch:
            what = "no program for Linux" if found is None else f"for {found.arch}, not {base.arch}"
            raise BuildError(f"{path} cannot be given away: it is {what}")
        files[name], asked[name] = path.resolve(), found
        for library in found.needed:
            if library in files or library in OF_THE_SYSTEM or library.startswith(OF_DRIVERS):
                continue
            inside = build.bin / library
            other = inside if inside.is_file() else base.library(library)
            if other is None:
                raise BuildError(
                    f"{name} takes {library}, which is neither in the build nor in {base.name}",
                    remedy="ggufrq bundle, which builds for the system that it collects from",
                )
            wanted[library] = other
    files = {name: path for name, path in files.items() if name not in _other_names(files, asked)}
    asked = {name: asked[name] for name in sorted(files)}
    for name, one in asked.items():
        folders = [folder for folder in one.path.split(":") if folder]
        if set(one.needed) & files.keys() and "$ORIGIN" not in folders:
            raise BuildError(f"{name} does not look for its libraries beside itself", remedy="ggufrq bundle")
        own = [folder for folder in folders if not folder.startswith("$ORIGIN")]
        if own:
            raise BuildError(
                f"{name} looks for libraries in {own[0]}, of this machine", remedy="ggufrq bundle"
            )
    return {name: files[name] for name in sorted(files)}, asked


def _other_names(files: dict[str, Path], asked: dict[str, Elf]) -> set[str]:
    """Names of modules that are libraries which others ask for by another one (``libx.so`` for
    ``libx.so.0``)."""
    needed = {library for one in asked.values() for library in one.needed}
    known = {files[name] for name in files if name in needed}
    return {name for name in files if name not in needed and _MODULE.fullmatch(name) and files[name] in known}


def converter(source: Path) -> Iterator[tuple[str, Path]]:
    """What the converter of models takes of the patched source, by its name there."""
    for name in _CONVERTER:
        place = source / name
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(source).as_posix(), path


def licences(build: Build, base: BaseSystem, files: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """Licences of ggufrq, llama.cpp, what that carries, and the libraries that are brought along."""
    yield "ggufrq.txt", paths.licence()
    yield "llama.cpp.txt", build.source / "LICENSE"
    for path in sorted((build.source / "licenses").glob("*")):
        yield f"llama.cpp-{path.name}.txt", path
    yield "texts-of-the-models.md", paths.data_dir("texts") / "LICENSES.md"
    for library, (package, name) in _LICENCES.items():
        if library in files:
            text = (base.root or Path("/")) / "usr" / "share" / "doc" / package / "copyright"
            if text.is_file():
                yield name, text

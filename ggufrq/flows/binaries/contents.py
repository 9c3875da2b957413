"""The files of a build that are given away: programs and libraries as they load each other, what the
converter of models takes, licences.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ggufrq.base import log, paths
from ggufrq.base.errors import BuildError
from ggufrq.build import project
from ggufrq.build.base_system import BaseSystem
from ggufrq.build.project import Build
from ggufrq.build.systems import Binary

#: What of llama.cpp's tree the converter takes, and the names of the pre-tokenizers.
_CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py/gguf", "src/llama-vocab.cpp")


def programs(build: Build, base: BaseSystem) -> tuple[dict[str, Path], dict[str, Binary]]:
    """Files of the folder ``bin`` by name: the usual programs, modules, and all libraries that these load and
    the system does not have. What each asks for stands beside it.

    Raises BuildError for a file that is missing or that would not find the others.
    """
    system = base.system
    files: dict[str, Path] = {}
    asked: dict[str, Binary] = {}
    wanted = {path.name: path for path in map(build.tool, project.TARGETS)}
    wanted |= {path.name: path for path in sorted(build.bin.iterdir()) if system.module.fullmatch(path.name)}
    if not any("ggml-cpu" in name for name in wanted):
        raise BuildError(f"{build.bin} has no code for processors", remedy="ggufrq bundle")
    while wanted:
        name, path = wanted.popitem()
        found = base.asks(path.resolve())
        if found is None or found.arch != base.arch:
            what = f"no program for {system.title}" if found is None else f"for {found.arch}, not {base.arch}"
            raise BuildError(f"{path} cannot be given away: it is {what}")
        files[name], asked[name] = path.resolve(), found
        for library in found.needed:
            if library in files or system.has(library) or library.startswith(system.drivers):
                continue
            inside = build.bin / library
            beside = inside.parent == build.bin and inside.is_file()
            other = inside if beside else base.library(library)
            if other is None:
                raise BuildError(
                    f"{name} takes {library}, which is neither in the build nor in {base.name}",
                    remedy="ggufrq bundle, which builds for the system that it collects from",
                )
            wanted[library] = other
    files = {name: path for name, path in files.items() if name not in _other_names(files, asked, base)}
    asked = {name: asked[name] for name in sorted(files)}
    for name, one in asked.items():
        folders = [folder for folder in one.path.split(":") if folder]
        if set(one.needed) & files.keys() and "$ORIGIN" not in folders:
            raise BuildError(f"{name} does not look for its libraries beside itself", remedy="ggufrq bundle")
        own = [folder for folder in folders if not folder.startswith("$ORIGIN")]
        if own:
            raise BuildError(
                f"{name} looks for libraries in {own[0]}, of this machine",
                remedy="ggufrq bundle without other CMake options",
            )
    return {name: files[name] for name in sorted(files)}, asked


def _other_names(files: dict[str, Path], asked: dict[str, Binary], base: BaseSystem) -> set[str]:
    """Names of modules that are libraries which others ask for by another one (``libx.so`` for
    ``libx.so.0``)."""
    needed = {library for one in asked.values() for library in one.needed}
    known = {files[name] for name in files if name in needed}
    modules = {name for name in files if base.system.module.fullmatch(name)}
    return {name for name in modules - needed if files[name] in known}


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
    for library, (name, _) in base.system.licences.items():
        if library not in files:
            continue
        text = base.licence(library)
        if text is None:
            log.say(f"the licence of {library}, which comes along, was not found on this system")
        else:
            yield name, text

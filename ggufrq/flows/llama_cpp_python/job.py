"""The wheel of llama-cpp-python over a build, and its installation."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ggufrq import codec
from ggufrq.base import log, paths, proc
from ggufrq.base.errors import BuildError, ToolError, UsageError
from ggufrq.build.project import Build
from ggufrq.cache.kv import DEFAULT_FIRST, DEFAULT_RECENT, MAX_EXACT, kv_types
from ggufrq.flows import wheels
from ggufrq.flows.llama_cpp_python.edits import edited
from ggufrq.models import names
from ggufrq.source.bindings import python_files
from ggufrq.source.pin import Pin, load_pin

PACKAGE = "llama_cpp"
#: Libraries that Python loads, and those that they load.
_LIBRARY = re.compile(
    r"(?:lib)?(?P<name>llama|mtmd|ggml(?:-[\w.-]*?)?)(?P<end>\.so(?:\.\d+)*|(?:\.\d+)*\.dylib|\.dll)"
)
_NEEDED = {"llama", "mtmd", "ggml", "ggml-base"}
_INSTALL_SECONDS = 1200.0


def make(build: Build, folder: Path | None = None, *, source: str = "auto") -> Path:
    """The wheel over a build, in ``folder`` or in that of the build. ``source``: as in ``python_files``.

    Its version has a local label: the patch set, the backend, and ``native`` where it is for the processor
    that it was built on, ``portable`` where it holds code for all of the architecture, else ``generic``.
    Raises SourceError as ``python_files`` and when its files are not as they are edited, BuildError when the
    build lacks a library.
    """
    pin = load_pin()
    return make_from(build, python_files(pin, source), pin, folder)


def make_from(build: Build, files: Path, pin: Pin, folder: Path | None = None) -> Path:
    """As ``make``, from the Python files in a folder."""
    assert pin.sdist is not None
    release, version = pin.sdist.version, f"{pin.sdist.version}+{label(build)}"
    tag = f"py3-none-{wheels.platform_tag()}"
    path = (folder or build.root / "python") / wheels.file_name(pin.sdist.name, version, tag)
    info = wheels.dist_info(pin.sdist.name, version)
    package = files / PACKAGE
    content: dict[str, bytes | Path] = {
        f"{PACKAGE}/{file.relative_to(package).as_posix()}": file
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    content |= {
        f"{PACKAGE}/{name}": text.encode() for name, text in edited(package, release, version).items()
    }
    content |= {f"{PACKAGE}/lib/{name}": file for name, file in libraries(build.bin).items()}
    content[f"{PACKAGE}/_ggufrq.py"] = Path(__file__).with_name("_ggufrq.py")
    content[f"{PACKAGE}/_ggufrq_names.py"] = Path(names.__file__)
    content[f"{PACKAGE}/_ggufrq.json"] = (json.dumps(_facts(build), indent=2) + "\n").encode()
    licences = dict(_licences(files, build.source))
    content |= {f"{info}/licenses/{name}": file for name, file in licences.items()}
    content[f"{info}/METADATA"] = metadata(
        (files / "PKG-INFO").read_text(encoding="utf-8"), version, sorted(licences)
    ).encode()
    wheels.write(path, pin.sdist.name, version, tag, content)
    return path


def label(build: Build) -> str:
    """The local label of the version over a build: ``rq1a2b3c4d.cpu.native``."""
    facts = build.manifest
    # one module for each kind of processor, of which the best is loaded
    variants = [name for name in libraries(build.bin) if "ggml-cpu-" in name]
    kind = "native" if facts["native"] else "portable" if variants else "generic"
    return f"rq{facts['patch_set'][:8]}.{facts['backend']}.{kind}"


def libraries(folder: Path) -> dict[str, Path]:
    """The libraries of a build by the names that they ask for each other by (``libllama.so.0``), each once.

    Raises BuildError when one is missing.
    """
    chosen: dict[Path, str] = {}
    found = set()
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        part = _LIBRARY.fullmatch(path.name)
        if part is None or not path.is_file():
            continue
        found.add(part["name"])
        real = path.resolve()
        # libx.so, libx.so.0 and libx.so.0.5.0 are one file
        numbers = len(re.findall(r"\.\d+", part["end"]))
        if real not in chosen or numbers == 1:
            chosen[real] = path.name
    if not found >= _NEEDED or not any(name.startswith("ggml-cpu") for name in found):
        missing = sorted(_NEEDED - found) or ["ggml-cpu"]
        raise BuildError(
            f"the build in {folder} lacks the library {missing[0]}", remedy="ggufrq build --target mtmd"
        )
    return {name: path for path, name in chosen.items()}


def metadata(pkg_info: str, version: str, licences: list[str]) -> str:
    """METADATA from that of the sdist: another version, and the files of the licences."""
    head, blank, body = pkg_info.partition("\n\n")
    lines = []
    for line in head.splitlines():
        name = line.partition(":")[0]
        value = {"Metadata-Version": "2.4", "Version": version}.get(name)
        lines.append(line if value is None else f"{name}: {value}")
    return "\n".join([*lines, *(f"License-File: {name}" for name in licences)]) + blank + body


def install(wheel: Path, python: str | None = None) -> str:
    """Put a wheel, with what it needs, into the environment of ``python``, a program or a folder; the
    `python` of the PATH unless given. Returns which one that was.

    Raises UsageError when there is none, ToolError with pip's words when it fails.
    """
    chosen = python or shutil.which("python") or shutil.which("python3")
    if chosen is None:
        raise UsageError(
            "there is no `python` on the PATH", remedy="ggufrq build --python --install ENVIRONMENT"
        )
    if python is not None and not Path(python).exists() and shutil.which(python) is None:
        raise UsageError(
            f"{python} is neither a Python nor the folder of an environment",
            remedy=f"python -m venv {python}, then this again",
        )
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", chosen]
    pip += ["--quiet", "--disable-pip-version-check", "install"]
    # what it needs first, then itself again: pip would leave one of the same version as it is
    for arguments in ([wheel], ["--force-reinstall", "--no-deps", wheel]):
        try:
            proc.run([*pip, *arguments], env={"PIP_NO_INPUT": "1"}, timeout=_INSTALL_SECONDS)
        except ToolError as error:
            raise ToolError(
                f"pip cannot install {wheel.name} into {chosen}: {_reason(error.message)}",
                remedy=f"python -m pip --python {chosen} install {wheel}",
            ) from None
    log.say(f"installed into {chosen}")
    return chosen


def _reason(message: str) -> str:
    said = [line for line in message.splitlines() if "ERROR" in line or "error:" in line] or [message]
    return said[0].strip().removeprefix("ERROR: ")


def _facts(build: Build) -> dict[str, object]:
    """What the module in the wheel must know."""
    from gguf import GGMLQuantizationType  # takes a while, and most commands need none of this

    types = kv_types()
    numbers = {kind.name: kind.id for kind in codec.cache_types()}
    return {
        "build": build.key,
        "types": {name: numbers.get(name) or int(GGMLQuantizationType[name.upper()]) for name in types},
        "ours": [name for name, kind in types.items() if kind.ours],
        "recent": DEFAULT_RECENT,
        "first": DEFAULT_FIRST,
        "most": MAX_EXACT,
    }


def _licences(files: Path, source: Path) -> Iterator[tuple[str, Path]]:
    """Licences of what is in the wheel: llama-cpp-python's, ours, llama.cpp's, those of what it carries."""
    yield "LICENSE.md", files / "LICENSE.md"
    yield "ggufrq/LICENSE", paths.licence()
    yield "llama.cpp/LICENSE", source / "LICENSE"
    for path in sorted((source / "licenses").glob("*")):
        yield f"llama.cpp/{path.name}", path

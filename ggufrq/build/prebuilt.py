"""Programs that were built elsewhere: the wheel ggufrq-bin, or an unpacked archive of ``ggufrq bundle``.

Both are a folder with ``manifest.json``, ``bin``, ``licenses``, ``models`` (embedded ones, ready to run) and
``source`` (what of llama.cpp's tree the converter of models takes).
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from ggufrq import __version__
from ggufrq.base import paths, proc
from ggufrq.base.errors import BuildError
from ggufrq.build import backends, elf, systems
from ggufrq.build.project import Build, llama_project

#: Environment variable with the folder of an unpacked archive, which goes before everything else.
VARIABLE = "GGUFRQ_BIN"
#: The wheel: what it is called, and its package.
DISTRIBUTION, PACKAGE = "ggufrq-bin", "ggufrq_bin"
#: Counted up when the folder is laid out in another way.
FORMAT = 1
MANIFEST = "manifest.json"
_FACTS = {"key", "llama_cpp", "patch_set", "backend", "system", "arch", "needs", "files"}
#: Linux's names of processors by those of Windows.
_MACHINES = {"AMD64": "x86_64"}

#: The command that brings the wheel of this ggufrq, from the folder of ``ggufrq bundle`` and nowhere else: an
#: index may have a stranger's of that name. What a GPU's wheel asks an index for, ``not_loaded`` tells.
INSTALL = f'python -m pip install --no-index --no-deps --find-links DIR "{DISTRIBUTION}=={__version__}"'
_BUILD_HERE = "ggufrq build, which compiles for this machine"


def find() -> Build | None:
    """The programs of ``$GGUFRQ_BIN`` or else of the installed wheel, None where there is neither.

    Raises BuildError for such that are not of this ggufrq, not for this machine, or not whole.
    """
    root = _folder()
    if root is None:
        return None
    facts = paths.read_json(root / MANIFEST)
    if facts is None or facts.get("format") != FORMAT or not facts.keys() >= _FACTS:
        why = f"has no {MANIFEST} that this ggufrq reads" if root.is_dir() else "is not there"
        raise BuildError(f"{_named(root)} {why}", remedy=_again(root))
    _require_series(root, facts)
    _require_machine(root, facts)
    for name, file in facts["files"].items():
        path = root / name
        if not path.is_file() or path.stat().st_size != file["size"]:
            raise BuildError(
                f"{_named(root)} is not whole: {name} is missing or damaged", remedy=_again(root)
            )
    return Build(str(facts["key"]), root, root / "bin", root / "source", facts)


def chosen() -> bool:
    """Whether the user says by the variable which programs to take."""
    return bool(os.environ.get(VARIABLE))


def gain(build: Build) -> str:
    """What a build of one's own would add to these programs, in a few words."""
    here = backends.default()
    parts = ["code for just this processor in all of llama.cpp, not in the kernels alone"]
    if here not in ("cpu", build.manifest["backend"]):
        parts.append(f"the backend {here}, whose device is here")
    return f"`ggufrq build` would add {' and '.join(parts)}"


def is_one(build: Build) -> bool:
    """Whether a build was made elsewhere."""
    return build.manifest.get("format") == FORMAT


def caution(build: Build) -> str | None:
    """What is to be said of the backend of a build that was made elsewhere; who builds is told then."""
    return backends.caution(build.manifest["backend"], built=True) if is_one(build) else None


def not_loaded(build: Build) -> str | None:
    """Why llama.cpp passes over the GPU's module of a build that was made elsewhere, without a word; None
    where it is loaded, or nobody knows (without ``ldd``)."""
    if not is_one(build) or shutil.which("ldd") is None:
        return None
    module = build.bin / f"libggml-{build.manifest['backend']}.so"
    if not module.is_file():
        return None
    told = proc.run(["ldd", module], check=False, timeout=60).stdout
    absent = re.findall(r"^\s*(\S+) => not found", told, re.MULTILINE)
    if not absent:
        return None
    wheels = build.manifest.get("wheels", {})
    wanted = sorted({f"'{wheels[library]}'" for library in absent if library in wheels})
    remedy = f"; python -m pip install {' '.join(wanted)}" if wanted else ""
    return f"{module.name} is not loaded, all runs on the processor: no {', '.join(absent)} here{remedy}"


def named(build: Build) -> str:
    """The wheel or the folder that a build came in, for people."""
    return _named(build.root)


def _folder() -> Path | None:
    given = os.environ.get(VARIABLE)
    if given:
        return paths.expanded(given).absolute()
    try:
        file = importlib.import_module(PACKAGE).__file__
    except ImportError:
        return None
    return Path(file).parent if file else None


def _named(root: Path) -> str:
    return f"the archive in {root}" if chosen() else f"the wheel {DISTRIBUTION} in {root}"


def _again(root: Path) -> str:
    if chosen():
        return f"unpack it again and set {VARIABLE} to its folder, or unset that"
    return f"{INSTALL} --force-reinstall, or {_BUILD_HERE}"


def _require_series(root: Path, facts: dict[str, Any]) -> None:
    project = llama_project()
    series = (project.pin.commit, project.patch_set.hash)
    theirs = (str(facts["llama_cpp"]["commit"]), str(facts["patch_set"]))
    if theirs != series:
        raise BuildError(
            f"{_named(root)} is of another series than ggufrq {__version__}: llama.cpp {theirs[0][:9]} with "
            f"patch set {theirs[1][:8]}, and this is for {series[0][:9]} with {series[1][:8]}",
            remedy=_again(root),
        )


def _require_machine(root: Path, facts: dict[str, Any]) -> None:
    machine = platform.machine()
    here, there = (platform.system(), _MACHINES.get(machine, machine)), (facts["system"], facts["arch"])
    if here != there:
        raise BuildError(
            f"{_named(root)} is for {systems.machine(*there)}, and this is {systems.machine(*here)}",
            remedy=_BUILD_HERE,
        )
    if here[0] == systems.MACOS.name:
        version, least = platform.mac_ver()[0], str(facts["needs"].get("macOS", "0"))
        compatible = version.startswith("10.16")  # what Pythons of an older SDK are told of all newer ones
        if not compatible and elf.version_key(version) < elf.version_key(least):
            raise BuildError(f"{_named(root)} takes macOS {least}, and here is {version}", remedy=_BUILD_HERE)
    if here[0] != systems.LINUX.name:
        return
    kind, version = platform.libc_ver()
    least = str(facts["needs"].get("GLIBC", "0"))
    if kind != "glibc" or elf.version_key(version) < elf.version_key(least):
        found = f"glibc {version}" if kind == "glibc" else "another C library"
        raise BuildError(f"{_named(root)} takes glibc {least}, and here is {found}", remedy=_BUILD_HERE)

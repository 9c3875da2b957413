"""The manifest of a build: what went in and what came out. Written last; the only thing that is trusted."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ggufrq import __version__
from ggufrq.base import machine, paths
from ggufrq.base.paths import read_json
from ggufrq.base.results import file_sha256
from ggufrq.build import backends, project, toolchain
from ggufrq.build.project import BuildOptions, Project

MANIFEST = "manifest.json"

_PROGRAMS = {
    "compiler": toolchain.compiler,
    "cmake": toolchain.cmake,
    "ninja": toolchain.ninja,
    "git": toolchain.git,
    "ccache": toolchain.ccache,
}


def write(root: Path, what: Project, options: BuildOptions, targets: list[str], seconds: float) -> None:
    """Record a finished build: inputs, versions, machine, and size, time and hash of all in its ``bin``."""
    programs = {}
    for path in sorted((root / "obj" / "bin").rglob("*")):
        if path.is_file() and not path.is_symlink():
            facts = path.stat()
            name = path.relative_to(root / "obj" / "bin").as_posix()
            programs[name] = {
                "size": facts.st_size,
                "mtime_ns": facts.st_mtime_ns,
                "sha256": file_sha256(path),
            }
    found = {name: probe() for name, probe in _PROGRAMS.items()}
    manifest = {
        "key": root.name,
        "llama_cpp": {"commit": what.pin.commit, "tree": what.pin.tree, "date": what.pin.date},
        "patch_set": what.patch_set.hash,
        "backend": options.backend,
        "native": options.native,
        "cmake_args": list(options.cmake_args),
        "definitions": project.definitions(what, options),
        "targets": targets,
        "versions": {
            "ggufrq": __version__,
            "python": platform.python_version(),
            **{name: program.version for name, program in found.items() if program is not None},
            **backends.get(options.backend).versions(),
        },
        "cpu": machine.processor().name,
        "simd": machine.processor().simd,
        "system": machine.system(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "programs": programs,
    }
    paths.atomic_write(root / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read(root: Path) -> dict[str, Any] | None:
    """The manifest of the build in ``root``, None when there is none or it is not of this build."""
    manifest = read_json(root / MANIFEST)
    if manifest is None or manifest.get("key") != root.name or not isinstance(manifest.get("programs"), dict):
        return None
    return manifest if isinstance(manifest.get("targets"), list) else None


def changed_programs(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Programs that are gone or no longer what the manifest says. The hash is taken only where the time
    differs.
    """
    changed = []
    for name, facts in manifest["programs"].items():
        path = root / "obj" / "bin" / name
        try:
            found = path.stat()
        except OSError:
            changed.append(name)
            continue
        same_time = found.st_mtime_ns == facts["mtime_ns"]
        if found.st_size != facts["size"] or not (same_time or file_sha256(path) == facts["sha256"]):
            changed.append(name)
    return changed

"""The files of a folder that may be published: those that its manifest vouches for, and those that go with
them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.paths import read_json
from ggufrq.base.progress import progress

MANIFEST_END = ".ggufrq.json"
MANIFESTS = f"*{MANIFEST_END}"
#: What goes along without being in a manifest.
_COMPANIONS = ("README.md", "LICENSE*", "NOTICE*", MANIFESTS)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A file to publish: its name, place and size, its sha256, and the id that git gives its content."""

    name: str
    path: Path
    bytes: int
    sha256: str
    git_id: str


def local_files(folder: Path, exclude: Sequence[str] = ()) -> list[LocalFile]:
    """The files of a folder, each hashed anew, but for hidden ones and those with names like ``exclude``.

    Raises UsageError when there is no manifest, or a file that none vouches for; ModelError when a file is
    missing or is not what the manifest says.
    """
    wholes = _files(folder)
    parts = {part["name"]: part for whole in wholes for part in whole}
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    paths = [path for path in found if not _matches(path.name, exclude)]
    foreign = [p.name for p in paths if p.name not in parts and not _matches(p.name, _COMPANIONS)]
    if foreign:
        raise UsageError(
            f"{folder} holds files that no manifest vouches for: {', '.join(foreign)}",
            remedy="move them away, or " + " ".join(f"--exclude '{name}'" for name in foreign),
        )
    for whole in wholes:
        names = [part["name"] for part in whole]
        left_out = [name for name in names if _matches(name, exclude)]
        if left_out and len(left_out) < len(names):
            raise UsageError(
                f"--exclude leaves out {', '.join(left_out)}, without which the other parts are no model",
                remedy=" ".join(f"--exclude '{name}'" for name in names),
            )
    missing = parts.keys() - {path.name for path in found}
    missing = {name for name in missing if not _matches(name, exclude)}
    if missing:
        raise ModelError(
            f"{folder} lacks files of its manifest: {', '.join(sorted(missing))}",
            remedy="ggufrq quantize makes them again, or --exclude NAME",
        )
    if not any(path.name in parts for path in paths):
        raise UsageError(f"there is nothing to publish in {folder}: all models are excluded")
    blocks = sum(-(-path.stat().st_size // _BLOCK) for path in paths)
    with progress("Checking", blocks, unit="MiB") as bar:
        return [_checked(path, parts.get(path.name), bar) for path in paths]


def _files(folder: Path) -> list[list[dict[str, Any]]]:
    """The parts of each file that the manifests of a folder vouch for."""
    manifests = sorted(folder.glob(MANIFESTS)) if folder.is_dir() else []
    if not manifests:
        raise UsageError(
            f"{folder} has no manifest of a family ({MANIFESTS})",
            remedy="the folder that ggufrq quantize wrote",
        )
    return list(_entries(manifests))


def _entries(manifests: Sequence[Path]) -> Iterator[list[dict[str, Any]]]:
    """The parts of each file that the manifests vouch for."""
    for path in manifests:
        data = read_json(path) or {}
        files = data.get("files")
        if not isinstance(files, dict):
            raise ModelError(f"{path} is no manifest, or damaged", remedy="ggufrq quantize writes it anew")
        for entry in files.values():
            yield entry.get("parts", []) if isinstance(entry, dict) else []


def _checked(path: Path, part: dict[str, Any] | None, bar: progress) -> LocalFile:
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            git.update(block)
            bar.advance(1, path.name)
    if part is not None and (part["bytes"], part["sha256"]) != (size, sha256.hexdigest()):
        raise ModelError(
            f"{path.name} is not what the manifest says it is: it was changed or damaged since",
            remedy=f"ggufrq quantize makes it again, or --exclude '{path.name}'",
        )
    return LocalFile(path.name, path, size, sha256.hexdigest(), git.hexdigest())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)

"""Folders of files: git's hash of one, and unpacking one safely from an archive."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from ggufrq.base.errors import SourceError

#: Whether files keep executable bits and links here. Where not (Windows), ``unpack`` notes beside the folder
#: what the archive said of them, and ``tree_hash`` reads that.
KEEPS_MODES = os.name == "posix"
_EXECUTABLE, _LINK = "100755", "120000"


def modes_file(folder: Path) -> Path:
    """Where the modes of a folder's files are noted that the file system does not keep."""
    return folder.with_name(f"{folder.name}.modes.json")


def tree_hash(folder: Path, *, ignore: Collection[str] = ()) -> str:
    """Git's tree hash (40 hex digits) of a folder's files as they are.

    ``.git`` and the names in ``ignore`` are left out at every level. Reads everything: about a second for
    llama.cpp.
    """
    noted: dict[str, str] = {}
    if not KEEPS_MODES and modes_file(folder).is_file():
        noted = json.loads(modes_file(folder).read_text(encoding="utf-8"))
    digest = _tree_digest(folder, {b".git", *map(os.fsencode, ignore)}, noted, "")
    return (digest if digest is not None else _git_object(b"tree", b"")).hex()


def _tree_digest(folder: Path, ignore: set[bytes], noted: Mapping[str, str], inside: str) -> bytes | None:
    entries: list[tuple[bytes, bytes, bytes, bytes]] = []
    for entry in os.scandir(folder):
        name = os.fsencode(entry.name)
        if name in ignore:
            continue
        if entry.is_symlink():
            content = os.fsencode(os.readlink(entry.path))  # noqa: PTH115 - the raw text of the link is what git hashes
            entries.append((name, b"120000", name, _git_object(b"blob", content)))
        elif entry.is_dir():
            digest = _tree_digest(Path(entry.path), ignore, noted, f"{inside}{entry.name}/")
            if digest is not None:  # git knows no empty folders
                entries.append((name + b"/", b"40000", name, digest))
        else:
            executable = KEEPS_MODES and entry.stat().st_mode & stat.S_IXUSR
            mode = noted.get(inside + entry.name, _EXECUTABLE if executable else "100644")
            content = Path(entry.path).read_bytes()
            entries.append((name, mode.encode(), name, _git_object(b"blob", content)))
    if not entries:
        return None
    entries.sort()
    return _git_object(
        b"tree", b"".join(mode + b" " + name + b"\0" + digest for _, mode, name, digest in entries)
    )


def _git_object(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(b"%s %d\0" % (kind, len(content)) + content, usedforsecurity=False).digest()


def unpack(tar: tarfile.TarFile, folders: Mapping[str, Path]) -> None:
    """Unpack the given folders of an archive (below its one top folder) to where they are mapped.

    Only plain files, folders and links that stay inside are taken, with git's two file modes.
    Raises SourceError when an entry would land outside or a folder is missing.
    """
    seen: set[str] = set()
    noted: dict[str, dict[str, str]] = {prefix: {} for prefix in folders}
    for member in tar:
        inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])
        for prefix, target in folders.items():
            if prefix and not inner.is_relative_to(prefix):
                continue
            relative = inner.relative_to(prefix)
            if ".." in relative.parts or member.name.startswith("/"):
                raise SourceError(f"the archive has an entry that points outside: {member.name}")
            seen.add(prefix)
            if ".git" in relative.parts:  # a submodule's pointer to a repository that is not here
                continue
            path = target.joinpath(*relative.parts)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.isfile():
                reader = tar.extractfile(member)
                assert reader is not None
                with path.open("wb") as file:
                    shutil.copyfileobj(reader, file, 1 << 20)
                if member.mode & stat.S_IXUSR:
                    noted[prefix][str(relative)] = _EXECUTABLE
                if KEEPS_MODES:
                    path.chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)
            elif member.issym() and _stays_inside(relative, member.linkname):
                noted[prefix][str(relative)] = _LINK
                if KEEPS_MODES:
                    path.symlink_to(member.linkname)
                else:  # as git does where it cannot make links
                    path.write_bytes(os.fsencode(member.linkname))
            else:
                raise SourceError(f"the archive has an entry of an unexpected kind: {member.name}")
    for prefix, target in folders.items():
        if prefix not in seen:
            raise SourceError(f"the archive has no folder '{prefix}'")
        if not KEEPS_MODES:
            modes_file(target).write_text(json.dumps(noted[prefix]) + "\n", encoding="utf-8")


def _stays_inside(link: PurePosixPath, target: str) -> bool:
    depth = len(link.parts) - 1
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0 or part == "/":
            return False
    return True

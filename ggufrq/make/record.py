"""The manifest of a family: which files were finished, from what, and what is in them.

An entry is written when a file is whole and checked, just before it gets its name: a file that is not in the
manifest or differs from it was not finished.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError, ModelError, UsageError
from ggufrq.base.results import file_sha256
from ggufrq.base.sizes import size_text
from ggufrq.ggufs.files import read_gguf

#: Bytes of a disk that are left free.
SPARE_DISK = 64 << 20


class Record:
    """The manifest ``BASE.ggufrq.json`` of a folder. The caller holds the folder's lock. ``opens`` raises
    ModelError for a file of the right size that is damaged nonetheless."""

    def __init__(self, folder: Path, base: str, opens: Callable[[Path], object] = read_gguf) -> None:
        self.folder = folder
        self.base = base
        self.opens = opens
        self.path = folder / f"{base}.ggufrq.json"
        self.data = _read(self.path)

    @property
    def files(self) -> dict[str, Any]:
        """Entries by name of the file."""
        files = self.data["files"]
        assert isinstance(files, dict)
        return files

    def clean(self) -> None:
        """Remove what a run that was killed left half-made."""
        for left in self.folder.glob(f".*{glob.escape(self.base)}*.tmp"):
            if left.is_dir():
                paths.remove_tree(left)
            else:
                left.unlink(missing_ok=True)

    def kept(self, name: str, made_from: Mapping[str, str]) -> dict[str, Any] | None:
        """The entry of a file that was made from just this, when it is still what was entered and opens."""
        entry = self.files.get(name)
        if not isinstance(entry, dict) or entry.get("from") != dict(made_from):
            return None
        parts = entry.get("parts")
        if not parts or not all(self._unchanged(part) for part in parts):
            return None
        return entry

    def _unchanged(self, part: dict[str, Any]) -> bool:
        path = self.folder / part["name"]
        try:
            found = path.stat()
            if found.st_size != part["bytes"]:
                return False
            # A copy has another time: then the content tells.
            if found.st_mtime_ns != part["mtime_ns"] and file_sha256(path) != part["sha256"]:
                return False
            self.opens(path)
        except (OSError, ModelError):
            return False
        return True

    def refuse_foreign(self, names: Sequence[str], *, force: bool) -> None:
        """Raise UsageError when one of these files is there and was not made by ggufrq."""
        ours = {part["name"] for entry in self.files.values() for part in entry.get("parts", [])}
        ours |= self.files.keys()
        for name in names:
            path = self.folder / name
            if path.exists() and name not in ours and not force:
                raise UsageError(
                    f"{path} exists and was not made by ggufrq here",
                    remedy="-o another folder, or --force to replace it",
                )

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A temporary path in the folder, for a file or a folder; what is left of it goes away."""
        path = self.folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            yield path
        finally:
            if path.is_dir():
                paths.remove_tree(path)
            else:
                path.unlink(missing_ok=True)

    def finish(
        self,
        name: str,
        made: Sequence[tuple[Path, str]],
        made_from: Mapping[str, str],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Enter the file ``name`` that consists of ``made`` (temporary path, final name), then give these
        their names. Parts of an earlier file of this name that are no longer its parts are removed."""
        parts = []
        for path, final in made:
            found = path.stat()
            parts.append(
                {
                    "name": final,
                    "bytes": found.st_size,
                    "mtime_ns": found.st_mtime_ns,
                    "sha256": file_sha256(path),
                }
            )
        before = [part["name"] for part in self.files.get(name, {}).get("parts", [])]
        entry = {**facts, "from": dict(made_from), "parts": parts}
        self.files[name] = entry
        self.save()
        for path, final in made:
            path.replace(self.folder / final)
        for left in before:
            if left not in {final for _, final in made}:
                (self.folder / left).unlink(missing_ok=True)
        return entry

    def save(self) -> None:
        """Write the manifest."""
        paths.atomic_write(self.path, json.dumps(self.data, indent=2) + "\n")


def require_free(folder: Path, need: int, what: str) -> None:
    """Raise GgufrqError when the disk of ``folder`` has no room for ``need`` bytes."""
    require_room(folder, shutil.disk_usage(folder).free, need, what)


def require_room(folder: Path, free: int, need: int, what: str) -> None:
    """As ``require_free``, where so many bytes are ``free``."""
    if free < need + SPARE_DISK:
        raise GgufrqError(
            f"the disk has no room: {what} takes {size_text(need)}, {size_text(SPARE_DISK)} are left alone, "
            f"and {folder.absolute()} has {size_text(free)} free",
            remedy="free some space, a folder on a larger disk, or fewer types",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    if not isinstance(data, dict) or not isinstance(data.get("files"), dict):
        data = {"files": {}}
    data["files"] = {name: entry for name, entry in data["files"].items() if isinstance(entry, dict)}
    return data

"""The Python files of llama-cpp-python, which its sdist carries beside llama.cpp: fetched when they are first
needed, verified, kept in the cache.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from ggufrq.base import paths
from ggufrq.base.errors import SourceError
from ggufrq.base.locks import locked
from ggufrq.base.paths import read_json
from ggufrq.base.trees import tree_hash, unpack
from ggufrq.source import origins
from ggufrq.source.pin import Pin, Sdist

#: What is kept of the sdist: the package, its licence, its metadata.
FILES = ("llama_cpp", "LICENSE.md", "PKG-INFO")

_MARKER = "verified.json"


def python_files(pin: Pin, source: str = "auto") -> Path:
    """A folder with ``FILES`` of the pinned sdist, in the cache; nobody may write to it.

    They come from PyPI, or from ``source`` where that is an sdist file. Raises SourceError when they cannot
    be had or are not those of the pinned release.
    """
    sdist = pin.sdist
    if sdist is None:
        raise SourceError("this pin names no release of llama-cpp-python")
    home = paths.sources_dir() / f"{sdist.name}-{sdist.version}"
    with locked(home.with_name(home.name + ".lock"), "another ggufrq is getting llama-cpp-python"):
        if not _is_kept(home, sdist):
            paths.remove_tree(home)
            with paths.atomic_path(home) as fresh:
                given = paths.expanded(source)
                if given.is_file():
                    _unpack(given, sdist, fresh)
                else:
                    _unpack(origins.download(sdist.name, sdist.version, fresh / "download"), sdist, fresh)
                    paths.remove_tree(fresh / "download")
    return home / "files"


def _is_kept(home: Path, sdist: Sdist) -> bool:
    marker = read_json(home / _MARKER)
    if marker is None or marker.get("sha256") != sdist.sha256 or not (home / "files").is_dir():
        return False
    return tree_hash(home / "files") == marker.get("tree")


def _unpack(archive: Path, sdist: Sdist, home: Path) -> None:
    origins.require_sha256(archive, sdist)
    files = home / "files"
    files.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        unpack(tar, {name: files / name for name in FILES})
    marker = {"sha256": sdist.sha256, "tree": tree_hash(files)}
    (home / _MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")

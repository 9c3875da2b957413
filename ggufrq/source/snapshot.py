"""Any llama.cpp as a verified tree in the cache: the pinned one, a release of llama-cpp-python, a tag or
commit, a checkout, or an sdist file.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.base.errors import SourceError
from ggufrq.base.results import file_sha256
from ggufrq.base.trees import tree_hash
from ggufrq.source import obtain, origins
from ggufrq.source.pin import Pin, Sdist, load_pin

_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Snapshot:
    """An upstream: what users call it, its commit, tree and date as a pin, its files, which nobody may write
    to, and what ``snapshot`` finds it by again."""

    name: str
    pin: Pin
    tree: Path
    source: str = "pin"

    @property
    def pinned(self) -> bool:
        """Whether it is the one that the series is made for."""
        return self.pin.commit == load_pin().commit


def snapshot(spec: str) -> Snapshot:
    """The upstream that ``spec`` names: ``pin``, a version of the sdist (0.3.35), a folder that is a git
    checkout, an sdist file, or a tag, branch or commit at the pin's URL.

    Its files are those of the commit, whatever was changed beside it. Raises SourceError.
    """
    path = paths.expanded(spec)
    return replace(_find(spec, path), source=str(path.resolve()) if path.exists() else spec)


def _find(spec: str, path: Path) -> Snapshot:
    pin = load_pin()
    if spec in ("pin", pin.commit) or (pin.sdist is not None and spec == pin.sdist.version):
        return Snapshot(_sdist_name(pin.sdist) if pin.sdist else pin.short, pin, obtain.pristine(pin))
    if path.is_dir():
        return _of_folder(path, pin)
    if path.is_file():
        return _of_sdist(path, pin)
    if _VERSION.fullmatch(spec):
        return _of_version(spec, pin)
    return _of_git(spec, pin)


def _of_version(version: str, pin: Pin) -> Snapshot:
    if pin.sdist is None:
        raise SourceError("the pin names no sdist on PyPI", remedy="--source with a tag or commit")
    try:
        found = json.loads(_note(pin.sdist.name, version).read_text(encoding="utf-8"))
        remembered = Pin(**{**found, "sdist": Sdist(**found["sdist"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass
    else:
        tree = obtain.cached(remembered, thorough=True)
        if tree is not None:
            return Snapshot(_sdist_name(remembered.sdist), remembered, tree)
    with _temporary() as folder:
        return _of_sdist(origins.download(pin.sdist.name, version, folder), pin, version)


def _of_sdist(archive: Path, pin: Pin, version: str | None = None) -> Snapshot:
    if pin.sdist is None:
        raise SourceError("the pin does not say where in an sdist llama.cpp is")
    if version is None:
        named = _VERSION.search(archive.name)
        version = named[0] if named else archive.name
    sdist = replace(pin.sdist, version=version, sha256=file_sha256(archive))
    with _temporary() as folder:
        git_dir = folder / "sdist.git"
        commit, its_tree = origins.unpack_sdist(archive, sdist, folder / obtain.TREE, git_dir)
        found = (commit, its_tree)
        taken = _kept(_sdist_name(sdist), folder, ["--git-dir", str(git_dir)], found, pin, sdist)
    paths.atomic_write(_note(sdist.name, version), json.dumps(asdict(taken.pin)) + "\n")
    return taken


def _note(name: str, version: str) -> Path:
    """What a release was found to carry, so that it is not fetched again to learn that."""
    return paths.sources_dir() / f"{name}-{version}.json"


def _of_folder(path: Path, pin: Pin) -> Snapshot:
    commit = origins.checkout_commit(path)
    if commit is None:
        raise SourceError(
            f"{path} is no git checkout, so that its commit is not known",
            remedy=f"ggufrq build --check --source {path} tells whether the patches fit it",
        )
    git = ["-C", str(path), "-c", f"safe.directory={path.resolve()}"]
    return _of_commit(commit[:9], git, "HEAD", pin)


def _of_git(name: str, pin: Pin) -> Snapshot:
    url = os.environ.get(origins.URL_VARIABLE) or pin.url
    with _temporary() as folder:
        store = folder / "fetch.git"
        origins.fetch(url, name, store, probe=origins.PROBE_SECONDS_EXPLICIT)
        label = name[:9] if re.fullmatch(r"[0-9a-f]{10,40}", name) else name
        return _of_commit(label, ["--git-dir", str(store)], "FETCH_HEAD", pin)


def _of_commit(label: str, git: list[str], name: str, pin: Pin) -> Snapshot:
    commit, its_tree = origins.commit_and_tree(git, name)
    with _temporary() as folder:
        (folder / obtain.TREE).mkdir()
        origins.export_tree(git, its_tree, folder / obtain.TREE)
        return _kept(label, folder, git, (commit, its_tree), pin, None)


def _kept(
    label: str, folder: Path, git: list[str], found: tuple[str, str], pin: Pin, sdist: Sdist | None
) -> Snapshot:
    """Move the tree in ``folder`` into the cache, if it is what its commit says."""
    commit, its_tree = found
    tree = folder / obtain.TREE
    if tree_hash(tree) != its_tree:
        raise SourceError(f"{label} carries other files than its commit {commit} has (tree {its_tree})")
    date = proc.run(
        ["git", *git, "log", "-1", "--format=%cs", commit], env=origins.NEUTRAL_GIT
    ).stdout.strip()
    its_pin = Pin(pin.url, commit, its_tree, date, sdist)
    home = obtain.keep(its_pin, tree)
    return Snapshot(label, its_pin, home)


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder beside the cached trees, removed at the end."""
    folder = paths.sources_dir() / f".snapshot.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        paths.remove_tree(folder)


def _sdist_name(sdist: Sdist | None) -> str:
    return f"{sdist.name} {sdist.version}" if sdist else ""

"""The pinned source of llama.cpp: from git, from PyPI or from a folder, always verified, kept in the cache.

Whatever way it comes, the tree that is used has the git tree hash that ``pin.toml`` names, computed here from
the files themselves, so that no git setting (line ends, file modes, filters) can come between.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ggufrq.base import log, paths, proc
from ggufrq.base.errors import SourceError
from ggufrq.base.locks import locked
from ggufrq.base.trees import modes_file, tree_hash
from ggufrq.source.origins import (
    NO_OUTER_REPOSITORY,
    PROBE_SECONDS,
    PROBE_SECONDS_EXPLICIT,
    URL_VARIABLE,
    checkout_commit,
    commit_and_tree,
    download,
    export_tree,
    fetch,
    require_sha256,
    unpack_sdist,
)
from ggufrq.source.pin import Pin

#: Ways that need no folder.
NETWORK = ("auto", "git", "pypi")

_MARKER = "verified.json"
#: Name of the tree in its folder of the cache.
TREE = "llama.cpp"


def cached(pin: Pin, *, thorough: bool = False) -> Path | None:
    """The cached pristine tree of the pin, or None. ``thorough`` hashes all of it, otherwise its marker is
    believed.
    """
    cache = paths.find_cache()
    if cache is None:
        return None
    home = cache / "sources" / pin.commit
    try:
        marker = json.loads((home / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    tree = home / TREE
    if not isinstance(marker, dict) or marker.get("tree") != pin.tree or not tree.is_dir():
        return None
    if thorough and tree_hash(tree) != pin.tree:
        return None
    return tree


def pristine(pin: Pin, source: str = "auto") -> Path:
    """The verified pristine tree of the pin, in the cache; nobody may write to it.

    ``source`` is ``auto`` (git with a short time limit, then PyPI), ``git``, ``pypi``, a folder (a git
    checkout or a plain copy), or an sdist file. With a cached tree the first three touch no network. A folder
    is never modified. Raises SourceError saying what was found and what is wanted.
    """
    home = paths.sources_dir() / pin.commit
    with _locked(home):
        given = None if source in NETWORK else paths.expanded(source)
        if given is not None and not given.exists():
            raise SourceError(
                f"the source '{source}' is neither a folder nor one of auto, git, pypi",
                remedy="ggufrq build --source auto",
            )
        tree = cached(pin, thorough=True)
        if given is None and tree is not None:
            return tree
        if tree is None and home.exists():
            log.say(f"the cached source in {home} is not what was verified; getting it again")
            paths.remove_tree(home)
        with _new_home(pin, home, keep=tree is not None) as fresh:
            if given is None:
                _from_network(pin, source, fresh)
            elif given.is_dir():
                _from_folder(pin, given, fresh)
            else:
                _from_sdist(pin, given, fresh)
            found = tree_hash(fresh)
            if found != pin.tree:
                raise SourceError(
                    f"the source obtained has tree {found}, wanted is {pin.tree} (llama.cpp {pin.short})",
                    remedy="ggufrq build --source pypi" if source != "pypi" else "ggufrq build --source git",
                )
    return home / TREE


def keep(pin: Pin, tree: Path) -> Path:
    """Move a tree that has been verified, in the cache's folder of sources, to where ``cached`` finds it."""
    home = paths.sources_dir() / pin.commit
    with _locked(home):
        have = cached(pin, thorough=True)
        if have is not None:
            return have
        paths.remove_tree(home)
        with _new_home(pin, home, keep=False) as fresh:
            fresh.rmdir()
            tree.replace(fresh)
            if modes_file(tree).is_file():
                modes_file(tree).replace(modes_file(fresh))
    return home / TREE


def _locked(home: Path) -> AbstractContextManager[None]:
    return locked(home.with_name(home.name + ".lock"), "another ggufrq is getting the source")


@contextmanager
def _new_home(pin: Pin, home: Path, *, keep: bool) -> Iterator[Path]:
    """Yield a temporary tree that becomes the cached one on success, unless ``keep`` says there is a good
    one.
    """
    for stale in home.parent.glob(f".{home.name}.*.tmp"):  # of runs that were killed: we hold the lock
        paths.remove_tree(stale)
    temporary = home.with_name(f".{home.name}.{os.getpid()}.tmp")
    try:
        tree = temporary / TREE
        tree.mkdir(parents=True)
        yield tree
        if not keep:
            marker = {"commit": pin.commit, "tree": pin.tree}
            (temporary / _MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
            temporary.replace(home)
    finally:
        paths.remove_tree(temporary)


def _from_network(pin: Pin, source: str, tree: Path) -> None:
    if source == "git" or (source == "auto" and pin.sdist is None):
        _from_git(pin, tree, probe=PROBE_SECONDS_EXPLICIT)
        return
    if source == "auto":
        try:
            _from_git(pin, tree, probe=PROBE_SECONDS)
            return
        except SourceError as error:
            log.say(f"{error.message.splitlines()[0]}; taking the same tree from PyPI")
            paths.remove_tree(tree)
            tree.mkdir()
    _from_pypi(pin, tree)


def _from_git(pin: Pin, tree: Path, *, probe: float) -> None:
    url = os.environ.get(URL_VARIABLE) or pin.url
    store = tree.parent / "fetch.git"
    fetch(url, pin.commit, store, probe=probe)
    _export_commit(pin, ["--git-dir", str(store)], tree, origin=url)
    paths.remove_tree(store)


def _from_pypi(pin: Pin, tree: Path) -> None:
    sdist = pin.sdist
    if sdist is None:
        raise SourceError("this pin names no sdist on PyPI", remedy="ggufrq build --source git")
    archive = download(sdist.name, sdist.version, tree.parent / "download")
    _from_sdist(pin, archive, tree)
    paths.remove_tree(archive.parent)


def _from_sdist(pin: Pin, archive: Path, tree: Path) -> None:
    """Unpack llama.cpp from an sdist whose sha256 and recorded commit are the pinned ones."""
    sdist = pin.sdist
    if sdist is None:
        raise SourceError("this pin names no sdist", remedy="ggufrq build --source git")
    require_sha256(archive, sdist)
    git_dir = tree.parent / "sdist.git"
    commit, its_tree = unpack_sdist(archive, sdist, tree, git_dir)
    if (commit, its_tree) != (pin.commit, pin.tree):
        raise SourceError(
            f"{archive.name} carries llama.cpp {commit} (tree {its_tree}), "
            f"wanted is {pin.commit} (tree {pin.tree})",
            remedy="ggufrq build --source git",
        )
    paths.remove_tree(git_dir)


def _from_folder(pin: Pin, folder: Path, tree: Path) -> None:
    commit = checkout_commit(folder)
    if commit is None:
        found = tree_hash(folder)
        if found != pin.tree:
            raise SourceError(
                f"{folder} has tree {found}, wanted is {pin.tree} (llama.cpp {pin.short}): "
                "it is another version, or files were changed or added in it",
                remedy=f"ggufrq build --check --source {folder} tells whether the patches fit it",
            )
        shutil.copytree(
            folder, tree, ignore=shutil.ignore_patterns(".git"), symlinks=True, dirs_exist_ok=True
        )
        return
    if commit != pin.commit:
        raise SourceError(
            f"{folder} is at commit {commit}, wanted is {pin.commit} ({pin.date})",
            remedy=f"git -C {folder} checkout {pin.commit}, or ggufrq build --check --source {folder} "
            "to see whether the patches fit it",
        )
    git = ["-C", str(folder), "-c", f"safe.directory={folder.resolve()}"]
    status = proc.run(
        ["git", *git, "status", "--porcelain", "--untracked-files=no"],
        env={**NO_OUTER_REPOSITORY, "GIT_OPTIONAL_LOCKS": "0"},
    )
    changed = [line[3:] for line in status.stdout.splitlines()]
    if changed:
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise SourceError(
            f"{folder} is at the pinned commit, but files were changed in it: {shown}",
            remedy=f"git -C {folder} stash, or use a clean checkout",
        )
    _export_commit(pin, git, tree, origin=str(folder))


def _export_commit(pin: Pin, git: list[str], tree: Path, *, origin: str) -> None:
    """Write the files of the pinned commit from a repository into ``tree``."""
    commit, its_tree = commit_and_tree(git, pin.commit)
    if (commit, its_tree) != (pin.commit, pin.tree):
        raise SourceError(
            f"commit {commit} from {origin} has tree {its_tree}, wanted is {pin.tree}",
            remedy="check 'commit' and 'tree' in pin.toml",
        )
    export_tree(git, pin.tree, tree)

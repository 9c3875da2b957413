"""A git work tree with the patch set in it, one commit per patch, to mend it in.

Branch ``patches``: the upstream as it is, then the overlay, then the patches, each commit's subject being the
patch's name and its body the header. For another upstream than the pinned one the pinned one is committed
first, with its patches, so that git has the old files to merge from. What a person changes there, as fixup
commits, ``refresh`` writes back.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import log, paths, proc
from ggufrq.base.errors import PatchError, UsageError
from ggufrq.patchset import compat, series
from ggufrq.patchset.patches import Failure, git_apply, try_patch
from ggufrq.patchset.series import OVERLAY, Patch, PatchSet
from ggufrq.source.obtain import pristine
from ggufrq.source.origins import NEUTRAL_GIT
from ggufrq.source.pin import load_pin
from ggufrq.source.snapshot import Snapshot

#: Subject of the commit that adds the overlay; the subjects of all others are names of patches.
OVERLAY_SUBJECT = "overlay"
BRANCH, BASE, PINNED = "patches", "base", "pinned"
_NOTE, _PENDING, _COMPLETE = "ggufrq.json", "ggufrq-pending", "ggufrq-complete"


@dataclass(frozen=True)
class Worktree:
    """A work tree: its folder, the upstream commit and date that it is of, whether that is the pin's, and the
    source it came from."""

    folder: Path
    commit: str
    date: str
    pinned: bool
    source: str = ""

    def git(self, *arguments: str | Path, check: bool = True) -> proc.Completed:
        """Run git in it, whatever the user's settings are."""
        names = ["-c", "user.name=ggufrq", "-c", "user.email=ggufrq@localhost", "-c", "gc.auto=0"]
        plain = ["-c", "core.autocrlf=false", "-c", "core.safecrlf=false", "-c", "commit.gpgSign=false"]
        env = {**NEUTRAL_GIT, "GIT_CEILING_DIRECTORIES": os.fspath(self.folder.resolve().parent)}
        return proc.run(["git", *names, *plain, *arguments], cwd=self.folder, env=env, check=check)

    def commits(self) -> list[tuple[str, str]]:
        """Hash and subject of the commits after the upstream's, the oldest first."""
        lines = self.git("log", "--reverse", "--format=%H %s", f"{BASE}..HEAD").stdout.splitlines()
        return [(line[:40], line[41:]) for line in lines]


def open_worktree(folder: Path) -> Worktree:
    """The work tree in ``folder``. Raises UsageError when ``import_to`` did not make it."""
    try:
        note = json.loads((folder / ".git" / _NOTE).read_text(encoding="utf-8"))
        pinned = note["commit"] == load_pin().commit
        return Worktree(folder, note["commit"], note["date"], pinned, note["source"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder} is no work tree of the patch set",
            remedy=f"ggufrq upstream import {folder} --source pin",
        ) from error


def import_to(folder: Path, upstream: Snapshot, root: Path) -> Worktree:
    """Make a work tree of an upstream with the patch set of ``root``, or go on with one that was begun.

    What the series and ``compat`` do not fit is merged by git. Raises PatchError, naming the files, when a
    person has to: what fits of that patch is in the work tree then, and the rest lies beside as ``.rej``.
    """
    if (folder / ".git" / _NOTE).is_file():
        work = open_worktree(folder)
        if work.commit != upstream.pin.commit:
            raise UsageError(
                f"{folder} is a work tree of llama.cpp {work.commit[:9]}", remedy="another folder"
            )
    else:
        work = _begin(folder, upstream, root)
    done = [subject for _, subject in work.commits()]
    for entry in entries(root, work.commit):
        if entry.name in done:
            continue
        if (folder / ".git" / _PENDING).is_file():
            _conclude(work, entry)
        else:
            _put(work, entry)
    (folder / ".git" / _COMPLETE).touch()
    return work


def is_complete(work: Worktree) -> bool:
    """Whether all patches were brought in, so that one that has no commit was taken out on purpose."""
    return (work.folder / ".git" / _COMPLETE).is_file()


@dataclass(frozen=True)
class Entry:
    """One commit of a work tree: a patch of the series, what fits it to another upstream, or both."""

    name: str
    patch: Patch | None
    fitting: Patch | None

    @property
    def header(self) -> str:
        """The body of the commit: that of the patch, also where something fits it to another upstream."""
        one = self.patch or self.fitting
        return one.header if one is not None else ""


def entries(root: Path, commit: str) -> list[Entry]:
    """The commits after that of the overlay, in order, for the patch set in ``root`` and an upstream."""
    beside = compat.folder(root, commit)
    found = {path.relative_to(beside).as_posix(): path for path in beside.rglob("*.patch")}
    fitting = {name: compat.read(name, path) for name, path in found.items()}
    overlay = compat.OVERLAY_PATCH
    first = [Entry(overlay, None, fitting[overlay])] if overlay in fitting else []
    return first + [Entry(patch.name, patch, fitting.get(patch.name)) for patch in series.load(root).patches]


def _begin(folder: Path, upstream: Snapshot, root: Path) -> Worktree:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not a work tree", remedy="an empty or new folder")
    folder.mkdir(parents=True, exist_ok=True)
    work = Worktree(folder, upstream.pin.commit, upstream.pin.date, upstream.pinned, upstream.source)
    work.git("init", "--quiet")
    (folder / ".git" / "info").mkdir(exist_ok=True)
    (folder / ".git" / "info" / "attributes").write_text("* -text\n")  # no attribute may change a byte
    for name, value in (("core.autocrlf", "false"), ("gc.auto", "0"), ("merge.conflictStyle", "diff3")):
        work.git("config", name, value)
    patch_set = series.load(root)
    if not upstream.pinned:
        work.git("checkout", "--quiet", "--orphan", PINNED)
        pin = load_pin()
        _commit_tree(work, pristine(pin), f"llama.cpp {pin.short}", pin.tree)
        _commit_overlay(work, patch_set)
        for patch in patch_set.patches:
            if git_apply(patch, folder).rc != 0:
                raise PatchError(
                    f"{patch.name} does not apply to the pinned llama.cpp", remedy="ggufrq build --check"
                )
            _commit(work, patch.name, patch.header)
    work.git("checkout", "--quiet", "--orphan", BRANCH)
    if not upstream.pinned:
        work.git("rm", "--quiet", "-r", "-f", ".")
    _commit_tree(work, upstream.tree, f"llama.cpp {upstream.pin.short}", upstream.pin.tree)
    work.git("tag", BASE)
    _commit_overlay(work, patch_set)
    note = {"commit": work.commit, "date": work.date, "source": work.source}
    paths.atomic_write(folder / ".git" / _NOTE, json.dumps(note) + "\n")
    return work


def _put(work: Worktree, entry: Entry) -> None:
    """Apply a patch of the series with what fits it to this upstream, and commit it; one that is left out
    there is an empty commit."""
    patch, fitting = entry.patch, entry.fitting
    if fitting is not None and compat.leaves_out(fitting):
        patch = fitting = None
    if patch is not None and fitting is not None:
        patch, fitting = compat.split(patch, fitting)
    failures: list[Failure] = []
    for one in (patch, fitting):
        if one is not None and one.files:
            failures += _apply(work, one)
    if failures:
        (work.folder / ".git" / _PENDING).touch()
        listing = "\n".join(f"  {failure}" for failure in failures)
        raise PatchError(
            f"{entry.name} does not fit llama.cpp {work.commit[:9]}, and git cannot merge it:\n{listing}",
            remedy=f"put what lies in {work.folder} as .rej where it belongs, remove the .rej files, then: "
            f"ggufrq upstream import {work.folder}",
        )
    _commit(work, entry.name, entry.header)


def _conclude(work: Worktree, entry: Entry) -> None:
    """Commit the patch that a person has just put in by hand."""
    left = [str(path.relative_to(work.folder)) for path in work.folder.rglob("*.rej")]
    if left:
        raise PatchError(
            f"hunks of {entry.name} that do not fit still lie in {', '.join(left)}",
            remedy="put them in by hand (or decide that they are not needed), and remove the .rej files",
        )
    _commit(work, entry.name, entry.header)
    (work.folder / ".git" / _PENDING).unlink()
    log.say(f"{entry.name}: committed as it is now")


def _apply(work: Worktree, patch: Patch) -> list[Failure]:
    """Apply a patch hunk by hunk; what does not fit is merged by git if that goes without conflict."""
    scratch = work.folder / ".git" / "scratch"
    paths.remove_tree(scratch)
    for changed in patch.files:
        if (work.folder / changed.file).is_file():
            (scratch / changed.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(work.folder / changed.file, scratch / changed.file)
    scratch.mkdir(exist_ok=True)
    failures = try_patch(patch, scratch).failures
    paths.remove_tree(scratch)
    left_out = {(failure.file, failure.hunk) for failure in failures if failure.hunk is not None}
    git_apply(patch.without(left_out), work.folder)
    if not failures:
        return []
    work.git("add", "--all", "--force")
    rest = patch.without(
        {
            (changed.file, hunk)
            for changed in patch.files
            for hunk in changed.hunks
            if (changed.file, hunk) not in left_out
        }
    )
    return [] if _merged(work, rest) else list(failures)


def _merged(work: Worktree, rest: Patch) -> bool:
    """Whether git merges these hunks without conflict, from the file before and after the patch in the pinned
    tree. If not, nothing is changed, and the hunks lie beside their files as ``.rej``."""
    tree = work.git("write-tree").stdout.strip()
    listed = work.git("log", "--format=%H %s", PINNED, "--", check=False).stdout.splitlines()
    commit = next((line[:40] for line in listed if line[41:] == rest.name), None)
    clean = commit is not None and all(_merge_file(work, changed.file, commit) for changed in rest.files)
    if not clean:
        work.git("read-tree", "--reset", "-u", tree)
        git_apply(rest, work.folder, "--reject")
    return clean


def _merge_file(work: Worktree, file: str, commit: str) -> bool:
    versions = []
    for name in (f"{commit}~:{file}", f"{commit}:{file}"):
        unpacked = work.git("unpack-file", name, check=False)
        if unpacked.rc != 0 or not (work.folder / file).is_file():
            return False
        versions.append(unpacked.stdout.strip())
    done = work.git("merge-file", "--quiet", file, *versions, check=False)
    for version in versions:
        (work.folder / version).unlink()
    return done.rc == 0


def _commit_tree(work: Worktree, tree: Path, subject: str, wanted: str) -> None:
    shutil.copytree(
        tree, work.folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git")
    )
    _commit(work, subject, "")
    if work.git("rev-parse", "HEAD^{tree}").stdout.strip() != wanted:
        raise PatchError(f"git committed other files than {tree} holds", remedy="another version of git")


def _commit_overlay(work: Worktree, patch_set: PatchSet) -> None:
    for name in patch_set.overlay:
        (work.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(patch_set.root / OVERLAY / name, work.folder / name)
    _commit(work, OVERLAY_SUBJECT, "")


def _commit(work: Worktree, subject: str, body: str) -> None:
    work.git("add", "--all", "--force")
    message = f"{subject}\n\n{body}" if body else subject
    work.git("commit", "--quiet", "--allow-empty", "--cleanup=verbatim", "-m", message)

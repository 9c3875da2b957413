"""Patches written anew from a work tree (``worktree``) after a fix, always the same bytes for the same
commits: those of the series from one of the pinned upstream, those of ``compat`` from one of another."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.base.errors import PatchError
from ggufrq.base.trees import tree_hash
from ggufrq.patchset import compat, series
from ggufrq.patchset.patches import apply, git_apply, try_patch
from ggufrq.patchset.series import OVERLAY, Hunk, Patch
from ggufrq.patchset.worktree import OVERLAY_SUBJECT, Worktree, entries, import_to, is_complete
from ggufrq.source.origins import NEUTRAL_GIT
from ggufrq.source.snapshot import Snapshot

_DIFF = ["--no-color", "--no-ext-diff", "--no-renames", "--unified=3", "--diff-algorithm=myers"]


@dataclass(frozen=True)
class Refreshed:
    """What a refresh writes below the patch set's folder: contents by name, None for a file that goes."""

    files: dict[str, bytes | None]

    def changed(self, root: Path) -> list[str]:
        """Names whose content in ``root`` is another."""
        return [name for name, content in sorted(self.files.items()) if _content(root / name) != content]

    def write(self, root: Path) -> list[str]:
        """Write what differs; returns the names."""
        changed = self.changed(root)
        for name in changed:
            content = self.files[name]
            if content is None:
                (root / name).unlink()
            else:
                paths.atomic_write(root / name, content)
        return changed


def refreshed_anew(upstream: Snapshot, root: Path) -> Refreshed:
    """What a refresh of the patch set as it is would write for an upstream. Raises as ``import_to``."""
    with tempfile.TemporaryDirectory(prefix="ggufrq-refresh-") as folder:
        work = import_to(Path(folder) / "work", upstream, root)
        return refreshed(work, upstream, root)


def refreshed(work: Worktree, upstream: Snapshot, root: Path, *, as_pin: bool = False) -> Refreshed:
    """What a work tree says, its fixup commits taken into the commits that they mend.

    ``as_pin``: as the series, whose pin is going to be this upstream; what fitted the old one to it goes.
    Raises PatchError when these conflict, when something is not committed, or when a commit is none of the
    patch set's; also when the result would not give the very files of the work tree again.
    """
    if not is_complete(work):
        raise PatchError(
            f"the import into {work.folder} stopped before its end",
            remedy=f"ggufrq upstream import {work.folder}",
        )
    if work.git("status", "--porcelain").stdout.strip():
        raise PatchError(
            f"{work.folder} has changes that are not committed",
            remedy=f"git -C {work.folder} commit --all --fixup COMMIT, the commit of their patch",
        )
    _squash(work)
    if as_pin and not work.pinned:
        beside = compat.folder(root, work.commit)
        gone = (path.relative_to(root).as_posix() for path in beside.rglob("*.patch"))
        files = {**dict.fromkeys(gone), **_series_files(work, root)}
    else:
        files = _series_files(work, root) if work.pinned else _compat_files(work, root)
    found = Refreshed(files)
    _verify(work, upstream, root, found)
    return found


def _squash(work: Worktree) -> None:
    if not any(subject.startswith(("fixup!", "squash!", "amend!")) for _, subject in work.commits()):
        return
    editor = ["-c", "sequence.editor=true", "-c", "core.editor=true"]
    done = work.git(
        *editor, "rebase", "--quiet", "--interactive", "--autosquash", "--keep-empty", "base", check=False
    )
    if done.rc != 0:
        raise PatchError(
            f"the fixup commits in {work.folder} conflict with later patches",
            remedy=f"solve them there, git rebase --continue, then: ggufrq upstream refresh {work.folder}",
        )


def _series_files(work: Worktree, root: Path) -> dict[str, bytes | None]:
    """The series and the overlay as the work tree has them."""
    files: dict[str, bytes | None] = {}
    (overlay, subject), *patches = work.commits() or [("", "")]
    if subject != OVERLAY_SUBJECT:
        raise _unknown(work, subject)
    for name in series.load(root).overlay:
        files[f"{OVERLAY}/{name}"] = None
    names = work.git("diff", "--name-only", "-z", f"{overlay}~", overlay).stdout.split("\0")
    for name in filter(None, names):
        files[f"{OVERLAY}/{name}"] = _blob(work, f"{overlay}:{name}")
    old = {patch.name for patch in series.load(root).patches}
    files |= dict.fromkeys(old)
    for commit, name in patches:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+\.patch", name):
            raise _unknown(work, name)
        diff = work.git("-c", "core.abbrev=7", "diff", *_DIFF, f"{commit}~", commit).stdout
        files[name] = f"{_body(work, commit)}\n\n{diff}".encode()
    new = [name for _, name in patches]
    if set(new) != old or new != [patch.name for patch in series.load(root).patches]:
        comments = [
            line
            for line in (root / "series").read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        ]
        files["series"] = "".join(f"{line}\n" for line in [*comments, *new]).encode()
    return files


def _compat_files(work: Worktree, root: Path) -> dict[str, bytes | None]:
    """What fits the series to the upstream of the work tree."""
    beside = compat.folder(root, work.commit).relative_to(root).as_posix()
    known = {entry.name: entry for entry in entries(root, work.commit)}
    files: dict[str, bytes | None] = {
        f"{beside}/{name}": None for name, entry in known.items() if entry.fitting is not None
    }
    (_, subject), *patches = work.commits() or [("", "")]
    if subject != OVERLAY_SUBJECT:
        raise _unknown(work, subject)
    for commit, name in patches:
        patch = known[name].patch if name in known else None
        if patch is None and name != compat.OVERLAY_PATCH:
            raise _unknown(work, name)
        fitting = known[name].fitting if name in known else None
        words = fitting.header if fitting is not None else "" if patch is not None else _body(work, commit)
        own = compat.own_words(words)
        if compat.backend_of(name) and work.git("diff", "--quiet", f"{commit}~", commit, check=False).rc == 0:
            files[f"{beside}/{name}"] = compat.without(name, work.commit, work.date, own).encode()
            continue
        left_out, diff = _rest(work, commit, patch)
        if left_out or diff:
            header = compat.header(name, left_out, work.commit, work.date, own)
            files[f"{beside}/{name}"] = f"{header}\n{chr(10) * bool(diff)}{diff}".encode()
    return files


def _rest(work: Worktree, commit: str, patch: Patch | None) -> tuple[list[tuple[str, Hunk]], str]:
    """Hunks of ``patch`` that are left out in this commit, and what the commit does beside the others."""
    changed = set(
        filter(None, work.git("diff", "--name-only", "-z", f"{commit}~", commit).stdout.split("\0"))
    )
    changed |= {one.file for one in patch.files} if patch is not None else set()
    with tempfile.TemporaryDirectory(prefix="ggufrq-refresh-") as name:
        folder = Path(name).resolve()
        trial, before, after = folder / "trial", folder / "a", folder / "b"
        for target, of in ((trial, f"{commit}~"), (before, f"{commit}~"), (after, commit)):
            target.mkdir()
            for file in changed:
                content = _blob(work, f"{of}:{file}")
                if content is not None:
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    (target / file).write_bytes(content)
        left_out: list[tuple[str, Hunk]] = []
        if patch is not None:
            failures = try_patch(patch, trial).failures
            gone = {failure.file for failure in failures if failure.hunk is None}
            failed = {(failure.file, failure.hunk.key) for failure in failures if failure.hunk is not None}
            left_out = [
                (one.file, hunk)
                for one in patch.files
                for hunk in one.hunks
                if (one.file, hunk.key) in failed or one.file in gone
            ]
            if git_apply(patch.without(set(left_out)), before).rc != 0 and len(left_out) < patch.hunks:
                raise PatchError(
                    f"{patch.name} does not apply to {work.folder} without the hunks that do not fit"
                )
        command = ["git", "-c", "core.abbrev=7", "diff", "--no-index", "--no-prefix", *_DIFF, "a", "b"]
        diff = proc.run(command, cwd=folder, env=NEUTRAL_GIT, check=False).stdout
    return left_out, diff


def _verify(work: Worktree, upstream: Snapshot, root: Path, found: Refreshed) -> None:
    """Apply what would be written, and compare with the work tree."""
    with tempfile.TemporaryDirectory(prefix="ggufrq-refresh-") as name:
        patches, tree = Path(name) / "patches", Path(name) / "tree"
        shutil.copytree(root, patches)
        found.write(patches)
        shutil.copytree(upstream.tree, tree, symlinks=True)
        apply(compat.load(patches, work.commit), tree, what=f"llama.cpp {work.commit[:9]}")
        if tree_hash(tree) != work.git("rev-parse", "HEAD^{tree}").stdout.strip():
            raise PatchError(f"the patches made from {work.folder} do not give the files that it has")


def _blob(work: Worktree, name: str) -> bytes | None:
    """Content of a file in a commit (``COMMIT:PATH``), None when it is not there."""
    unpacked = work.git("unpack-file", name, check=False)
    if unpacked.rc != 0:
        return None
    path = work.folder / unpacked.stdout.strip()
    content = path.read_bytes()
    path.unlink()
    return content


def _body(work: Worktree, commit: str) -> str:
    return work.git("log", "-1", "--format=%b", commit).stdout.strip()


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _unknown(work: Worktree, subject: str) -> PatchError:
    return PatchError(
        f"the commit '{subject}' in {work.folder} is none of the patch set's",
        remedy="make it a fixup of one (git commit --fixup COMMIT); the subject of a new patch is its name, "
        "as core/x.patch",
    )

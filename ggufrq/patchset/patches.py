"""The patch set: a series of small hooks and an overlay of our own source files.

``series`` lists the patches in order; ``overlay/`` mirrors the upstream tree and is copied in first, never
over an existing file. Patches apply without fuzz. They are tried on a scratch copy of the files they touch
before anything is written, so that a tree is either patched whole or not touched.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import PatchError, ToolError
from ggufrq.patchset.series import OVERLAY, FilePatch, Hunk, Patch, PatchSet
from ggufrq.source.origins import NEUTRAL_GIT


@dataclass(frozen=True)
class Failure:
    """A place where a patch does not apply. ``hunk`` is None when the whole file is missing or taken."""

    patch: str
    file: str
    hunk: Hunk | None
    hunks: int
    reason: str

    def __str__(self) -> str:
        if self.hunk is None:
            return f"{self.patch}: {self.file}: {self.reason}"
        context = f", in '{self.hunk.context}'" if self.hunk.context else ""
        place = f"hunk {self.hunk.number} of {self.hunks} (line {self.hunk.line}{context})"
        return f"{self.patch}: {self.file}, {place}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Fit:
    """How a patch set fits a tree: where it does not, and which hunks fit at another line than recorded."""

    failures: tuple[Failure, ...] = ()
    moved: tuple[str, ...] = field(default=())


def fit(patch_set: PatchSet, tree: Path) -> Fit:
    """Try the patch set on a copy of the files it touches. All places that fail are found at once.

    A hunk may move with its function, as it does on a later upstream. One that would land in another
    function, where the same lines happen to stand, is a failure; git alone would apply it there.
    """
    found = [
        Failure(OVERLAY, name, None, 0, "exists in the source already; an overlay file never replaces one")
        for name in patch_set.overlay
        if (tree / name).exists()
    ]
    moved: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ggufrq-check-") as scratch_name:
        scratch = Path(scratch_name).resolve()
        _copy_files(patch_set.files, tree, scratch)
        _copy_files(patch_set.files, patch_set.root / OVERLAY, scratch)
        for patch in patch_set.patches:
            here = try_patch(patch, scratch)
            if here.failures and _holds_already(patch, tree):
                file = here.failures[0].file
                here = Fit((Failure(patch.name, file, None, 0, "the source holds this patch already"),))
            found += here.failures
            moved += here.moved
    return Fit(tuple(found), tuple(moved))


def try_patch(patch: Patch, tree: Path) -> Fit:
    """Apply what fits of one patch to ``tree``, and tell what does not: a hunk that does not apply (git
    leaves it beside the file, ``.rej``), and one that git applied in another function than its own."""
    before = {changed.file: _lines(tree / changed.file) for changed in patch.files}
    completed = git_apply(patch, tree, "--reject")
    found = list(_failures_of(patch, completed.stderr))
    if completed.rc != 0 and not found:
        raise PatchError(f"{patch.name} does not apply: {_last_lines(completed.stderr)}")
    moved: list[str] = []
    for changed, hunk, line in _moved(patch, completed.stderr):
        function = function_of(before[changed.file], line)
        if hunk.context and not function.startswith(hunk.context):
            reason = f"its lines stand in '{function}' only"
            found.append(Failure(patch.name, changed.file, hunk, len(changed.hunks), reason))
        else:
            moved.append(f"{patch.name}: {changed.file}, hunk {hunk.number}, now at line {line}")
    return Fit(tuple(found), tuple(moved))


def function_of(lines: list[str], line: int) -> str:
    """What git writes after ``@@`` for a hunk that begins at ``line`` (from 1): the nearest line above that
    begins with a letter, ``_`` or ``$``.
    """
    for text in reversed(lines[: max(0, line - 1)]):
        if text[:1].isalpha() or text[:1] in ("_", "$"):
            return text.rstrip()
    return ""


def require_applies(patch_set: PatchSet, tree: Path, *, what: str) -> Fit:
    """How the patch set fits ``tree``, which ``what`` describes.

    Raises PatchError naming every patch, file and hunk that does not apply.
    """
    found = fit(patch_set, tree)
    if not found.failures:
        return found
    count = f"{len(found.failures)} places" if len(found.failures) > 1 else "one place"
    listing = "\n".join(f"  {failure}" for failure in found.failures)
    raise PatchError(
        f"the patch set does not apply to {what}, in {count}:\n{listing}",
        remedy="ggufrq build --source auto, which takes the llama.cpp that the patches are made for",
    )


def apply(patch_set: PatchSet, tree: Path, *, what: str) -> None:
    """Copy the overlay into ``tree`` and apply the patches.

    Raises PatchError before anything is written when any of it does not fit.
    """
    require_applies(patch_set, tree, what=what)
    for name in patch_set.overlay:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(patch_set.root / OVERLAY / name, target)
    for patch in patch_set.patches:
        completed = git_apply(patch, tree)
        if completed.rc != 0:
            raise PatchError(f"{patch.name} does not apply to {what}: {_last_lines(completed.stderr)}")


def _holds_already(patch: Patch, tree: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="ggufrq-check-") as scratch:
        _copy_files([changed.file for changed in patch.files], tree, Path(scratch))
        return git_apply(patch, Path(scratch), "--reverse", "--check").rc == 0


def _copy_files(files: Iterable[str], tree: Path, target: Path) -> None:
    for file in files:
        if (tree / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / file, target / file)


def git_apply(patch: Patch, tree: Path, *options: str) -> proc.Completed:
    """``git apply`` of a patch in the folder ``tree``, whatever its exit status."""
    # A repository further up would make git silently skip files outside its idea of the current folder.
    env = {**NEUTRAL_GIT, "GIT_CEILING_DIRECTORIES": os.fspath(tree.resolve().parent)}
    command = ["git", "-c", "core.autocrlf=false", "apply", "--verbose", "--whitespace=nowarn", *options]
    try:
        with tempfile.TemporaryDirectory(prefix="ggufrq-patch-") as folder:
            path = patch.path.resolve()
            if patch.reduced:
                path = Path(folder).resolve() / path.name
                path.write_bytes(patch.content)
            return proc.run([*command, path], cwd=tree, env=env, check=False)
    except ToolError as error:
        raise PatchError(
            "git is not there; it is needed to apply the patches", remedy="ggufrq doctor"
        ) from error


def _failures_of(patch: Patch, output: str) -> Iterator[Failure]:
    """Turn the output of ``git apply --verbose --reject`` into failures."""
    by_name = {changed.file: changed for changed in patch.files}
    for line in output.splitlines():
        missing = re.match(r"error: (.+): (No such file or directory|does not exist in .*)$", line)
        if missing and missing[1] in by_name:
            yield Failure(
                patch.name, missing[1], None, len(by_name[missing[1]].hunks), "no such file in the source"
            )
        failed = re.match(r"error: patch failed: (.+):(\d+)$", line)
        if failed and failed[1] in by_name:
            hunks = by_name[failed[1]].hunks
            hunk = next((hunk for hunk in hunks if hunk.line == int(failed[2])), None)
            reason = "" if hunk else f"does not fit at line {failed[2]}"
            yield Failure(patch.name, failed[1], hunk, len(hunks), reason)
        corrupt = re.match(r"error: (corrupt patch at .*|patch fragment without header.*)$", line)
        if corrupt:
            yield Failure(patch.name, patch.files[0].file, None, 0, corrupt[1])


def _moved(patch: Patch, output: str) -> Iterator[tuple[FilePatch, Hunk, int]]:
    """Hunks that git applied at another line than theirs, with that line (as it was before this patch)."""
    by_name = {changed.file: changed for changed in patch.files}
    current: FilePatch | None = None
    for text in output.splitlines():
        checking = re.match(r"Checking patch (.+)\.\.\.$", text)
        if checking:
            current = by_name.get(checking[1])
        went = re.match(r"Hunk #(\d+) succeeded at (\d+) \(offset -?\d+ lines?\)", text)
        if went and current is not None:
            number = int(went[1])
            grown = sum(hunk.grows for hunk in current.hunks[: number - 1])
            yield current, current.hunks[number - 1], int(went[2]) - grown


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-4:])

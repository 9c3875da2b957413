"""The patch set: a series of small hooks and an overlay of our own source files.

``series`` lists the patches in order; ``overlay/`` mirrors the upstream tree and is copied in first, never
over an existing file. Patches apply without fuzz. They are tried on a scratch copy of the files they touch
before anything is written, so that a tree is either patched whole or not touched.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ggufrq import paths, proc
from ggufrq.errors import PatchError, ToolError
from ggufrq.source import NEUTRAL_GIT

_SERIES = "series"
_OVERLAY = "overlay"
_JUNK = {".DS_Store", "__pycache__", "Thumbs.db"}
_JUNK_SUFFIXES = (".orig", ".rej", ".pyc", "~", ".swp")

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)$")


@dataclass(frozen=True)
class Hunk:
    """One hunk: its number in its file from 1, the first line it expects there, and the text after ``@@``."""

    number: int
    line: int
    context: str


@dataclass(frozen=True)
class FilePatch:
    """What a patch does to one file."""

    file: str
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    """One patch of the series: its name there, where it is, why it is (its header), and the files it
    changes.
    """

    name: str
    path: Path
    header: str
    files: tuple[FilePatch, ...]


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
        return f"{self.patch}: {self.file}, {place}"


@dataclass(frozen=True)
class PatchSet:
    """A loaded patch set. ``overlay`` holds paths relative to the overlay folder, with forward slashes."""

    root: Path
    patches: tuple[Patch, ...]
    overlay: tuple[str, ...]
    hash: str = field(default="")

    @property
    def files(self) -> list[str]:
        """Upstream files that the patches change, sorted."""
        return sorted({changed.file for patch in self.patches for changed in patch.files})

    @property
    def hunks(self) -> int:
        """Number of hunks of all patches."""
        return sum(len(changed.hunks) for patch in self.patches for changed in patch.files)


def default_patch_set() -> PatchSet:
    """The patch set that comes with ggufrq. Raises PatchError when it is malformed."""
    return load(paths.data_dir("patches"))


def load(root: Path) -> PatchSet:
    """Read a patch set. A missing ``series`` or ``overlay`` counts as empty.

    Raises PatchError when a listed patch is missing, listed twice or malformed.
    """
    names = _series(root)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PatchError(f"{root / _SERIES} lists {', '.join(twice)} twice", remedy="remove one of the lines")
    patches = []
    for name in names:
        path = root / name
        if not path.is_file():
            raise PatchError(
                f"{root / _SERIES} lists {name}, which is not there", remedy="add the file or remove the line"
            )
        patches.append(parse(name, path))
    overlay = tuple(sorted(_overlay_files(root / _OVERLAY)))
    digest = hashlib.sha256()
    contents = [(_SERIES, "\n".join(names).encode())]  # only the order counts: a new comment rebuilds nothing
    contents += [(name, (root / name).read_bytes()) for name in sorted(names)]
    contents += [(f"{_OVERLAY}/{name}", (root / _OVERLAY / name).read_bytes()) for name in overlay]
    for name, content in contents:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return PatchSet(root, tuple(patches), overlay, digest.hexdigest())


def problems(root: Path) -> list[str]:
    """Everything wrong with a patch set that can be told without a source tree, one sentence each."""
    found: list[str] = []
    names = _series(root)
    found += [
        f"series lists {name} twice" for name in sorted({name for name in names if names.count(name) > 1})
    ]
    for name in dict.fromkeys(names):
        path = root / name
        if not path.is_file():
            found.append(f"series lists {name}, which is not there")
            continue
        try:
            patch = parse(name, path)
        except PatchError as error:
            found.append(error.message)
            continue
        if not patch.header.strip():
            found.append(f"{name} has no header that says what it does and why")
    listed = set(names)
    for path in sorted(root.rglob("*.patch")):
        name = path.relative_to(root).as_posix()
        if name not in listed and not name.startswith(f"{_OVERLAY}/"):
            found.append(f"{name} is not listed in series")
    return found


def parse(name: str, path: Path) -> Patch:
    """Read one patch and check that every hunk holds as many lines as it says.

    Raises PatchError, naming file and line, when it is malformed or creates, deletes or renames a file (new
    files belong into the overlay).
    """
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    lines = text.split("\n")
    header: list[str] = []
    files: list[FilePatch] = []
    hunks: list[Hunk] = []
    target: str | None = None
    index = 0

    def malformed(reason: str) -> PatchError:
        return PatchError(
            f"{name}, line {index + 1}: {reason}", remedy=f"make the patch anew with git diff ({path})"
        )

    while index < len(lines):
        line = lines[index]
        if line.startswith(("new file mode", "deleted file mode", "rename from", "copy from")):
            raise malformed("a patch may only change existing files; new ones belong into patches/overlay")
        if line.startswith(("GIT binary patch", "Binary files ")):
            raise malformed("binary changes cannot be reviewed")
        if line.startswith("--- ") and index + 1 < len(lines) and lines[index + 1].startswith("+++ "):
            old, new = (_stripped(lines[index + k][4:]) for k in (0, 1))
            if old != new or new is None:
                raise malformed(f"a patch may only change existing files, not turn {old} into {new}")
            if target is not None:
                files.append(FilePatch(target, tuple(hunks)))
            target, hunks = new, []
            index += 2
            continue
        match = _HUNK.match(line)
        if match is None:
            if target is None:
                header.append(line)
            index += 1
            continue
        if target is None:
            raise malformed("a hunk before any file name")
        hunks.append(Hunk(len(hunks) + 1, int(match[1]), match[5].strip()))
        old_left, new_left = int(match[2] or 1), int(match[4] or 1)
        index += 1
        while old_left > 0 or new_left > 0:
            kind = lines[index][:1] if index < len(lines) else "end"
            if kind not in ("", " ", "+", "-", "\\") or (kind == "" and index == len(lines) - 1):
                raise malformed(f"hunk {len(hunks)} of {target} ends too early")
            old_left -= kind in ("", " ", "-")
            new_left -= kind in ("", " ", "+")
            index += 1
        if old_left < 0 or new_left < 0:
            raise malformed(f"hunk {len(hunks)} of {target} holds other lines than its header says")
    if target is None:
        raise malformed("changes no file")
    files.append(FilePatch(target, tuple(hunks)))
    empty = [changed.file for changed in files if not changed.hunks]
    if empty:
        raise malformed(f"has no hunk for {empty[0]}")
    prose = [line for line in header if not line.startswith(("diff --git", "index "))]
    return Patch(name, path, "\n".join(prose).strip(), tuple(files))


def failures(patch_set: PatchSet, tree: Path) -> list[Failure]:
    """Where the patch set does not apply to ``tree``, all places at once; empty when it applies. Writes
    nothing there.
    """
    taken = [
        Failure(_OVERLAY, name, None, 0, "exists in the source already; an overlay file never replaces one")
        for name in patch_set.overlay
        if (tree / name).exists()
    ]
    found: list[Failure] = []
    with tempfile.TemporaryDirectory(prefix="ggufrq-check-") as scratch_name:
        scratch = Path(scratch_name).resolve()
        _copy_files(patch_set.files, tree, scratch)
        for patch in patch_set.patches:
            completed = _git_apply(patch, scratch, "--reject")
            here = list(_failures_of(patch, completed.stderr))
            if completed.rc != 0 and not here:
                raise PatchError(f"{patch.name} does not apply: {_last_lines(completed.stderr)}")
            if here and _holds_already(patch, tree):
                here = [Failure(patch.name, here[0].file, None, 0, "the source holds this patch already")]
            found += here
    return taken + found


def require_applies(patch_set: PatchSet, tree: Path, *, what: str) -> None:
    """Raise PatchError, naming every patch, file and hunk that does not apply to ``tree``, which ``what``
    describes.
    """
    found = failures(patch_set, tree)
    if not found:
        return
    count = f"{len(found)} places" if len(found) > 1 else "one place"
    listing = "\n".join(f"  {failure}" for failure in found)
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
        shutil.copyfile(patch_set.root / _OVERLAY / name, target)
    for patch in patch_set.patches:
        completed = _git_apply(patch, tree)
        if completed.rc != 0:
            raise PatchError(f"{patch.name} does not apply to {what}: {_last_lines(completed.stderr)}")


def _holds_already(patch: Patch, tree: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="ggufrq-check-") as scratch:
        _copy_files([changed.file for changed in patch.files], tree, Path(scratch))
        return _git_apply(patch, Path(scratch), "--reverse", "--check").rc == 0


def _copy_files(files: Iterable[str], tree: Path, target: Path) -> None:
    for file in files:
        if (tree / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / file, target / file)


def _git_apply(patch: Patch, tree: Path, *options: str) -> proc.Completed:
    # A repository further up would make git silently skip files outside its idea of the current folder.
    env = {**NEUTRAL_GIT, "GIT_CEILING_DIRECTORIES": os.fspath(tree.resolve().parent)}
    command = ["git", "-c", "core.autocrlf=false", "apply", "--verbose", "--whitespace=nowarn", *options]
    try:
        return proc.run([*command, patch.path.resolve()], cwd=tree, env=env, check=False)
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
            yield Failure(patch.name, failed[1], hunk, len(hunks), f"does not fit at line {failed[2]}")
        corrupt = re.match(r"error: (corrupt patch at .*|patch fragment without header.*)$", line)
        if corrupt:
            yield Failure(patch.name, patch.files[0].file, None, 0, corrupt[1])


def _series(root: Path) -> list[str]:
    """Names in the series, comments and blank lines left out; names that leave the folder are refused."""
    path = root / _SERIES
    if not path.is_file():
        return []
    names = []
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name = raw.split("#", 1)[0].strip()
        if not name:
            continue
        if (
            PurePosixPath(name).is_absolute()
            or ".." in PurePosixPath(name).parts
            or not name.endswith(".patch")
        ):
            raise PatchError(f"{path}, line {number}: '{name}' is not the path of a .patch file below {root}")
        names.append(name)
    return names


def _overlay_files(overlay: Path) -> Iterator[str]:
    for path in overlay.rglob("*"):
        relative = path.relative_to(overlay)
        if (
            path.is_file()
            and not _JUNK.intersection(relative.parts)
            and not path.name.endswith(_JUNK_SUFFIXES)
        ):
            yield relative.as_posix()


def _stripped(name: str) -> str | None:
    """``a/src/x.c`` -> ``src/x.c``; None for /dev/null. A trailing tab and date are dropped."""
    name = name.split("\t")[0].strip()
    if name == "/dev/null":
        return None
    _, slash, rest = name.partition("/")
    return rest if slash else name


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-4:])

"""The patch set as it lies in its folder: series, patches parsed, overlay, and the hash of it all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ggufrq.base import paths
from ggufrq.base.errors import PatchError

_SERIES = "series"
OVERLAY = "overlay"
#: Patches that fit the series to other upstreams than the pinned one, see ``compat``.
COMPAT = "compat"
#: Folders of patches that are for one backend alone; what other folders hold is for all.
BACKENDS = ("cpu", "cuda", "metal", "vulkan")
_JUNK = {".DS_Store", "__pycache__", "Thumbs.db"}
_JUNK_SUFFIXES = (".orig", ".rej", ".pyc", "~", ".swp")

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)$")


@dataclass(frozen=True)
class Hunk:
    """One hunk: its number in its file from 1, the first line it expects there, the text after ``@@`` (the
    function it lies in), by how many lines the file grows, and its text.
    """

    number: int
    line: int
    context: str
    grows: int = 0
    lines: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def key(self) -> str:
        """Eight hex digits of what it changes in which function, whatever lines stand around it."""
        changes = [self.context, *(line for line in self.lines[1:] if line[:1] in "+-")]
        return hashlib.sha256("\n".join(changes).encode("utf-8", "surrogateescape")).hexdigest()[:8]


@dataclass(frozen=True)
class FilePatch:
    """What a patch does to one file."""

    file: str
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    """One patch of the series: its name there, where it is, why it is (its header), and the files it
    changes. ``reduced``: hunks of the file at ``path`` were left out, see ``without``.
    """

    name: str
    path: Path
    header: str
    files: tuple[FilePatch, ...]
    reduced: bool = False

    @property
    def hunks(self) -> int:
        """Number of hunks."""
        return sum(len(changed.hunks) for changed in self.files)

    @property
    def content(self) -> bytes:
        """What git is to apply."""
        if not self.reduced:
            return self.path.read_bytes()
        lines: list[str] = []
        for changed in self.files:
            lines += [f"diff --git a/{changed.file} b/{changed.file}"]
            lines += [f"--- a/{changed.file}", f"+++ b/{changed.file}"]
            lines += [line for hunk in changed.hunks for line in hunk.lines]
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")

    def without(self, left_out: Collection[tuple[str, Hunk]]) -> Patch:
        """The patch without these hunks, each with its file."""
        if not left_out:
            return self
        files = (
            FilePatch(
                changed.file, tuple(hunk for hunk in changed.hunks if (changed.file, hunk) not in left_out)
            )
            for changed in self.files
        )
        return replace(self, files=tuple(changed for changed in files if changed.hunks), reduced=True)


@dataclass(frozen=True)
class PatchSet:
    """A loaded patch set. ``overlay`` holds paths relative to the overlay folder, with forward slashes.
    ``without``: backends whose patch is left out, see ``compat``.
    """

    root: Path
    patches: tuple[Patch, ...]
    overlay: tuple[str, ...]
    hash: str = field(default="")
    without: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """Upstream files that the patches change, sorted."""
        return sorted({changed.file for patch in self.patches for changed in patch.files})

    @property
    def hunks(self) -> int:
        """Number of hunks of all patches."""
        return sum(patch.hunks for patch in self.patches)


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
    overlay = tuple(sorted(_overlay_files(root / OVERLAY)))
    digest = hashlib.sha256()
    contents = [(_SERIES, "\n".join(names).encode())]  # only the order counts: a new comment rebuilds nothing
    contents += [(name, (root / name).read_bytes()) for name in sorted(names)]
    contents += [(f"{OVERLAY}/{name}", (root / OVERLAY / name).read_bytes()) for name in overlay]
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
        if name not in listed and not name.startswith((f"{OVERLAY}/", f"{COMPAT}/")):
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
        old_left, new_left = int(match[2] or 1), int(match[4] or 1)
        first, grows = index, new_left - old_left
        index += 1
        while old_left > 0 or new_left > 0:
            kind = lines[index][:1] if index < len(lines) else "end"
            if kind not in ("", " ", "+", "-", "\\") or (kind == "" and index == len(lines) - 1):
                raise malformed(f"hunk {len(hunks) + 1} of {target} ends too early")
            old_left -= kind in ("", " ", "-")
            new_left -= kind in ("", " ", "+")
            index += 1
        if old_left < 0 or new_left < 0:
            raise malformed(f"hunk {len(hunks) + 1} of {target} holds other lines than its header says")
        while index < len(lines) and lines[index].startswith("\\"):  # no newline at the end of the file
            index += 1
        body = tuple(lines[first:index])
        hunks.append(Hunk(len(hunks) + 1, int(match[1]), match[5].strip(), grows, body))
    if target is None:
        raise malformed("changes no file")
    files.append(FilePatch(target, tuple(hunks)))
    empty = [changed.file for changed in files if not changed.hunks]
    if empty:
        raise malformed(f"has no hunk for {empty[0]}")
    prose = [line for line in header if not line.startswith(("diff --git", "index "))]
    return Patch(name, path, "\n".join(prose).strip(), tuple(files))


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

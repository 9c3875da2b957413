"""The series fitted to an upstream that is not the pinned one.

``patches/compat/<nine digits of the commit>/core/x.patch`` holds what ``core/x.patch`` takes to fit that
upstream, and no more: its header names the hunks that are left out there, one a line (``Instead of: FILE
KEY``, the key being ``Hunk.key``), and its own hunks, if any, are applied after what is left of
``core/x.patch``. So the series can go on changing: only a change of a hunk that is named makes it stale.
The line ``Without: metal/x.patch`` leaves the whole patch of a backend out, which is not offered there.
``overlay.patch`` changes files of the overlay. ``ggufrq upstream refresh`` writes all of them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from ggufrq.base.errors import PatchError
from ggufrq.patchset.series import BACKENDS, COMPAT, Hunk, Patch, PatchSet, parse
from ggufrq.patchset.series import load as load_series

#: Name of the patch that changes files of the overlay; applied first.
OVERLAY_PATCH = "overlay.patch"
_INSTEAD = re.compile(r"^Instead of: (\S+) ([0-9a-f]{8})$", re.MULTILINE)
_WITHOUT = re.compile(r"^Without: (\S+)$", re.MULTILINE)


def folder(root: Path, commit: str) -> Path:
    """Where the patches that fit the patch set in ``root`` to an upstream commit are, or would be."""
    return root / COMPAT / commit[:9]


def load(root: Path, commit: str) -> PatchSet:
    """The patch set in ``root`` as it is for an upstream commit: as it is, where nothing fits it to that.

    Raises PatchError when it is malformed, or made for hunks that the series no longer has.
    """
    base = load_series(root)
    found = {
        path.relative_to(folder(root, commit)).as_posix(): path
        for path in sorted(folder(root, commit).rglob("*.patch"))
    }
    if not found:
        return base
    patches = [read(OVERLAY_PATCH, found[OVERLAY_PATCH])] if OVERLAY_PATCH in found else []
    without = []
    for patch in base.patches:
        if patch.name not in found:
            patches.append(patch)
            continue
        fitting = read(patch.name, found[patch.name])
        if leaves_out(fitting):
            without.append(backend_of(patch.name))
            continue
        hunks, lost = _named(patch, fitting)
        if lost:
            raise PatchError(
                f"{COMPAT}/{commit[:9]}/{patch.name} stands in for hunks of {patch.name} in "
                f"{', '.join(sorted({file for file, _ in lost}))} that have changed since",
                remedy="ggufrq upstream import DIR --source …, then ggufrq upstream refresh DIR",
            )
        patches += [patch.without(hunks), replace(fitting, name=f"{COMPAT}/{commit[:9]}/{patch.name}")]
    unknown = set(found) - {patch.name for patch in base.patches} - {OVERLAY_PATCH}
    if unknown:
        name = min(unknown)
        raise PatchError(
            f"{COMPAT}/{commit[:9]}/{name} fits no patch of the series", remedy=f"remove {found[name]}"
        )
    digest = hashlib.sha256(base.hash.encode())
    for name, path in found.items():
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    kept = tuple(patch for patch in patches if patch.files)
    return PatchSet(root, kept, base.overlay, digest.hexdigest(), tuple(dict.fromkeys(without)))


def problems(root: Path) -> list[str]:
    """What is wrong with the folders of ``compat``, as far as that can be told without a source tree."""
    wrong = []
    for path in sorted((root / COMPAT).rglob("*.patch")):
        name = path.relative_to(root).as_posix()
        try:
            patch = read(path.relative_to(root / COMPAT).as_posix().partition("/")[2], path)
            if not patch.header:
                wrong.append(f"{name} has no header that says what it stands in for")
            leaves_out(patch)
        except PatchError as error:
            wrong.append(error.message)
    return wrong


def read(name: str, path: Path) -> Patch:
    """A patch of ``compat``; unlike those of the series it may have no hunks. Raises PatchError."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if not re.search(r"^--- ", text, re.MULTILINE):
        return Patch(name, path, text.strip(), ())
    return parse(name, path)


def backend_of(name: str) -> str:
    """The backend that a patch is for, empty where it is for all: Metal's is ``metal/x.patch``."""
    first = name.partition("/")[0]
    return first if first in BACKENDS else ""


def fitted(root: Path, commit: str) -> list[str]:
    """Names of what fits the patch set in ``root`` to an upstream commit, sorted; not of what only leaves
    the patch of a backend out."""
    beside = folder(root, commit)
    names = ((path.relative_to(beside).as_posix(), path) for path in sorted(beside.rglob("*.patch")))
    return [name for name, path in names if not leaves_out(read(name, path))]


def leaves_out(fitting: Patch) -> bool:
    """Whether it says that its patch is left out as a whole. Raises PatchError where it says so of another
    patch, or of one that is for all backends, or has hunks all the same."""
    named = _WITHOUT.findall(fitting.header)
    own = named == [fitting.name] and backend_of(fitting.name)
    if named and (not own or fitting.files or _INSTEAD.search(fitting.header)):
        raise PatchError(
            f"{fitting.path} says 'Without: {', '.join(named)}', which is only for the patch of a backend, "
            "under its own name, and without hunks",
            remedy="ggufrq upstream import DIR --source …, then ggufrq upstream refresh DIR",
        )
    return bool(named)


def split(patch: Patch, fitting: Patch) -> tuple[Patch, Patch]:
    """What of ``patch`` and of the patch that fits it is still good, when the series may have changed: files
    with a hunk that is no longer there are taken from ``patch`` alone."""
    hunks, lost = _named(patch, fitting)
    redone = {file for file, _ in lost}
    kept = {
        (changed.file, hunk) for changed in fitting.files for hunk in changed.hunks if changed.file in redone
    }
    return patch.without({one for one in hunks if one[0] not in redone}), fitting.without(kept)


def header(name: str, left_out: list[tuple[str, Hunk]], commit: str, date: str, own: str = "") -> str:
    """The header of what fits the patch ``name``: its own words, or a sentence, and the hunks left out."""
    lines = [own or f"Fit {name} to llama.cpp {commit[:9]} ({date})"]
    if left_out:
        lines += ["", *dict.fromkeys(f"Instead of: {file} {hunk.key}" for file, hunk in left_out)]
    return "\n".join(lines)


def without(name: str, commit: str, date: str, own: str = "") -> str:
    """The text that leaves the patch ``name`` out: its own words, or a sentence, and the line for it."""
    return f"{own or f'{name} is left out of llama.cpp {commit[:9]} ({date})'}\n\nWithout: {name}\n"


def own_words(text: str) -> str:
    """A header without the hunks or the patch that it names."""
    return _WITHOUT.sub("", _INSTEAD.sub("", text)).strip()


def _named(patch: Patch, fitting: Patch) -> tuple[set[tuple[str, Hunk]], set[tuple[str, str]]]:
    """Hunks of ``patch`` that ``fitting`` names, and those it names that are not there. Hunks that put the
    same lines into functions of the same name have one key, which names all of them."""
    wanted = set(_INSTEAD.findall(fitting.header))
    have = [(changed.file, hunk) for changed in patch.files for hunk in changed.hunks]
    named = {(file, hunk) for file, hunk in have if (file, hunk.key) in wanted}
    return named, wanted - {(file, hunk.key) for file, hunk in named}

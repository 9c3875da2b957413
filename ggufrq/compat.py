"""The series fitted to an upstream that is not the pinned one.

``patches/compat/<nine digits of the commit>/core/x.patch`` holds what ``core/x.patch`` takes to fit that
upstream, and no more: its header names the hunks that are left out there, one a line (``Instead of: FILE
KEY``, the key being ``Hunk.key``), and its own hunks, if any, are applied after what is left of
``core/x.patch``. So the series can go on changing: only a change of a hunk that is named makes it stale.
``overlay.patch`` changes files of the overlay. ``ggufrq upstream refresh`` writes all of them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from ggufrq.errors import PatchError
from ggufrq.series import COMPAT, Hunk, Patch, PatchSet, parse
from ggufrq.series import load as load_series

#: Name of the patch that changes files of the overlay; applied first.
OVERLAY_PATCH = "overlay.patch"
_INSTEAD = re.compile(r"^Instead of: (\S+) ([0-9a-f]{8})$", re.MULTILINE)


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
    for patch in base.patches:
        if patch.name not in found:
            patches.append(patch)
            continue
        fitting = read(patch.name, found[patch.name])
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
    return PatchSet(root, tuple(patch for patch in patches if patch.files), base.overlay, digest.hexdigest())


def problems(root: Path) -> list[str]:
    """What is wrong with the folders of ``compat``, as far as that can be told without a source tree."""
    wrong = []
    for path in sorted((root / COMPAT).rglob("*.patch")):
        name = path.relative_to(root).as_posix()
        try:
            if not read(name, path).header:
                wrong.append(f"{name} has no header that says what it stands in for")
        except PatchError as error:
            wrong.append(error.message)
    return wrong


def read(name: str, path: Path) -> Patch:
    """A patch of ``compat``; unlike those of the series it may have no hunks. Raises PatchError."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if not re.search(r"^--- ", text, re.MULTILINE):
        return Patch(name, path, text.strip(), ())
    return parse(name, path)


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
        lines += ["", *(f"Instead of: {file} {hunk.key}" for file, hunk in left_out)]
    return "\n".join(lines)


def own_words(text: str) -> str:
    """A header without the hunks that it names."""
    return _INSTEAD.sub("", text).strip()


def _named(patch: Patch, fitting: Patch) -> tuple[set[tuple[str, Hunk]], set[tuple[str, str]]]:
    """Hunks of ``patch`` that ``fitting`` names, and those it names that are not there."""
    wanted = set(_INSTEAD.findall(fitting.header))
    have = {
        (changed.file, hunk.key): (changed.file, hunk) for changed in patch.files for hunk in changed.hunks
    }
    return {have[one] for one in wanted if one in have}, wanted - set(have)

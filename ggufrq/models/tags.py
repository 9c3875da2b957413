"""Which file of a repository llama.cpp's ``-hf USER/MODEL:TAG`` takes, told by the names alone
(``find_best_model`` and ``find_best_sibling`` in common/download.cpp)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath, PurePosixPath

from ggufrq.models.names import PROFILE_END, base_name

#: How the names of drafts for another model begin.
DRAFTS = ("mtp-", "eagle3-", "dflash-", "dspark-")
#: What the name of a file has that llama.cpp takes for no model.
_NO_MODEL = ("mmproj", "imatrix", *DRAFTS)
#: Tags that are tried where none is given.
_DEFAULT = ("Q4_K_M", "Q8_0")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def taken(names: Sequence[str], tag: str | None = None) -> str | None:
    """The file, or the first shard, that llama.cpp takes for a tag of a repository with these files, in the
    order in which git lists them; None where it finds none."""
    models = [name for name in _listed(names) if _is_model(name)]
    for wanted in [tag] if tag else _DEFAULT:
        pattern = re.compile(f"{wanted}[.-]", re.IGNORECASE)
        for name in models:
            if pattern.search(name):
                return name
    return models[0] if models and not tag else None


def companion(names: Sequence[str], model: str, what: str, tag: str | None = None) -> str | None:
    """The projector (``mmproj``) or head (``mtp-``) that llama.cpp takes beside a model: one of the tag, or
    else the one nearest to it in bits, the first of several."""
    bits = _bits(tag or _tag(model))
    best: tuple[bool, int, str] | None = None
    for name in _listed(names):
        if what not in name or not name.endswith(".gguf"):
            continue
        exact = bool(tag) and f"-{tag}.".upper() in name.upper()
        found = (not exact, abs(_bits(_tag(name)) - bits), name)
        if best is None or found[:2] < best[:2]:
            best = found
    return best[2] if best else None


def head_of(model: PurePath, names: Iterable[str], recipe: object = None) -> str | None:
    """The head for further tokens that lies in a file of its own beside a model, by the names of files; of
    several the one nearest in bits. ``recipe`` is what the model says that it was made by."""
    base = base_name(model.stem)
    bases = {base, base.removesuffix(f"-{recipe}")}
    own = []
    for name in map(PurePosixPath, names):
        of = base_name(name.stem).removeprefix("mtp-")
        if name.name.startswith("mtp-") and of in bases and name.parent == PurePosixPath(model.parent):
            own.append(str(name))
    return companion(own, model.name, "mtp-")


def shadowed(names: Sequence[str], base: str) -> list[str]:
    """What goes wrong with files of these names in one repository, where ``base`` is the model's: a sentence
    for each file that llama.cpp does not take for its own tag, and for one that is no model and is taken."""
    said = []
    for name in _listed(names):
        stem = PurePosixPath(name).name.removesuffix(".gguf")
        shard = _SHARD.search(stem)
        tag = _SHARD.sub("", stem).removeprefix(f"{base}-")
        companions = (f"{base}-imatrix", "mmproj-", *DRAFTS)
        if (shard and shard[1] != "00001") or not stem.startswith(f"{base}-") or stem.startswith(companions):
            continue
        found = taken(names, tag)
        if not name.endswith(PROFILE_END) and found != name:
            said.append(f"llama.cpp's -hf takes {found or 'no file'} for :{tag}, and not {name}")
    first = taken(names)
    if first is not None and first.endswith(PROFILE_END):
        said.append(f"llama.cpp's -hf without a tag takes {first}, which is no model: name a tag")
    return said


def _listed(names: Sequence[str]) -> list[str]:
    return sorted((name for name in names if name.endswith(".gguf")), key=str.encode)


def _is_model(name: str) -> bool:
    shard = _SHARD.search(name.removesuffix(".gguf"))
    file = PurePosixPath(name).name
    return not any(word in file for word in _NO_MODEL) and (shard is None or int(shard[1]) == 1)


def _tag(name: str) -> str:
    found = re.search(r"[-.](\w+)$", _SHARD.sub("", name.removesuffix(".gguf")))
    return found[1] if found else ""


def _bits(tag: str) -> int:
    found = re.search(r"\d+", tag)
    return int(found[0]) if found else 0

"""The profile of a family's KV cache, beside its files: made here, or one that lies there."""

from __future__ import annotations

import os
from pathlib import Path

from ggufrq.base import log
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.results import file_sha256
from ggufrq.build.project import Build
from ggufrq.drive import profiles
from ggufrq.ggufs.files import model_header
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.make.record import Record
from ggufrq.models.names import PROFILE_END
from ggufrq.runtimes.fallback import fits
from ggufrq.tools.logs import PROFILE_SOURCES

#: The type of its entry in the manifest.
TYPE = "kv-profile"


def keep(
    record: Record,
    base: str,
    model: Path,
    made_from: dict[str, str],
    build: Build | None,
    *,
    force: bool = False,
) -> Path | None:
    """The profile of the GGUF ``model`` in the folder of a family's record, made by ``profiles.make`` unless
    it is there and entered. One that somebody else has put there, as ``ggufrq calibrate`` does, is entered as
    it is. None where the model can have none, which is said where its heads would take types of ours.

    Raises UsageError when a file of its name is there that is none, unless ``force`` is set.
    """
    name = f"{base}{PROFILE_END}"
    path, key = record.folder / name, {**made_from, "make": str(profiles.MAKE)}
    if record.kept(name, key) is not None:
        return path
    if not fits(model_header(model).values, "iso3"):
        return None
    if not path.is_file() and not os.access(record.folder, os.W_OK):
        log.say(f"no {name}: {record.folder} cannot be written")
        return None
    if path.is_file() and not _made_here(record, name) and not force:
        source = _source(path, model)
        log.say(f"{name} is there already, {PROFILE_SOURCES[source]}, and is kept")
        record.finish(name, [(path, name)], key, {"type": TYPE, "source": source})
        return path
    try:
        made, _ = profiles.make(model, None, build)
    except ModelError as error:
        log.say(f"no {name}: {error.message}")
        return None
    with record.making(name) as temporary:
        made.write(temporary)
        record.finish(name, [(temporary, name)], key, {"type": TYPE, "source": made.source, "made": "here"})
    return path


def refuse(record: Record, base: str, model: Path, *, force: bool = False) -> None:
    """Raise UsageError, before anything is made, where ``keep`` would."""
    path = record.folder / f"{base}{PROFILE_END}"
    if path.is_file() and not _made_here(record, path.name) and not force:
        _source(path, model)


def _made_here(record: Record, name: str) -> bool:
    """Whether a file is one that was made for this family's record, and none that somebody put there."""
    entry = record.files.get(name, {})
    parts = [part["sha256"] for part in entry.get("parts", [])]
    ours = entry.get("made") == "here" or entry.get("source") == "weights"
    return ours and [file_sha256(record.folder / name)] == parts


def _source(path: Path, model: Path) -> str:
    """What the profile at ``path`` was made from. Raises UsageError when it is none of this model."""
    from ggufrq.profile import read_profile

    try:
        profile = read_profile(path)
        if profile.model == fingerprint(model):
            return profile.source
        why = "is the profile of another model"
    except ModelError as error:
        why = f"is no profile: {error.message}"
    raise UsageError(f"{path} {why}", remedy="move it away, or --force to replace it")

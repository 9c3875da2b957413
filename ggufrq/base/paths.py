"""Where things live: the cache, the data that comes with the package, and how files are written.

Everything is written to a temporary name in the same folder and renamed, so a killed run leaves nothing
half-made under a name that a later run trusts.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from ggufrq.base import hints, texts
from ggufrq.base.errors import GgufrqError

#: Environment variable that moves the whole cache.
CACHE_VARIABLE = "GGUFRQ_CACHE"

_PACKAGE = Path(__file__).resolve().parents[1]


def cache_dir() -> Path:
    """The cache: ``$GGUFRQ_CACHE``, or the user's cache folder. Created when missing.

    Raises GgufrqError when it cannot be created, or there is no home folder that it could be in.
    """
    root = find_cache()
    if root is None:
        raise GgufrqError(
            "there is no place for the cache: HOME is not set, and the system knows no home of this user",
            remedy=f"set {CACHE_VARIABLE} to a folder that you can write to, or HOME",
        )
    return _made(root)


def find_cache() -> Path | None:
    """Where the cache is or would be, without creating it; None where there is no home folder for it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return expanded(chosen).absolute()
    try:
        return Path(platformdirs.user_cache_dir("ggufrq", appauthor=False)).absolute()
    except RuntimeError:
        return None


def expanded(path: str) -> Path:
    """A path with ``~`` as the home folder; as it is where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def own_dir(name: str) -> Path:
    """A folder of the cache that this user writes to. In a cache that others share (read-only, or sticky) one
    of this user's own, in the folder of temporary files, which is said once of anything but logs. Raises
    GgufrqError when neither can be made."""
    root = find_cache()
    if root is not None:
        folder = root / name
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if _is_writable(folder):
            return folder
    private = _private()
    if name != "logs":
        _tell(root, private)
    return _made(private / name)


@functools.cache  # once
def _tell(root: Path | None, private: Path) -> None:
    why = "there is no place for the cache" if root is None else f"{root} is not this user's to write to"
    hints.say(f"{why}: what is made goes to {private}; {CACHE_VARIABLE} names a better place")


def _is_writable(folder: Path) -> bool:
    """Whether this user may make files in a folder and remove what is there."""
    try:
        facts = folder.stat()
    except OSError:
        return False
    removes = os.name != "posix" or os.geteuid() in (0, facts.st_uid) or not facts.st_mode & stat.S_ISVTX
    return removes and os.access(folder, os.W_OK | os.X_OK)


def _private() -> Path:
    """This user's own folder among the temporary files."""
    folder = Path(tempfile.gettempdir()) / f"ggufrq-{os.geteuid() if os.name == 'posix' else 'own'}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or (os.name == "posix" and folder.stat().st_uid != os.geteuid()):
        raise GgufrqError(
            f"{folder} belongs to another user",
            remedy=f"set {CACHE_VARIABLE} to a folder that you can write to",
        )
    return folder


def builds_dir() -> Path:
    """Builds of llama.cpp, one folder per key."""
    return _made(cache_dir() / "builds")


def sources_dir() -> Path:
    """Verified pristine source trees, one folder per upstream commit."""
    return _made(cache_dir() / "sources")


def logs_dir() -> Path:
    """Logs of runs."""
    return own_dir("logs")


def data_dir(name: str) -> Path:
    """Folder of data that comes with ggufrq: ``patches``, ``cmake``, ``models``, ``recipes`` or ``texts``.

    Found inside the package when installed from a wheel, else beside it in the checkout.
    Raises GgufrqError when it is in neither place.
    """
    return _data(name)


def licence() -> Path:
    """The licence of ggufrq itself. Raises GgufrqError when it is missing."""
    return _data("LICENSE")


def _data(name: str) -> Path:
    for candidate in (_PACKAGE / "data" / name, _PACKAGE.parent / name):
        if candidate.exists():
            return candidate
    raise GgufrqError(
        f"'{name}', which comes with ggufrq, is missing from {_PACKAGE}",
        remedy="reinstall: python -m pip install --force-reinstall ggufrq",
    )


def in_checkout() -> bool:
    """Whether ggufrq runs from its own checkout, whose data may be written, and not from a wheel."""
    return not (_PACKAGE / "data" / "patches").is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file()


def checkout_dir() -> Path:
    """The checkout that ggufrq lies in; in a wheel there is no ``pyproject.toml`` in it."""
    return _PACKAGE.parent


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s folder; rename it to ``path`` on success, remove it on failure.

    The caller creates the temporary path, as a file or as a folder. A folder replaces no existing folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir() and not temporary.is_symlink():
            remove_tree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write ``data`` (text as UTF-8) to ``path`` so that readers see the old content or all of the new
    one.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(texts.to_bytes(data) if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def plain_text(path: Path) -> Path:
    """The text file ``path`` for a program that reads it itself: as it is, or where it begins with a mark, a
    copy without it, in the cache. Raises UsageError when it is in another encoding or no text."""
    data = path.read_bytes()
    texts.decode(data, str(path))
    if not data.startswith(codecs.BOM_UTF8):
        return path
    copy = own_dir("texts") / hashlib.sha256(data).hexdigest()[:16] / path.name
    if not copy.is_file():
        atomic_write(copy, data.removeprefix(codecs.BOM_UTF8))
    return copy


def read_json(path: Path) -> dict[str, Any] | None:
    """A file that holds a JSON object, None when it does not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def remove_tree(path: Path) -> None:
    """Remove a folder of ours if it exists, read-only files (git objects) included."""

    def writable_again(function: object, name: str, _: object) -> None:
        Path(name).parent.chmod(0o700)
        Path(name).chmod(0o700)
        function(name)  # type: ignore[operator]

    if not path.exists():
        return
    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=writable_again)
    else:
        shutil.rmtree(path, onerror=writable_again)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GgufrqError(
            f"cannot create the folder {folder}: {error.strerror}",
            remedy=f"set {CACHE_VARIABLE} to a folder that you can write to",
        ) from error
    return folder

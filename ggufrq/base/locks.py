"""Locks between processes, and a word to those who wait for one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ggufrq.base import log, paths, texts
from ggufrq.base.errors import GgufrqError

#: Seconds without a word.
_PATIENCE = 0.2


@contextmanager
def locked(path: Path, other: str) -> Iterator[None]:
    """Hold the lock ``path`` for as long as the context lasts. Who has to wait is told what the other one
    does: ``another ggufrq works here``."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except PermissionError as error:
        raise GgufrqError(
            f"{path} cannot be locked, it belongs to another user or cannot be written: {error.strerror}",
            remedy=f"who owns {path.parent} can do this; or set GGUFRQ_CACHE to a folder of your own",
        ) from error
    except Timeout:
        log.say(f"{other}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Have a folder, which need not be there yet, to oneself for as long as the context lasts."""
    name = hashlib.sha256(texts.to_bytes(str(folder.resolve()))).hexdigest()[:16]
    with locked(paths.own_dir("locks") / f"{name}.lock", f"another ggufrq works in {folder}"):
        yield

"""What is said to the user on stderr, and the log of each run under ``logs_dir()``."""

from __future__ import annotations

import logging
import platform
import shlex
import sys
import time
from pathlib import Path

from ggufrq import __version__
from ggufrq.base import machine, paths, texts
from ggufrq.base.errors import GgufrqError
from ggufrq.base.hints import is_quiet as is_quiet
from ggufrq.base.hints import say as say
from ggufrq.base.hints import set_quiet

_KEPT = 30


class _LazyFileHandler(logging.Handler):
    """Creates the run's log on the first record, so that commands that only print a path leave no file
    behind.
    """

    def __init__(self, command: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self._command = command
        self._inner: logging.FileHandler | None = None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self._inner is None:
            try:
                self._inner = self._open()
            except (OSError, GgufrqError):  # a full or read-only disk must not stop the command itself
                logging.getLogger("ggufrq").removeHandler(self)
                return
        self._inner.emit(record)

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
        super().close()

    def _open(self) -> logging.FileHandler:
        folder = paths.logs_dir()
        for old in sorted(folder.glob("run-*.log"))[:-_KEPT]:
            old.unlink(missing_ok=True)
        name = time.strftime("run-%Y%m%d-%H%M%S") + f"-{time.time_ns() // 1000 % 1000000:06d}.log"
        head = f"ggufrq {__version__}, Python {platform.python_version()}, {machine.system()}"
        inner = logging.FileHandler(folder / name, encoding="utf-8", errors=texts.SHOWN)
        inner.setFormatter(self.formatter)
        assert inner.stream is not None
        inner.stream.write(f"{head}\n$ ggufrq {shlex.join(self._command)}\n")
        return inner


def set_up(*, debug: bool = False, quiet: bool = False, command: list[str] | None = None) -> None:
    """Send debug records to the run's log and, with ``debug``, to stderr too. ``quiet`` silences ``say``."""
    logger = logging.getLogger("ggufrq")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(_LazyFileHandler(command if command is not None else sys.argv[1:]))
    if debug:
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(stream)
    set_quiet(quiet)


def latest() -> Path | None:
    """Log of the last run that left one."""
    logs = sorted(paths.logs_dir().glob("run-*.log"))
    return logs[-1] if logs else None

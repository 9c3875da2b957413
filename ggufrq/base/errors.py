"""Every failure that a user can meet: what went wrong, why, and what to do about it.

The command line shows them as two lines and exits with the class's code; a traceback only with ``--debug``.
"""

from __future__ import annotations

from typing import ClassVar


class GgufrqError(Exception):
    """Base of all errors meant for users.

    ``message`` says what failed and why; ``remedy``, when there is one, is the thing to do, best a command.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message


class UsageError(GgufrqError):
    """The command line or an argument makes no sense."""

    exit_code = 2


class SourceError(GgufrqError):
    """The source of llama.cpp cannot be had, or is not the one that is pinned."""

    exit_code = 3


class PatchError(GgufrqError):
    """The patch set is malformed or does not apply."""

    exit_code = 4


class BuildError(GgufrqError):
    """Configuring or compiling failed, or no current build is there."""

    exit_code = 5


class ToolError(GgufrqError):
    """A program that was run failed, is missing, or took too long."""

    exit_code = 6


class ModelError(GgufrqError):
    """A model is missing, damaged, or not fit for what was asked."""

    exit_code = 7


class HubError(GgufrqError):
    """The Hub refused something, or cannot be reached."""

    exit_code = 8

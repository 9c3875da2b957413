"""Backends of ggml: one module each, meeting ``Backend``, found in ``BACKENDS``."""

from __future__ import annotations

from typing import Protocol

from ggufrq.backends import cpu
from ggufrq.errors import UsageError
from ggufrq.toolchain import Missing


class Backend(Protocol):
    """What the build asks of a backend. Modules meet it with functions of these names."""

    def definitions(self, *, native: bool) -> dict[str, str]:
        """CMake cache definitions that switch the backend on."""

    def identity(self, *, native: bool) -> str:
        """What of this machine the result depends on; it makes part of a build's key."""

    def missing(self) -> list[Missing]:
        """What a build for this backend needs and does not find here."""


BACKENDS: dict[str, Backend] = {"cpu": cpu}


def get(name: str) -> Backend:
    """The backend of that name. Raises UsageError when there is none."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise UsageError(f"there is no backend '{name}'", remedy=f"one of: {', '.join(BACKENDS)}") from None

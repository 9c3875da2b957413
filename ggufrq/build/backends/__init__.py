"""Backends of ggml: one module each, meeting ``Backend``, found in ``BACKENDS``."""

from __future__ import annotations

import os
from typing import Protocol

from ggufrq.base.errors import UsageError
from ggufrq.build.backends import cpu, cuda, hip, metal, vulkan
from ggufrq.build.toolchain import Missing


class Backend(Protocol):
    """What the build asks of a backend. Modules meet it with functions of these names."""

    def definitions(self, *, native: bool) -> dict[str, str]:
        """CMake cache definitions that switch the backend on."""

    def identity(self, *, native: bool) -> str:
        """What of this machine the result depends on; it makes part of a build's key."""

    def missing(self) -> list[Missing]:
        """What a build for this backend needs and does not find here."""

    def detected(self) -> bool:
        """Whether this machine has what the backend is for, and all that a build needs."""

    def versions(self) -> dict[str, str]:
        """Compilers and devices of the backend, for the manifest."""


BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "hip": hip, "metal": metal, "vulkan": vulkan}

#: Backends that are compiled from the sources of another, and so have its patch.
_SOURCES = {"hip": "cuda"}

#: Backends that are taken by themselves though no card has run them yet, and what to say of that.
_UNTRIED = {
    "vulkan": "by Vulkan the cache types ran on a driver that computes on the processor and on no GPU yet; "
    "`ggufrq validate docs-qwen3-8m --kv iso3 --quick` tells whether this one is right, and {} takes the "
    "processor instead",
}

#: Environment variable that names the backend to use where none is given.
VARIABLE = "GGUFRQ_BACKEND"


def default() -> str:
    """The backend where none is given: ``$GGUFRQ_BACKEND``, else the first GPU backend that is detected,
    else cpu.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        get(chosen)
        return chosen
    return next((name for name, backend in BACKENDS.items() if name != "cpu" and backend.detected()), "cpu")


def get(name: str) -> Backend:
    """The backend of that name. Raises UsageError when there is none."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise UsageError(f"there is no backend '{name}'", remedy=f"one of: {', '.join(BACKENDS)}") from None


def caution(name: str, *, built: bool = False) -> str | None:
    """A sentence on a backend that no card has run yet, for programs that are yet to be built or are there;
    None where a card has."""
    said = _UNTRIED.get(name)
    instead = "LLAMA_ARG_DEVICE=none" if built else f"--backend cpu or {VARIABLE}=cpu"
    return None if said is None else said.format(instead)


def sources(name: str) -> str:
    """The backend whose sources and patch a backend is compiled from: CUDA's for HIP, else its own."""
    return _SOURCES.get(name, name)

"""GPUs by their Vulkan drivers. A build needs the loader, headers and glslc, but no GPU."""

from __future__ import annotations

import os
from functools import lru_cache

from ggufrq.build import cmake_files, vulkan_toolkit
from ggufrq.build.backends import cpu
from ggufrq.build.toolchain import Missing


def detected() -> bool:
    """Whether a GPU is present, not a driver alone that computes on the processor, and all that a build
    needs."""
    return _detected(os.environ.get("PATH"), os.environ.get("VULKAN_SDK"))


@lru_cache
def _detected(path: str | None, sdk: str | None) -> bool:
    """Once in a process for what programs and folders are there, since it starts two of them."""
    return not vulkan_toolkit.missing() and bool(vulkan_toolkit.devices())


def definitions(*, native: bool) -> dict[str, str]:
    """The CPU backend's, too: what does not fit on the GPU runs there."""
    return {
        **cpu.definitions(native=native),
        **cmake_files.options("vulkan"),
        **vulkan_toolkit.definitions(vulkan_toolkit.find()),
    }


def identity(*, native: bool) -> str:
    """The processor, glslc and the headers; for the GPU its driver compiles when a program starts."""
    found = vulkan_toolkit.find()
    return f"{cpu.identity(native=native)} glslc {found.version} vulkan {found.headers}"


def missing() -> list[Missing]:
    """A C++ compiler and the parts of Vulkan."""
    return [*cpu.missing(), *vulkan_toolkit.missing()]


def versions() -> dict[str, str]:
    """glslc, the headers and, where there are any, the GPUs."""
    found = vulkan_toolkit.find()
    told = {"glslc": found.version, "vulkan": found.headers}
    devices = vulkan_toolkit.devices()
    if devices:
        told["devices"] = ", ".join(devices)
    return told

"""The programs that a build needs: where they are, their versions, and how to get the missing ones."""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import BuildError, ToolError


@dataclass(frozen=True)
class Program:
    """A program that was found: its path and the version it gives."""

    path: Path
    version: str


@dataclass(frozen=True)
class Missing:
    """Something that a build needs and that is not there, with the command that brings it."""

    what: str
    remedy: str


def require(missing: Sequence[Missing]) -> None:
    """Raise BuildError for the first thing that is missing, if any is."""
    if missing:
        raise BuildError(missing[0].what, remedy=missing[0].remedy)


_PACKAGES = {
    "apt-get": {
        "compiler": "apt-get install g++",
        "git": "apt-get install git",
        "vulkan": "apt-get install libvulkan-dev glslc spirv-headers vulkan-tools",
        "ccache": "apt-get install ccache",
    },
    "dnf": {
        "compiler": "dnf install gcc-c++",
        "git": "dnf install git",
        "vulkan": "dnf install vulkan-loader-devel glslc spirv-headers-devel vulkan-tools",
        "ccache": "dnf install ccache",
    },
    "pacman": {
        "compiler": "pacman -S gcc",
        "git": "pacman -S git",
        "vulkan": "pacman -S vulkan-headers vulkan-icd-loader shaderc spirv-headers vulkan-tools",
        "ccache": "pacman -S ccache",
    },
    "zypper": {
        "compiler": "zypper install gcc-c++",
        "git": "zypper install git",
        "vulkan": "zypper install vulkan-devel shaderc spirv-headers vulkan-tools",
        "ccache": "zypper install ccache",
    },
    "apk": {
        "compiler": "apk add g++",
        "git": "apk add git",
        "vulkan": "apk add vulkan-loader-dev vulkan-headers shaderc spirv-headers vulkan-tools",
        "ccache": "apk add ccache",
    },
}


def remedy(what: str) -> str:
    """The command that installs ``compiler``, ``git``, ``ccache`` or what ``vulkan`` takes on this system."""
    system = platform.system()
    if system == "Darwin" and what != "vulkan":
        return "brew install ccache" if what == "ccache" else "xcode-select --install"
    if system == "Windows":
        names = {
            "compiler": "Microsoft.VisualStudio.2022.BuildTools",
            "git": "Git.Git",
            "vulkan": "KhronosGroup.VulkanSDK",
            "ccache": "Ccache.Ccache",
        }
        return f"winget install {names[what]}"
    prefix = "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "sudo "
    for manager, commands in _PACKAGES.items():
        if shutil.which(manager):
            return prefix + commands[what]
    return {
        "compiler": "install GCC or Clang with its C++ part",
        "git": "install git",
        "vulkan": "install LunarG's Vulkan SDK (vulkan.lunarg.com) and set VULKAN_SDK",
        "ccache": "install ccache",
    }[what]


def compiler() -> Program | None:
    """The C++ compiler that CMake will take: ``$CXX``, else the system's. None when there is none that
    runs.
    """
    for candidate in _compilers():
        words = shlex.split(candidate)
        path = shutil.which(words[0]) if words else None
        if path is None:
            continue
        # On macOS c++ exists even where no compiler is installed; only running it tells.
        flags = [] if candidate == "cl" else ["--version"]
        completed = _quiet([path, *words[1:], *flags])
        if completed is not None:
            return Program(Path(path), completed)
    return None


def names_compiler() -> bool:
    """Whether there is a program by the name of a C++ compiler. None is run."""
    return any(shutil.which(word) for candidate in _compilers() for word in shlex.split(candidate)[:1])


def _compilers() -> list[str]:
    chosen = os.environ.get("CXX")
    return [chosen] if chosen else ["c++", "g++", "clang++", "cl"]


def git() -> Program | None:
    """git, or None when it is missing."""
    return _on_path("git")


def ccache() -> Program | None:
    """ccache, or None; a build works without."""
    return _on_path("ccache")


def cmake() -> Program | None:
    """CMake: the one from the Python package, else one on PATH."""
    return _from_package("cmake", "CMAKE_BIN_DIR")


def ninja() -> Program | None:
    """Ninja: the one from the Python package, else one on PATH."""
    return _from_package("ninja", "BIN_DIR")


def _from_package(name: str, attribute: str) -> Program | None:
    try:
        folder = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError):
        return _on_path(name)
    path = shutil.which(name, path=str(folder))
    return _program(name, path) or _on_path(name)


def _on_path(name: str) -> Program | None:
    return _program(name, shutil.which(name))


def _program(name: str, path: str | None) -> Program | None:
    version = _quiet([path, "--version"]) if path else None
    return (
        Program(Path(path), version.removeprefix(f"{name} version "))
        if path and version is not None
        else None
    )


def _quiet(command: list[str]) -> str | None:
    """First line that a program prints, None when it fails."""
    try:
        completed = proc.run(command, timeout=30, check=False, env={"LC_ALL": "C"})
    except ToolError:
        return None
    lines = (completed.stdout.strip() or completed.stderr.strip()).splitlines()
    return None if completed.rc != 0 else (lines[0].strip() if lines else "")

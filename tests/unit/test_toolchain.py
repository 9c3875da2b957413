from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ggufrq.build import toolchain


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH is one empty folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_cmake_and_ninja_come_from_python_packages_even_off_path(path: Path) -> None:
    for program in (toolchain.cmake(), toolchain.ninja()):
        assert program is not None and program.path.is_file() and program.version


def test_without_the_packages_path_is_searched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmake", None)
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert toolchain.cmake() is None and toolchain.ninja() is None
    script(path, "cmake", "echo cmake version 3.99")
    assert toolchain.cmake() == toolchain.Program(path / "cmake", "3.99")


def test_a_compiler_that_does_not_run_does_not_count(path: Path) -> None:
    assert toolchain.compiler() is None
    script(path, "c++", "exit 1")
    assert toolchain.compiler() is None
    script(path, "clang++", "echo clang 99")
    assert toolchain.compiler() == toolchain.Program(path / "clang++", "clang 99")


def test_the_chosen_compiler_wins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(path, "c++", "echo system")
    script(path, "mine", 'echo "mine $*"')
    monkeypatch.setenv("CXX", "mine -m64")
    assert toolchain.compiler() == toolchain.Program(path / "mine", "mine -m64 --version")
    monkeypatch.setenv("CXX", "not-there")
    assert toolchain.compiler() is None


@pytest.mark.parametrize(
    ("system", "manager", "expected"),
    [
        ("Darwin", None, "xcode-select --install"),
        ("Linux", "apt-get", "apt-get install g++"),
        ("Linux", "dnf", "dnf install gcc-c++"),
        ("Linux", None, "install GCC or Clang with its C++ part"),
        ("Windows", None, "winget install Microsoft.VisualStudio.2022.BuildTools"),
    ],
)
def test_remedy(
    path: Path, monkeypatch: pytest.MonkeyPatch, system: str, manager: str | None, expected: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    if manager:
        script(path, manager, "")
    assert toolchain.remedy("compiler").removeprefix("sudo ") == expected

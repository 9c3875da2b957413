"""Which backend is built where."""

from __future__ import annotations

import platform

import pytest

from ggufrq.base.errors import BuildError, UsageError
from ggufrq.build import backends, builds
from ggufrq.build.project import BuildOptions
from ggufrq.patchset import series


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Linux machine, whatever this one is."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    return monkeypatch


def mac(machine: pytest.MonkeyPatch, arch: str) -> None:
    machine.setattr(platform, "system", lambda: "Darwin")
    machine.setattr(platform, "machine", lambda: arch)


def test_metal_is_the_default_on_a_mac_of_apples_own_processors(machine: pytest.MonkeyPatch) -> None:
    mac(machine, "arm64")
    assert backends.default() == "metal" == BuildOptions().backend
    mac(machine, "x86_64")  # its GPUs lack matrices
    assert backends.default() == "cpu"


def test_the_variable_wins(machine: pytest.MonkeyPatch) -> None:
    mac(machine, "arm64")
    machine.setenv(backends.VARIABLE, "cpu")
    assert backends.default() == "cpu"
    machine.setenv(backends.VARIABLE, "abacus")
    with pytest.raises(UsageError, match="no backend 'abacus'"):
        backends.default()


def test_on_a_mac_metal_is_built_only_where_it_was_chosen(machine: pytest.MonkeyPatch) -> None:
    """Upstream's CMake switches it on there unless told not to."""
    mac(machine, "arm64")
    assert backends.get("cpu").definitions(native=True)["GGML_METAL"] == "OFF"
    chosen = backends.get("metal").definitions(native=True)
    assert chosen["GGML_METAL"] == chosen["GGML_METAL_EMBED_LIBRARY"] == "ON"


@pytest.mark.usefixtures("cache", "no_programs")
def test_metal_is_refused_elsewhere(machine: pytest.MonkeyPatch) -> None:
    assert backends.get("metal").missing()[0].remedy == "ggufrq build --backend cpu"
    machine.setattr(builds.toolchain, "git", lambda: object())
    machine.setattr(builds.toolchain, "cmake", lambda: object())
    machine.setattr(builds.toolchain, "ninja", lambda: object())
    with pytest.raises(BuildError, match="Metal is a part of macOS, and this is not macOS") as caught:
        builds.ensure_build(BuildOptions("metal", native=False))
    assert caught.value.remedy == "ggufrq build --backend cpu"


def test_patches_know_the_backends() -> None:
    assert set(series.BACKENDS) == {backends.sources(name) for name in backends.BACKENDS}

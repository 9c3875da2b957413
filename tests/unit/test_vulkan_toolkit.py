"""Loader, headers and glslc of Vulkan: found, too old, or in parts. What vulkaninfo prints is of lavapipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.base.errors import BuildError
from ggufrq.build import backends, builds, doctor, vulkan_toolkit
from ggufrq.build.project import BuildOptions

SUMMARY = (Path(__file__).parent.parent / "logs" / "build" / "vulkaninfo-lavapipe.txt").read_text("utf-8")
PARTS = {
    "bin/glslc": "glslc",
    "include/vulkan/vulkan.hpp": "the headers (vulkan.hpp)",
    "lib/libvulkan.so": "the loader to link with",
    "share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake": "the headers of SPIR-V",
}


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A complete SDK that the user has chosen."""
    root = tmp_path / "sdk"
    for name in PARTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "lib" / "libvulkan.la").touch()  # nothing to link with
    (root / "include" / "vulkan" / "vulkan_core.h").write_text(
        "#define VK_HEADER_VERSION 309\n"
        "#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 4, VK_HEADER_VERSION)\n"
    )
    glslc(root, "shaderc v2023.8 v2023.8-1\nspirv-tools v2023.6\n")
    monkeypatch.setenv("VULKAN_SDK", str(root))
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    return root


def glslc(root: Path, output: str, rc: int = 0) -> None:
    path = root / "bin" / "glslc"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {rc}\n")
    path.chmod(0o755)


def vulkaninfo(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str, rc: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / "vulkaninfo"
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\nexit {rc}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_complete_one(sdk: Path) -> None:
    assert vulkan_toolkit.missing() == []
    defined = backends.get("vulkan").definitions(native=False)
    assert defined["GGML_VULKAN"] == "ON"
    assert defined["Vulkan_GLSLC_EXECUTABLE"] == str(sdk / "bin" / "glslc")
    assert defined["Vulkan_INCLUDE_DIR"] == str(sdk / "include")
    assert defined["Vulkan_LIBRARY"] == str(sdk / "lib" / "libvulkan.so")
    assert defined["SPIRV-Headers_DIR"] == str(sdk / "share" / "cmake" / "SPIRV-Headers")
    assert backends.get("vulkan").identity(native=False).endswith("glslc 2023.8 vulkan 1.4.309")


@pytest.mark.parametrize(("gone", "what"), PARTS.items())
def test_parts_that_are_missing_are_named(sdk: Path, gone: str, what: str) -> None:
    (sdk / gone).unlink()
    (lack,) = vulkan_toolkit.missing()
    assert lack.what == f"of Vulkan {what} was not found in {sdk}" and lack.remedy
    with pytest.raises(BuildError, match="was not found"):
        builds.ensure_build(BuildOptions("vulkan", native=False))


@pytest.mark.parametrize(
    ("told", "fit"), [("shaderc 2023.2-1", True), ("shaderc v2022.4 v2022.4", False), ("", False)]
)
def test_the_oldest_glslc(sdk: Path, told: str, fit: bool) -> None:
    glslc(sdk, told)
    assert (vulkan_toolkit.missing() == []) is fit
    if not fit:
        with pytest.raises(BuildError, match="is too old"):
            vulkan_toolkit.find()


def test_the_oldest_headers(sdk: Path) -> None:
    file = sdk / "include" / "vulkan" / "vulkan_core.h"
    new = file.read_text()
    for version, fit in (
        (("1, 3", 239), False),
        (("1, 3", 271), False),
        (("1, 3", 272), True),
        (("1, 4", 1), True),
    ):
        api, patch = version
        file.write_text(new.replace("309", str(patch)).replace("1, 4", api))
        assert (vulkan_toolkit.missing() == []) is fit
    file.write_text(new.replace("309", "239").replace("1, 4", "1, 3"))
    with pytest.raises(BuildError, match=r"Vulkan 1\.3\.239 of the headers in .* is too old, 1\.3\.272"):
        vulkan_toolkit.find()


def test_devices(sdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that computes on the processor is no GPU, for llama.cpp neither."""
    assert vulkan_toolkit.parse_devices(SUMMARY) == ()
    card = SUMMARY.replace("TYPE_CPU", "TYPE_DISCRETE_GPU").replace(
        "llvmpipe (LLVM", "AMD Radeon RX 7900 (RADV"
    )
    assert vulkan_toolkit.parse_devices(card) == ("AMD Radeon RX 7900 (RADV 15.0.6, 256 bits)",)
    monkeypatch.setattr("ggufrq.build.cuda_toolkit.cards", lambda: ())
    monkeypatch.setattr("platform.system", lambda: "Linux")
    vulkaninfo(tmp_path / "bin", monkeypatch, SUMMARY)
    assert backends.default() == "cpu"
    assert doctor._vulkan().found.startswith("no GPU that vulkaninfo shows, headers 1.4.309, glslc 2023.8")
    vulkaninfo(tmp_path / "bin", monkeypatch, card)
    assert backends.default() == "cpu", "no GPU has run its shaders yet"
    assert doctor._vulkan().state == "ok" and doctor._vulkan().found.startswith("AMD Radeon RX 7900")
    assert doctor._vulkan().found.endswith(
        "--backend vulkan, not taken by itself since no GPU has run its shaders yet"
    )
    assert "7900" in backends.get("vulkan").versions()["devices"]
    (sdk / "lib" / "libvulkan.so").unlink()
    told = doctor._vulkan()
    assert told.state == "optional" and "the loader to link with was not found" in told.found and told.remedy
    vulkaninfo(tmp_path / "bin", monkeypatch, "", rc=1)
    assert vulkan_toolkit.devices() == ()

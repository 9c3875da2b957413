"""Loader, headers and glslc of Vulkan: found, too old, or in parts. What vulkaninfo prints is of lavapipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.base.errors import BuildError
from ggufrq.build import backends, builds, doctor, vulkan_toolkit
from ggufrq.build.backends import vulkan
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
    assert doctor._vulkan().found.endswith(", for: ggufrq build --backend vulkan")
    vulkaninfo(tmp_path / "bin", monkeypatch, card)
    told = doctor._vulkan()
    assert told.state == "ok" and told.found.startswith("AMD Radeon RX 7900")
    assert ", taken by itself; " in told.found and "on no GPU yet; " in told.found
    assert told.found.endswith("--backend cpu or GGUFRQ_BACKEND=cpu takes the processor instead")
    assert "7900" in backends.get("vulkan").versions()["devices"]
    (sdk / "lib" / "libvulkan.so").unlink()
    told = doctor._vulkan()
    assert told.state == "optional" and "the loader to link with was not found" in told.found and told.remedy
    vulkaninfo(tmp_path / "bin", monkeypatch, "", rc=1)
    assert vulkan_toolkit.devices() == ()


def test_who_has_no_vulkaninfo_is_told(sdk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: f"{path}/{name}" if path else None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    told = doctor._vulkan()
    assert told.state == "ok" and told.found.startswith("no vulkaninfo (vulkan-tools) to ask, headers 1.4")


#: An AMD laptop with lavapipe beside its GPU, as Mesa installs both.
LAPTOP = SUMMARY + SUMMARY.replace("TYPE_CPU", "TYPE_INTEGRATED_GPU").replace("llvmpipe", "AMD Radeon 780M")


def test_a_gpu_is_taken_by_itself(sdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can be built for, is no driver alone that computes on the processor, and no other backend has
    a GPU."""
    for other in ("cuda", "hip", "metal"):
        monkeypatch.setattr(f"ggufrq.build.backends.{other}.detected", lambda: False)
    vulkaninfo(tmp_path / "bin", monkeypatch, SUMMARY)
    assert backends.default() == "cpu"
    vulkaninfo(tmp_path / "bin", monkeypatch, LAPTOP)
    vulkan._detected.cache_clear()
    assert backends.default() == "vulkan" == BuildOptions().backend
    monkeypatch.setenv(backends.VARIABLE, "cpu")
    assert backends.default() == "cpu"
    monkeypatch.delenv(backends.VARIABLE)
    with monkeypatch.context() as there:
        there.setattr("ggufrq.build.backends.cuda.detected", lambda: True)
        assert backends.default() == "cuda"
    glslc(sdk, "shaderc v2022.4 v2022.4")
    vulkan._detected.cache_clear()
    assert backends.default() == "cpu", "its glslc is too old"
    (sdk / "bin" / "glslc").unlink()
    vulkan._detected.cache_clear()
    assert backends.default() == "cpu"


def test_a_build_says_that_no_gpu_has_run_it(
    sdk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise BuildError("far enough")

    monkeypatch.setattr("ggufrq.build.builds._require_programs", lambda options: None)
    monkeypatch.setattr("ggufrq.build.stages.source_stage", stop)
    for name, told in (("vulkan", True), ("cpu", False)):
        with pytest.raises(BuildError, match="far enough"):
            builds.ensure_build(BuildOptions(name, native=False))
        assert ("GGUFRQ_BACKEND=cpu takes the processor instead" in capsys.readouterr().err) is told

"""The files of options for ``cmake -C``: CMake reads in them what a build is made with."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from ggufrq.base import paths, proc
from ggufrq.build import backends, cmake_files, cuda_toolkit, hip_toolkit, toolchain, vulkan_toolkit
from ggufrq.build.project import BuildOptions, definitions, llama_project

#: What depends on the machine or the patch set, and so is in no file.
_OWN = {
    "CMAKE_CUDA_ARCHITECTURES",
    "CMAKE_CUDA_COMPILER",
    "CMAKE_HIP_ARCHITECTURES",
    "CMAKE_HIP_COMPILER",
    "CMAKE_HIP_COMPILER_ROCM_ROOT",
    "CMAKE_PREFIX_PATH",
    "CUDAToolkit_ROOT",
    "GGML_NATIVE",
    "LLAMA_BUILD_COMMIT",
    "SPIRV-Headers_DIR",
    "Vulkan_GLSLC_EXECUTABLE",
    "Vulkan_INCLUDE_DIR",
    "Vulkan_LIBRARY",
}


def cached(folder: Path, *arguments: str) -> dict[str, str]:
    """The cache of an empty project that CMake configures."""
    cmake, ninja = toolchain.cmake(), toolchain.ninja()
    assert cmake is not None and ninja is not None
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.28)\nproject(empty NONE)\n")
    command = [cmake.path, *arguments, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja.path}"]
    proc.run([*command, "-S", folder, "-B", folder / "obj"])
    text = (folder / "obj" / "CMakeCache.txt").read_text()
    return {name: value for name, value in re.findall(r"^(\w+):\w+=(.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_cmake_reads_what_a_build_is_made_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path("/opt/toolkit")
    monkeypatch.setattr(
        cuda_toolkit, "find", lambda: cuda_toolkit.Toolkit(root, root / "bin" / "nvcc", "13.0", (root,))
    )
    monkeypatch.setattr(cuda_toolkit, "cards", lambda: ())
    monkeypatch.setattr(hip_toolkit, "find", lambda: hip_toolkit.Toolkit(root, root / "bin" / "clang", "6.4"))
    monkeypatch.setattr(hip_toolkit, "cards", lambda: ())
    vulkan = vulkan_toolkit.Toolkit(root / "bin" / "glslc", "2023.2", root, "1.4.309", root, root)
    monkeypatch.setattr(vulkan_toolkit, "find", lambda: vulkan)
    file = paths.data_dir("cmake") / f"{name}.cmake"
    with_file, without = cached(tmp_path / "with", "-C", str(file)), cached(tmp_path / "without")
    read = {key: value for key, value in with_file.items() if value != without.get(key) and "DIR" not in key}
    made = definitions(llama_project(), BuildOptions(name))
    made["CMAKE_INSTALL_RPATH"] = made["CMAKE_INSTALL_RPATH"].partition(";")[0]  # behind it a toolkit's place
    assert read == {key: value for key, value in made.items() if key not in _OWN}


def test_every_file_is_of_a_backend() -> None:
    assert {path.stem for path in paths.data_dir("cmake").glob("*.cmake")} == {
        *("common", "portable"),
        *backends.BACKENDS,
    }


def test_what_is_for_a_mac_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert cmake_files.options("cpu") == {}
    assert cmake_files.options("common")["CMAKE_INSTALL_RPATH"] == "$ORIGIN"
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert cmake_files.options("cpu") == {"GGML_METAL": "OFF"}
    # dyld knows no $ORIGIN
    assert cmake_files.options("common")["CMAKE_INSTALL_RPATH"] == "@loader_path"


def test_a_line_of_another_form_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.cmake").write_text("# fine\n\nset(A ON)\n")
    monkeypatch.setattr(paths, "data_dir", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"set\(A ON\)"):
        cmake_files.options("odd")

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ggufrq.base import machine, paths
from ggufrq.build import doctor, hip_toolkit, manifest, prebuilt, toolchain, vulkan_toolkit
from ggufrq.build.toolchain import Program
from ggufrq.cli.doctor import doctor as command


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has everything but a build."""
    for name in ("compiler", "git", "cmake", "ninja", "ccache"):
        monkeypatch.setattr(
            toolchain, name, lambda name=name: Program(Path("/usr/bin") / name, f"{name} 1.0")
        )
    monkeypatch.setattr(hip_toolkit, "cards", lambda: ())
    monkeypatch.setattr(hip_toolkit, "toolkit", lambda: None)
    vulkan = vulkan_toolkit.Toolkit(Path("glslc"), "2023.2", Path(), "1.4.309", Path(), Path())
    monkeypatch.setattr(vulkan_toolkit, "find", lambda: vulkan)
    monkeypatch.setattr(vulkan_toolkit, "missing", lambda: [])
    monkeypatch.setattr(vulkan_toolkit, "devices", lambda: ())
    monkeypatch.setattr(machine, "memory", lambda: (16 << 30, 8 << 30))
    monkeypatch.setattr(machine, "free_disk", lambda _: 50 << 30)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    data = tmp_path / "data"
    (data / "models" / "docs-small").mkdir(parents=True)
    (data / "models" / "docs-small" / "config.json").touch()
    (data / "models" / "docs-small" / "model.safetensors").touch()
    (data / "patches").mkdir()
    (data / "cmake").symlink_to(paths.data_dir("cmake"))
    monkeypatch.setattr(paths, "data_dir", lambda name: data / name)


def report() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


@pytest.mark.usefixtures("whole", "no_programs")
def test_a_machine_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = report()
    assert doctor.healthy(list(checks.values()))
    todo = {name for name, check in checks.items() if check.state != "ok"}
    assert todo == {"llama.cpp source", "build"}
    assert all(checks[name].remedy == "ggufrq build" for name in todo)
    assert checks["embedded models"].found == "docs-small"
    assert "5 compilers" in checks["memory"].found or machine.cores() < 5


@pytest.mark.usefixtures("whole", "no_programs")
@pytest.mark.parametrize(
    ("what", "state", "name"),
    [
        ("compiler", "missing", "C++ compiler"),
        ("git", "missing", "git"),
        ("cmake", "missing", "cmake"),
        ("ccache", "optional", "ccache"),
    ],
)
def test_a_missing_program(monkeypatch: pytest.MonkeyPatch, what: str, state: str, name: str) -> None:
    monkeypatch.setattr(toolchain, what, lambda: None)
    check = report()[name]
    assert (check.state, check.found) == (state, "not found")
    assert check.remedy
    assert doctor.healthy([check]) == (state == "optional")


@pytest.mark.usefixtures("whole", "no_programs")
@pytest.mark.parametrize(("system", "remedy"), [("Linux", prebuilt.INSTALL), ("Darwin", "ggufrq build")])
def test_without_compiler_and_build_there_is_the_wheel(
    monkeypatch: pytest.MonkeyPatch, system: str, remedy: str
) -> None:
    monkeypatch.setattr(toolchain, "compiler", lambda: None)
    monkeypatch.setattr(platform, "system", lambda: system)
    assert report()["build"].remedy == remedy


@pytest.mark.usefixtures("whole", "no_programs")
def test_little_disk_memory_and_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda _: 100 << 20)
    monkeypatch.setattr(machine, "memory", lambda: (1 << 30, 1 << 29))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    checks = report()
    assert checks["disk"].state == "missing" and "GGUFRQ_CACHE" in checks["disk"].remedy
    assert checks["memory"].state == "todo" and "--jobs 1" in checks["memory"].remedy
    assert checks["conversion"].state == "optional" and "no torch:" in checks["conversion"].found
    assert "[convert]" in checks["conversion"].remedy


@pytest.mark.usefixtures("whole", "no_programs")
def test_a_cache_that_nothing_can_be_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "a;b"))
    check = report()["disk"]
    assert check.state == "missing" and "do not take ';' in the name of a folder" in check.found
    assert check.remedy == f"set {paths.CACHE_VARIABLE} to another folder"


@pytest.mark.usefixtures("whole", "no_programs")
def test_broken_patches_and_absent_models() -> None:
    (paths.data_dir("patches") / "series").write_text("gone.patch\n")
    (paths.data_dir("models") / "docs-small" / "model.safetensors").unlink()
    checks = report()
    assert "gone.patch" in checks["patch set"].found and checks["patch set"].state == "missing"
    assert checks["build"].state == "missing"
    assert checks["embedded models"].state == "missing"


@pytest.mark.usefixtures("whole", "no_programs")
def test_builds_of_another_patch_set_are_told() -> None:
    other = paths.builds_dir() / "other"
    other.mkdir()
    (other / manifest.MANIFEST).touch()
    assert "(1 for others)" in report()["build"].found


@pytest.mark.usefixtures("whole", "no_programs")
def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(command, ["--json"])
    data: dict[str, Any] = json.loads(result.output)
    assert (result.exit_code, data["healthy"]) == (0, True)
    assert {"name", "state", "found", "remedy"} == set(data["checks"][0])
    monkeypatch.setattr(toolchain, "git", lambda: None)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 1
    assert "missing" in result.output
    assert "install git" in result.output.partition("To mend:")[2]


def test_the_real_machine_can_be_examined() -> None:
    assert len(report()) == 17


@pytest.mark.parametrize(
    ("architecture", "head", "state", "found", "remedy"),
    [
        ("llama", 128, "ok", "can be in f32, f16, bf16, q8_0, q4_0", ""),
        (
            "llama",
            32,
            "optional",
            "iso3 takes 6.50 bits a value in heads of K with 32",
            "ggufrq run m --kv q8_0",
        ),
        ("llama", 16, "ok", "can be in f32, f16, bf16, ", ""),
        ("deepseek4", 512, "optional", "cannot be read; q8_0 or q4_0 can be used", "ggufrq run m --kv q8_0"),
        ("grok", 128, "optional", "without which V cannot be quantized; f16", "ggufrq run m --kv f16"),
        ("bert", 64, "ok", "keeps no K and V", ""),
    ],
)
def test_what_the_cache_of_a_model_can_be_in(
    architecture: str, head: int, state: str, found: str, remedy: str
) -> None:
    numbers = {"block_count": 2, "attention.head_count": 4, "embedding_length": 512}
    numbers |= {"attention.key_length": head, "attention.value_length": head}
    values: dict[str, Any] = {f"{architecture}.{key}": value for key, value in numbers.items()}
    check = doctor.of_model("m", values | {"general.architecture": architecture}, gpu=False)
    assert (check.state, check.remedy) == (state, remedy) and found in check.found, check
    assert doctor.of_model("m", {"general.architecture": architecture}, gpu=False).state == "optional"

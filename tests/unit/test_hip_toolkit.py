"""AMD's compiler and libraries: found, too old, or in parts. The output of hipconfig is Debian's."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ggufrq.base.errors import BuildError
from ggufrq.build import backends, builds, doctor, hip_toolkit
from ggufrq.build.backends import hip
from ggufrq.build.project import BuildOptions, Project, build_key, llama_project
from ggufrq.cli.build import build as command
from ggufrq.patchset.series import PatchSet

LOGS = Path(__file__).parent.parent / "logs" / "build"
NEW = (LOGS / "hipconfig-6.4.txt").read_text(encoding="utf-8")  # forky: hipcc 7.0.2, HIP 6.4.3
OLD = (LOGS / "hipconfig-5.2.txt").read_text(encoding="utf-8")  # bookworm: hipcc 5.2.3
AGENTS = "gfx000\ngfx1100\ngfx1100\ngfx90a\n"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A folder for ROCm that the user has chosen, empty as yet."""
    monkeypatch.delenv("HIP_PATH", raising=False)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    hip_toolkit._output.cache_clear()
    return tmp_path / "rocm"


def program(root: Path, name: str, output: str, rc: int = 0) -> None:
    path = root / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {rc}\n")
    path.chmod(0o755)
    hip_toolkit._output.cache_clear()


def rocm(root: Path, output: str = NEW) -> Path:
    """A complete ROCm whose hipconfig prints what a real one did, but for the places."""
    places = {":/usr\n": f":{root}\n", ": /usr\n": f": {root}\n", "/usr/lib/llvm-21/bin": f"{root}/llvm/bin"}
    for real, fake in places.items():
        output = output.replace(real, fake)
    program(root, "hipconfig", output)
    for name in ("include/hip/hip_runtime.h", "include/hipblas/hipblas.h", "include/rocblas/rocblas.h"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    program(root / "llvm", "clang++", "")
    return root


def test_what_hipconfig_prints() -> None:
    new, old = hip_toolkit.parse_toolkit(NEW), hip_toolkit.parse_toolkit(OLD)
    assert new == hip_toolkit.Toolkit(Path("/usr"), Path("/usr/lib/llvm-21/bin/clang++"), "6.4.43484")
    assert old == hip_toolkit.Toolkit(Path("/usr"), Path("/usr/bin/clang++"), "5.2.21153")
    assert new.fit and not old.fit
    assert hip_toolkit.parse_toolkit("hipconfig: command not understood\n") is None


@pytest.mark.parametrize(("version", "fit"), [("6.0.32830", False), ("6.1.40091", True), ("7.0.2", True)])
def test_the_oldest_version(version: str, fit: bool) -> None:
    assert hip_toolkit.Toolkit(Path(), Path(), version).fit is fit


def test_no_hip_at_all(root: Path) -> None:
    (lack,) = hip_toolkit.missing()
    assert "not found" in lack.what and "ROCm 6.1 or newer" in lack.remedy
    program(root, "hipconfig", NEW, rc=1)  # a broken one is none
    assert hip_toolkit.toolkit() is None
    with pytest.raises(BuildError, match="hipconfig, hipcc"):
        hip_toolkit.find()


def test_one_that_is_too_old_is_refused_before_anything_is_fetched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rocm(root, OLD)
    (lack,) = hip_toolkit.missing()
    assert lack.what == f"HIP 5.2.21153 in {root} is too old, llama.cpp needs 6.1"
    with pytest.raises(BuildError, match="too old"):
        builds.ensure_build(BuildOptions("hip", native=False), source="pypi")
    told = doctor._amd_gpu()
    assert (told.state, told.remedy) == ("optional", lack.remedy) and "no card, and HIP 5.2" in told.found
    result = CliRunner().invoke(command, ["--backend", "hip"])
    assert isinstance(result.exception, BuildError) and "ROCm 6.1" in (result.exception.remedy or "")


def test_a_complete_one(root: Path) -> None:
    rocm(root)
    assert hip_toolkit.missing() == []
    defined = backends.get("hip").definitions(native=False)
    assert defined["GGML_HIP"] == "ON" and defined["CMAKE_HIP_ARCHITECTURES"] == hip.ARCHITECTURES
    assert defined["CMAKE_HIP_COMPILER"] == str(root / "llvm" / "bin" / "clang++")
    assert defined["CMAKE_HIP_COMPILER_ROCM_ROOT"] == defined["CMAKE_PREFIX_PATH"] == str(root)
    assert backends.get("hip").identity(native=False).endswith("hip 6.4.43484")
    assert backends.get("hip").versions() == {"hip": "6.4.43484"}
    assert doctor._amd_gpu().state == "ok" and "HIP 6.4.43484" in doctor._amd_gpu().found


@pytest.mark.parametrize(
    ("gone", "what"),
    [
        ("include/hip/hip_runtime.h", "the headers of the runtime"),
        ("include/hipblas/hipblas.h", "hipBLAS"),
        ("include/rocblas/rocblas.h", "rocBLAS"),
        ("llvm/bin/clang++", "the compiler"),
    ],
)
def test_parts_that_are_missing_are_named(root: Path, gone: str, what: str) -> None:
    (rocm(root) / gone).unlink()
    (lack,) = hip_toolkit.missing()
    assert what in lack.what and "was not found" in lack.what


def test_cards(root: Path) -> None:
    assert hip_toolkit.cards() == ()
    program(rocm(root), "rocm_agent_enumerator", AGENTS)
    assert hip_toolkit.cards() == ("gfx1100", "gfx1100", "gfx90a")
    assert hip.architectures() == "gfx1100;gfx90a"
    assert hip.versions()["cards"] == "gfx1100, gfx1100, gfx90a"
    assert doctor._amd_gpu().found.startswith("gfx1100")
    program(root, "rocm_agent_enumerator", "Traceback (most recent call last):", rc=1)  # there is no driver
    assert hip_toolkit.cards() == () and hip.architectures() == hip.ARCHITECTURES


def test_it_is_taken_only_where_it_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has run our kernels on an AMD card."""
    program(rocm(root), "rocm_agent_enumerator", AGENTS)
    monkeypatch.setattr("ggufrq.build.cuda_toolkit.cards", lambda: ())
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert backends.default() == "cpu"
    monkeypatch.setenv(backends.VARIABLE, "hip")
    assert backends.default() == "hip"


def test_the_architecture_makes_another_build(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rocm(root)
    seen: list[BuildOptions] = []

    def stop(options: BuildOptions, **_: object) -> None:
        seen.append(options)
        raise BuildError("enough")

    monkeypatch.setattr(builds, "ensure_build", stop)
    for arguments in (["--hip-arch", "gfx1100"], []):
        CliRunner().invoke(command, ["--backend", "hip", *arguments])
    one, usual = seen
    assert one.cmake_args == ("-DCMAKE_HIP_ARCHITECTURES=gfx1100",) and usual.cmake_args == ()
    project = llama_project()
    assert build_key(project, one) != build_key(project, usual)


def test_where_the_patch_of_cuda_is_left_out_there_is_no_hip_either(root: Path) -> None:
    rocm(root)
    whole = llama_project()
    left = PatchSet(**{**vars(whole.patch_set), "without": ("cuda",)})
    with pytest.raises(BuildError, match="do not run on hip"):
        builds.ensure_build(BuildOptions("hip"), project=Project(whole.pin, left))

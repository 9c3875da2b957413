"""Every stage of a build, on a tiny CMake project with the real git, CMake, Ninja and compiler."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import tiny
from processes import gone

from ggufrq.base import machine, proc
from ggufrq.base.errors import BuildError, PatchError, SourceError, ToolError, UsageError
from ggufrq.base.results import file_sha256
from ggufrq.build import backends, builds, toolchain
from ggufrq.build.project import Build, BuildOptions, Project, build_key
from ggufrq.patchset.series import load

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(os.name != "posix", reason="the tiny project uses sh"),
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "the base"
    tiny.make(folder)
    return folder


@pytest.fixture
def project(base: Path) -> Project:
    return tiny.project(base)


def make(base: Path, **options: Any) -> Build:
    return builds.ensure_build(project=tiny.project(base), source=str(base / "upstream"), **options)


def answer(made: Build, name: str = "hello") -> str:
    return proc.run([made.tool(name)]).stdout.strip()


@pytest.fixture
def runs(base: Path) -> Iterator[Any]:
    """Start tiny.py as a program of its own; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, tiny.__file__, str(base)]
        env = {**os.environ, "PYTHONPATH": str(Path(builds.__file__).parents[2]), **environment}
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_build_from_nothing(base: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(base)
    assert answer(made) == "42"
    assert made.root.parent == cache / "builds"
    assert made.bin == made.root / "obj" / "bin"
    assert "return 2" in (made.source / "other.c").read_text()
    assert "return 1" in (base / "upstream" / "other.c").read_text()
    said = capsys.readouterr().err
    assert "1 patches, 1 files of ours" in said and "Compiling: " in said
    log = (made.root / "build.log").read_text()
    assert "$ " in log and "Linking C executable" in log
    with pytest.raises(ToolError, match="no program 'llama-cli'") as caught:
        made.tool("llama-cli")
    assert "--target llama-cli" in (caught.value.remedy or "")


def test_manifest(base: Path, project: Project) -> None:
    made = make(base)
    manifest = json.loads((made.root / "manifest.json").read_text())
    assert manifest == made.manifest
    assert manifest["key"] == made.key == build_key(project, BuildOptions())
    assert manifest["llama_cpp"]["commit"] == project.pin.commit
    assert manifest["llama_cpp"]["tree"] == project.pin.tree
    assert manifest["patch_set"] == project.patch_set.hash
    assert manifest["targets"] == ["hello"]
    assert manifest["definitions"]["LLAMA_BUILD_COMMIT"] == f"abcdef012-rq{project.patch_set.hash[:8]}"
    assert set(manifest["versions"]) >= {"ggufrq", "python", "compiler", "cmake", "ninja", "git"}
    assert manifest["seconds"] > 0 and manifest["date"].startswith("20")
    program = manifest["programs"]["hello"]
    assert program["size"] == made.tool("hello").stat().st_size
    assert program["sha256"] == file_sha256(made.tool("hello"))


def test_a_second_call_runs_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(base)

    def refuse(command: list[str], **_: object) -> None:
        raise AssertionError(command)

    monkeypatch.setattr(proc, "_spawn", refuse)
    assert make(base) == first
    assert builds.find_build(project=tiny.project(base)) == first


def test_test_targets_come_into_the_same_build(base: Path, project: Project) -> None:
    made = make(base)
    assert builds.find_build(BuildOptions(tests=True), project=project) is None
    both = make(base, options=BuildOptions(tests=True, jobs=1))
    assert both.root == made.root
    assert answer(both, "test-hello") == "42" == answer(both)
    assert both.manifest["targets"] == ["hello", "test-hello"]
    assert both.manifest["programs"]["hello"] == made.manifest["programs"]["hello"]
    assert builds.find_build(project=project) is not None
    log = (made.root / "build.log").read_text()
    assert log.count("Linking C executable bin/hello") == 1 and log.count("-G Ninja") == 1


@pytest.mark.parametrize("damage", ["gone", "shorter", "same size"])
def test_a_damaged_program_is_built_again(base: Path, project: Project, damage: str) -> None:
    made = make(base)
    program = made.tool("hello")
    content = program.read_bytes()
    if damage == "gone":
        program.unlink()
    else:
        program.write_bytes(content[:-100] if damage == "shorter" else content[:-1] + b"?")
    assert builds.find_build(project=project) is None
    again = make(base)
    assert answer(again) == "42"
    assert again.manifest["programs"]["hello"]["sha256"] == made.manifest["programs"]["hello"]["sha256"]


def test_a_touched_program_is_still_current(base: Path, project: Project) -> None:
    made = make(base)
    os.utime(made.tool("hello"))
    assert builds.find_build(project=project) is not None


def test_the_key_tells_builds_apart(base: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(options: BuildOptions | None = None, of: Project = project) -> str:
        return build_key(of, options or BuildOptions())

    keys = [key(), key(BuildOptions(native=False)), key(BuildOptions(cmake_args=("-DX=1",)))]
    keys.append(key(of=replace(project, pin=replace(project.pin, commit="0" * 40))))
    (base / "patches" / "overlay" / "added.c").write_text("int added(void) { return 41; }\n")
    keys.append(key(of=tiny.project(base)))
    for name in ("CXXFLAGS", "CMAKE_TOOLCHAIN_FILE", "NVCC_APPEND_FLAGS", "HIPFLAGS"):
        monkeypatch.setenv(name, "-O1")
        keys.append(key())
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "processor", lambda: machine.Processor("Other", "x86_64", ("avx2",)))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert all(one.startswith(("abcdef012-cpu-", "000000000-cpu-")) for one in keys)
    assert key(BuildOptions(tests=True, jobs=3)) == key()


def test_a_changed_patch_set_makes_another_build_beside(base: Path) -> None:
    first = make(base)
    (base / "patches" / "overlay" / "added.c").write_text("int added(void) { return 98; }\n")
    second = make(base)
    assert (answer(first), answer(second)) == ("42", "100")
    assert first.root != second.root


def test_prune_keeps_the_current_build_and_one_in_the_making(base: Path, runs: Any, tmp_path: Path) -> None:
    old = make(base)
    marker = tmp_path / "marker"
    (base / "patches" / "overlay" / "added.c").write_text("int added(void) { return 50; }\n")
    other = runs(TINY_STOP_COMPILE=str(marker))
    wait_for(marker, other)
    (base / "patches" / "overlay" / "added.c").write_text("int added(void) { return 98; }\n")
    new = make(base)
    assert builds.prune(new) == [old.root]
    assert not old.root.exists() and answer(new) == "100"
    marker.unlink()
    out, err = other.communicate(timeout=60)
    assert proc.run([Path(out.strip()) / "hello"]).stdout == "52\n", err


def test_edits_in_the_source_are_kept_aside(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(base)
    (made.source / "__pycache__").mkdir()  # running a Python script in it is no edit
    (made.source / "__pycache__" / "x.pyc").touch()
    make(base, options=BuildOptions(tests=True))
    assert "were changed" not in capsys.readouterr().err
    (made.source / "added.c").write_text("int added(void) { return 7; }\n")
    made.tool("hello").unlink()
    assert answer(make(base)) == "42"
    kept = list(made.root.glob("src.edited-*/added.c"))
    assert len(kept) == 1 and "return 7" in kept[0].read_text()
    assert "files in" in capsys.readouterr().err


def test_compiler_error_names_file_error_and_log(base: Path) -> None:
    (base / "patches" / "overlay" / "added.c").write_text("int added(void) { return undeclared_name; }\n")
    with pytest.raises(BuildError) as caught:
        make(base)
    lines = caught.value.message.splitlines()
    assert lines[0] == "llama.cpp could not be compiled: added.c"
    assert "added.c:1:26: error: " in lines[1] and "undeclared_name" in lines[1]
    log = Path(lines[-1].partition("whole log: ")[2])
    assert "undeclared_name" in log.read_text()
    assert not (log.parent / "manifest.json").exists()
    with pytest.raises(BuildError):
        make(base)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-GXcode",),
        ("-B/tmp/x",),
        ("--preset",),
        ("--list-presets=all",),
        ("-N",),
        ("-DCMAKE_RUNTIME_OUTPUT_DIRECTORY=/x",),
        ("-DCMAKE_RUNTIME_OUTPUT_DIRECTORY_RELEASE:PATH=/x",),
        ("-DEXECUTABLE_OUTPUT_PATH=/x",),
        ("-D CMAKE_EXECUTABLE_SUFFIX=.x",),
        ("-D", "CMAKE_GENERATOR=Xcode"),
    ],
)
def test_an_argument_that_puts_the_build_elsewhere(base: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="cannot be passed on to CMake") as caught:
        make(base, options=BuildOptions(cmake_args=("-DX=1", *arguments)))
    assert f"without --cmake-arg {arguments[-1]}" in str(caught.value.remedy)


@pytest.mark.parametrize("letter", [";", '"', "\n", "$", "|"])
def test_a_folder_that_cmake_does_not_take(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / f"a{letter}b"))
    with pytest.raises(BuildError, match="CMake and Ninja do not take") as caught:
        make(base)
    assert repr(letter) in caught.value.message and "GGUFRQ_CACHE" in str(caught.value.remedy)


def test_a_folder_of_windows() -> None:
    assert builds.not_in_paths(PureWindowsPath("C:/Users/me")) == []
    assert builds.not_in_paths(PureWindowsPath("C:/Users/me;you")) == [";"]


def test_a_folder_with_other_letters(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / os.fsdecode(b"a #'(%[!,\xe9\xc3\xa9 b")))
    assert answer(make(base)) == "42"


def test_cmake_error(base: Path) -> None:
    with (base / "upstream" / "CMakeLists.txt").open("a") as file:
        file.write("find_package(NoSuchThingAtAll REQUIRED)\n")
    with pytest.raises(BuildError) as caught:
        make(base)
    assert "CMake could not configure llama.cpp: CMakeLists.txt:" in caught.value.message
    assert "NoSuchThingAtAll" in caught.value.message


def test_a_patch_that_does_not_fit_leaves_no_build(base: Path, cache: Path) -> None:
    (base / "upstream" / "other.c").write_text("int other(void) {\n    return 7;\n}\n")
    with pytest.raises(PatchError, match=r"other\.patch: other\.c, hunk 1 of 1"):
        make(base)
    assert not list((cache / "builds").glob("*/src"))


def test_a_source_that_is_not_the_pinned_one(base: Path, project: Project) -> None:
    (base / "upstream" / "other.c").write_text("int other(void) {\n    return 7;\n}\n")
    with pytest.raises(SourceError, match="wanted is"):
        builds.ensure_build(project=project, source=str(base / "upstream"))


def test_a_wrong_source_is_told_even_when_the_build_is_there(base: Path, project: Project) -> None:
    make(base)
    (base / "upstream" / "other.c").write_text("int other(void) {\n    return 7;\n}\n")
    with pytest.raises(SourceError, match="wanted is"):
        builds.ensure_build(project=project, source=str(base / "upstream"))


@pytest.mark.parametrize("stage", ["COPY", "CONFIGURE", "COMPILE"])
def test_killed_in_the_middle_the_next_run_completes(
    base: Path, project: Project, runs: Any, tmp_path: Path, stage: str
) -> None:
    marker = tmp_path / "marker"
    process = runs(**{f"TINY_STOP_{stage}": str(marker)})
    wait_for(marker, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert builds.find_build(project=project) is None
    made = make(base)
    assert answer(made) == "42"
    assert not (made.root / "src.tmp").exists()
    log = (made.root / "build.log").read_text()
    assert log.count("-G Ninja") == (2 if stage == "CONFIGURE" else 1)  # what was finished is not done again


def test_ctrl_c_ends_the_compilers_and_the_next_run_completes(base: Path, runs: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    process = runs(TINY_STOP_COMPILE=str(marker))
    wait_for(marker, process)
    compiler = int(marker.read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert gone(compiler)
    assert answer(make(base)) == "42"


def test_two_at_once_build_only_once(base: Path, project: Project, runs: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    first = runs(TINY_STOP_COMPILE=str(marker))
    wait_for(marker, first)
    second = runs()
    told = ""
    while "being made by another ggufrq" not in told:
        line = second.stderr.readline()
        assert line, told
        told += line
    marker.unlink()
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert "Compiling" not in told + outputs[1][1]
    found = builds.find_build(project=project)
    assert found is not None and answer(found) == "42"
    assert (found.root / "build.log").read_text().count("Linking C executable") == 1


def test_another_cmake_configures_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(base)
    real = toolchain.cmake()
    assert real is not None
    other = tmp_path / "cmake"
    other.write_text(f'#!/bin/sh\nexec "{real.path}" "$@"\n')
    other.chmod(0o755)
    monkeypatch.setattr(toolchain, "cmake", lambda: toolchain.Program(other, real.version))
    both = make(base, options=BuildOptions(tests=True))
    assert both.root == made.root and answer(both, "test-hello") == "42"
    assert (made.root / "build.log").read_text().count("-G Ninja") == 2


def test_ccache_is_used_if_present(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = tmp_path / "used"
    fake = tmp_path / "ccache"
    fake.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "ccache 4"; exit; fi\necho x >> "{used}"\nexec "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    made = make(base)
    assert used.read_text().count("x") >= 3
    assert made.manifest["versions"]["ccache"] == "ccache 4"


def test_a_full_disk_is_explained(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda _: 5_000_000)
    with pytest.raises(BuildError, match=r"is full \(0\.0 GB free") as caught:
        make(base)
    assert "GGUFRQ_CACHE" in (caught.value.remedy or "")


def test_a_disk_that_fills_up_meanwhile(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", full)
        with pytest.raises(BuildError, match="is full"):
            make(base)
    assert answer(make(base)) == "42"


def test_missing_compiler_and_git_are_named_with_the_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found, git was not found") as caught:
        make(base)
    assert "git" in (caught.value.remedy or "")


def test_without_a_build(base: Path) -> None:
    with pytest.raises(BuildError) as caught:
        builds.require_build()
    assert caught.value.remedy == "ggufrq build"
    with pytest.raises(UsageError, match="no backend 'abacus'"):
        backends.get("abacus")


def test_a_manifest_from_elsewhere_is_not_believed(base: Path, project: Project) -> None:
    made = make(base)
    manifest = made.root / "manifest.json"
    for bad in ("", "[]", "{}", json.dumps({**made.manifest, "key": "other"}), json.dumps({"key": made.key})):
        manifest.write_text(bad)
        assert builds.find_build(project=project) is None
    assert load(base / "patches").hash == project.patch_set.hash
    assert answer(make(base)) == "42"

"""The real build: llama.cpp at the pinned commit with our patch set."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ggufrq import cli
from ggufrq.base import proc
from ggufrq.base.errors import PatchError
from ggufrq.base.trees import tree_hash
from ggufrq.build import builds
from ggufrq.build.project import TARGETS, TEST_TARGETS, Build, BuildOptions
from ggufrq.measure.validate.check import probe
from ggufrq.patchset.patches import function_of
from ggufrq.patchset.series import default_patch_set
from ggufrq.source import obtain
from ggufrq.source.pin import load_pin
from ggufrq.tools.programs import Programs

pytestmark = pytest.mark.build

Captured = pytest.CaptureFixture[str]


def test_every_tool_is_there_and_says_what_it_was_built_from(llama_build: Build) -> None:
    for name in (*TARGETS, *TEST_TARGETS):
        assert llama_build.tool(name).is_file()
    done = proc.run([llama_build.tool("llama-cli"), "--version"])
    stamp = f"{load_pin().short}-rq{default_patch_set().hash[:8]}"
    assert stamp in done.stdout + done.stderr
    assert llama_build.manifest["llama_cpp"]["commit"] == load_pin().commit
    assert llama_build.manifest["patch_set"] == default_patch_set().hash


def test_programs_run_from_elsewhere_without_the_environment(llama_build: Build, tmp_path: Path) -> None:
    """Shared libraries are found beside the programs, also after the folder was moved."""
    moved = tmp_path / "moved bin"
    shutil.copytree(llama_build.bin, moved, symlinks=True)
    done = proc.run(
        [moved / "llama-quantize", "--help"], cwd=tmp_path, env={"LD_LIBRARY_PATH": None}, check=False
    )
    assert "usage" in (done.stdout + done.stderr).lower()


@pytest.mark.skipif(sys.platform != "linux", reason="the variable and the linker's switch have other names")
def test_libraries_of_others_do_not_come_in(
    llama_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by hand nor by our commands, nor when the build is held against the specification."""
    source = tmp_path / "none.c"
    source.write_text("int nothing_of_ours;\n")
    for name in {path.name for path in llama_build.bin.glob("lib*.so*")}:
        proc.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / name])
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    tool = llama_build.tool("llama-cli")
    by_hand = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert by_hand.returncode == 0, by_hand.stderr
    # nor from the folder that one is in
    stub = tmp_path / "here" / "libgomp.so.1"
    stub.parent.mkdir()
    proc.run(["cc", "-shared", "-fPIC", source, "-o", stub])
    monkeypatch.delenv("LD_LIBRARY_PATH")
    by_hand = subprocess.run(
        [tool, "--version"], cwd=stub.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert by_hand.returncode == 0, by_hand.stderr
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    elsewhere = tmp_path / "another llama.cpp"
    shutil.copytree(llama_build.bin, elsewhere, symlinks=True)
    assert "iso3" in Programs.in_folder(elsewhere).cache_types
    assert all(check["ok"] for check in probe(llama_build, ["iso3"]))


def test_a_second_build_does_nothing(
    llama_build: Build, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], **_: object) -> None:
        raise AssertionError(f"ran {command}")

    monkeypatch.setattr(proc, "_spawn", refuse)
    assert cli.invoke(["build", "--tests"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(llama_build.bin) and "up to date" in err
    assert cli.invoke(["build", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == llama_build.key
    assert cli.invoke(["where", "bin"]) == 0 == cli.invoke(["where", "source"])
    assert capsys.readouterr().out.splitlines() == [str(llama_build.bin), str(llama_build.source)]
    assert builds.find_build(BuildOptions(tests=True)) == llama_build == builds.require_build()


def test_the_source_is_the_pinned_one_plus_the_patch_set(llama_build: Build) -> None:
    tree = obtain.cached(load_pin(), thorough=True)
    assert tree is not None and tree_hash(tree) == load_pin().tree
    changed = set()
    for path in llama_build.source.rglob("*"):
        name = path.relative_to(llama_build.source).as_posix()
        if path.is_file() and "__pycache__" not in path.parts:
            original = tree / name
            if not original.is_file() or original.read_bytes() != path.read_bytes():
                changed.add(name)
    patch_set = default_patch_set()
    assert changed == {*patch_set.files, *patch_set.overlay}


def test_the_patch_set_applies_to_the_pinned_source(llama_build: Build, capsys: Captured) -> None:
    assert cli.invoke(["build", "--check"]) == 0
    assert f"applies to llama.cpp {load_pin().commit}" in capsys.readouterr().out


def test_every_hunk_records_its_function(llama_build: Build) -> None:
    """So that a hunk whose lines stand in another function too cannot land there. See patches.fit."""
    tree = obtain.cached(load_pin())
    assert tree is not None
    seen: set[str] = set()
    for patch in default_patch_set().patches:
        for changed in patch.files:
            lines = (tree / changed.file).read_text(encoding="utf-8").split("\n")
            if changed.file not in seen:  # a later patch of the same file counts lines after the earlier one
                for hunk in changed.hunks:
                    assert function_of(lines, hunk.line)[: len(hunk.context)] == hunk.context, hunk
        seen |= {changed.file for changed in patch.files}


@pytest.mark.parametrize("file", default_patch_set().files)
def test_a_changed_hooked_file_is_named_with_its_hunk_and_left_alone(
    llama_build: Build, tmp_path: Path, capsys: Captured, file: str
) -> None:
    pristine = obtain.cached(load_pin())
    assert pristine is not None
    patch_set = default_patch_set()
    tree = tmp_path / "changed llama.cpp"
    for name in patch_set.files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pristine / name, tree / name)
    patch = next(patch for patch in patch_set.patches if file in {changed.file for changed in patch.files})
    hunk = next(changed.hunks[-1] for changed in patch.files if changed.file == file)
    lines = (tree / file).read_text(encoding="utf-8").split("\n")
    for at in range(hunk.line - 1, min(hunk.line + 5, len(lines))):
        lines[at] += " // changed"
    (tree / file).write_text("\n".join(lines), encoding="utf-8")
    before = tree_hash(tree)
    assert cli.invoke(["build", "--check", "--source", str(tree)]) == PatchError.exit_code
    err = capsys.readouterr().err
    assert f"{patch.name}: {file}, hunk {hunk.number} of " in err
    assert tree_hash(tree) == before


@pytest.mark.slow
def test_upstreams_test_of_quantization_functions_passes(llama_build: Build) -> None:
    proc.run([llama_build.tool("test-quantize-fns")], timeout=600)


def test_a_compiler_that_starts_at_c_plus_plus_20_takes_our_code(llama_build: Build) -> None:
    """Upstream asks for C++17 at least, so that the compiler's own default counts: C++20 from GCC 16 on."""
    ours = {Path(file).name for file in default_patch_set().overlay if file.endswith(".cpp")} | {"arg.cpp"}
    commands = json.loads((llama_build.root / "obj" / "compile_commands.json").read_text())
    done = {}
    for entry in commands:
        name = Path(entry["file"]).name
        if name in ours and name not in done:
            command = re.sub(r" -o \S+ -c | -std=\S+", " ", entry["command"])
            checked = proc.run(
                [*shlex.split(command), "-std=gnu++20", "-fsyntax-only"],
                cwd=Path(entry["directory"]),
                check=False,
            )
            done[name] = checked.stderr if checked.rc else ""
    assert "arg.cpp" in done and "rq-fattn.cpp" in done
    assert not any(done.values()), done

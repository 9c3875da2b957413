"""What a compatibility row says: of a small upstream that the patches fit or not, and of builds that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ggufrq import cli
from ggufrq.base import paths
from ggufrq.base.errors import BuildError, PatchError, ToolError
from ggufrq.build.project import Build, BuildOptions
from ggufrq.cli import docs
from ggufrq.cli import upstream as command
from ggufrq.flows import upstream
from ggufrq.source import snapshot as snapshot_module
from ggufrq.source.pin import Pin
from ggufrq.source.snapshot import Snapshot

PATCH = "Hook.\n\n--- a/a.c\n+++ b/a.c\n@@ -1,2 +1,3 @@\n line 1\n+hook\n line 2\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "series").write_text("x.patch\n")
    (folder / "x.patch").write_text(PATCH)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Snapshot:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a.c").write_text("line 1\nline 2\n")
    return Snapshot("made-up 1.0", Pin("", "a" * 40, "b" * 40, "2026-01-01"), folder)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Builds that need no compiler; what their programs do is set by the test."""
    made = Build("key", tmp_path, tmp_path, tmp_path, {"versions": {"compiler": "cc 1"}})
    says: dict[str, Any] = {"validate": {"kld_mean": 0.01, "kld_mean_err": 0.001, "ppl": 10.0}, "failed": []}

    def ensure(options: BuildOptions, *, project: object = None) -> Build:
        says.setdefault("backends", []).append(options.backend)
        if project is not None and "build" in says:
            raise says["build"]
        return made

    def validate(*_: object, **__: object) -> dict[str, Any]:
        says["calls"] = says.get("calls", 0) + 1
        figures = says["validate"] if says["calls"] == 2 else {**says["validate"], "kld_mean": 0.01}
        return {"cases": [{"name": "iso3", "quality": [figures]}], "checks": []}

    monkeypatch.setattr(upstream, "ensure_build", ensure)
    monkeypatch.setattr(upstream, "validate", validate)
    monkeypatch.setattr(upstream, "failed", lambda _: says["failed"])
    for name in ("_functions", "_operations", "_sentence"):
        monkeypatch.setattr(upstream, name, lambda _, name=name: says.get(name, "ok"))
    return says


def test_it_applies_builds_and_passes(root: Path, tree: Snapshot, built: dict[str, Any]) -> None:
    row = upstream.check(tree, root)
    assert upstream.passed(row) and row["applies"] and row["builds"] and row["problems"] == []
    assert set(row["tests"].values()) == {"ok"} and len(row["tests"]) == 4
    assert row["figures"]["iso3"] == {
        "ppl": 10.0, "ppl_pinned": 10.0, "kld": 0.01, "kld_pinned": 0.01, "alike": True,
    }  # fmt: skip
    assert row["compiler"] == "cc 1" and row["commit"] == "a" * 40 and not row["pinned"]
    assert json.loads(json.dumps(row)) == row
    assert "mean KLD 0.01000, pinned 0.01000" in upstream.render(row)


def test_a_backend_is_left_out(
    root: Path, tree: Snapshot, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "series").write_text("x.patch\nmetal/y.patch\n")
    (root / "metal").mkdir()
    (root / "metal" / "y.patch").write_text(PATCH.replace("line", "other line"))
    beside = root / "compat" / ("a" * 9) / "metal"
    beside.mkdir(parents=True)
    (beside / "y.patch").write_text("No Metal.\n\nWithout: metal/y.patch\n")
    monkeypatch.setenv("GGUFRQ_BACKEND", "metal")
    row = upstream.check(tree, root)
    assert upstream.passed(row) and (row["without"], row["fitted"]) == (["metal"], [])
    assert built["backends"] == ["cpu", "cpu"]
    assert "as it is; without metal" in upstream.render(row)
    assert "| as it is, without Metal | yes |" in docs.table([row])


def test_it_does_not_apply(root: Path, tree: Snapshot, built: dict[str, Any]) -> None:
    (tree.tree / "a.c").write_text("other\n")
    row = upstream.check(tree, root)
    assert not upstream.passed(row) and row["builds"] is None and "calls" not in built
    assert row["problems"] == ["x.patch: a.c, hunk 1 of 1 (line 1)"]
    assert "applies  no" in upstream.render(row) and "problem: x.patch" in upstream.render(row)


def test_it_does_not_build(root: Path, tree: Snapshot, built: dict[str, Any]) -> None:
    built["build"] = BuildError("a.c: no such thing")
    row = upstream.check(tree, root)
    assert (row["applies"], row["builds"], row["tests"]) == (True, False, {})
    assert row["problems"] == ["a.c: no such thing"] and not upstream.passed(row)


def test_a_test_fails_and_the_others_are_still_run(
    root: Path, tree: Snapshot, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Build) -> str:
        raise ToolError("test-quantize-fns failed with exit status 1")

    monkeypatch.setattr(upstream, "_functions", fails)
    row = upstream.check(tree, root)
    assert row["tests"]["test-quantize-fns"] == "failed" and row["tests"]["validate"] == "ok"
    assert not upstream.passed(row) and "exit status 1" in row["problems"][0]


def test_a_cache_that_costs_more_than_in_the_pinned_build_fails(
    root: Path, tree: Snapshot, built: dict[str, Any]
) -> None:
    built["validate"]["kld_mean"] = 0.02
    row = upstream.check(tree, root)
    assert row["tests"]["validate"] == "failed" and not row["figures"]["iso3"]["alike"]
    assert row["problems"] == ["validate: iso3: mean KLD is 0.02000, in the pinned build 0.01000"]


def test_what_validate_finds_fails(root: Path, tree: Snapshot, built: dict[str, Any]) -> None:
    built["failed"] = ["iso3: code: 3 of 25600 bytes differ"]
    assert upstream.check(tree, root)["problems"] == ["validate: iso3: code: 3 of 25600 bytes differ"]


def test_the_command_keeps_a_row_and_fails_with_it(
    root: Path,
    tree: Snapshot,
    built: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = paths.data_dir("cmake")
    monkeypatch.setattr(paths, "data_dir", lambda name: options if name == "cmake" else root)
    monkeypatch.setattr(snapshot_module, "snapshot", lambda _: tree)
    assert cli.invoke(["upstream", "check", "--source", "x", "--no-build"]) == 0
    assert not (root / upstream.ROWS).exists()
    assert cli.invoke(["upstream", "check", "--source", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["builds"] is True
    (tree.tree / "a.c").write_text("other\n")
    assert cli.invoke(["upstream", "check", "--source", "x"]) == PatchError.exit_code
    assert [row["applies"] for row in upstream.read_rows(root)] == [False]
    assert "upstream import DIR --source x" in capsys.readouterr().err
    monkeypatch.setattr(command.paths, "in_checkout", lambda: False)
    (tree.tree / "a.c").write_text("line 1\nline 2\n")
    assert cli.invoke(["upstream", "check", "--source", "x"]) == 0
    assert [row["applies"] for row in upstream.read_rows(root)] == [False]  # a wheel's data is not written

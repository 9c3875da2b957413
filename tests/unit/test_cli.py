from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from ggufrq import __version__, cli
from ggufrq.base import log, paths
from ggufrq.base.errors import BuildError, GgufrqError, ModelError, PatchError
from ggufrq.base.trees import tree_hash
from ggufrq.build import builds
from ggufrq.build.project import Build
from ggufrq.patchset.series import default_patch_set
from ggufrq.source.pin import load_pin

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], int]:
    """Run a function as the command `x` and return the exit status."""

    def run(body: Callable[[], None], *options: str) -> int:
        monkeypatch.setitem(cli.COMMANDS, "x", "tests:none")
        monkeypatch.setattr(cli._LazyGroup, "get_command", lambda *_: click.Command("x", callback=body))
        return cli.invoke([*options, "x"])

    return run


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ModelError("no model", remedy="get one"), 7, ["error: no model", "  try: get one"]),
        (BuildError("no build"), 5, ["error: no build"]),
        (
            KeyboardInterrupt(),
            130,
            ["", "interrupted; what was finished is kept, the same command goes on from there"],
        ),
        (
            OSError(28, "No space left on device", "/x/y"),
            1,
            [
                "error: the disk is full (/x/y)",
                "  try: free some space, or set GGUFRQ_CACHE to a folder on a larger disk",
            ],
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, None),
    ],
)
def test_errors_are_two_lines(
    command: Callable[..., int], capsys: Captured, error: BaseException, status: int, lines: list[str] | None
) -> None:
    assert command(raising(error)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    if lines is not None:
        assert err.splitlines() == lines


def test_traceback_only_with_debug_but_always_in_the_log(
    command: Callable[..., int], capsys: Captured
) -> None:
    assert command(raising(GgufrqError("bad"))) == 1
    assert "Traceback" not in capsys.readouterr().err
    latest = log.latest()
    assert latest is not None and "Traceback" in latest.read_text()
    assert command(raising(GgufrqError("bad")), "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_success_and_explicit_status(command: Callable[..., int]) -> None:
    assert command(lambda: None) == 0
    assert command(lambda: click.get_current_context().exit(1)) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["quantise", "x"], "No such command 'quantise'. Did you mean quantize?"),
        (["where"], "Missing argument"),
        (["where", "there"], "is not one of 'bin', 'source', 'cache', 'log'"),
        (["build", "--backend", "abacus"], "is not one of 'auto', 'cpu'"),
        (["build", "--jobs", "0"], "0 is not in the range"),
        (["serve", "no-model.gguf", "--draft-kv", "iso3"], "--draft-kv is for the cache of a draft"),
    ],
)
def test_usage_errors(arguments: list[str], expected: str, capsys: Captured) -> None:
    assert cli.invoke(arguments) == 2
    assert expected in capsys.readouterr().err


def test_no_sentence_of_the_help_is_cut_off(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.invoke(["--help"]) == 0
    shown = capsys.readouterr().out.partition("Make:")[2]
    assert "..." not in shown and "find the best recipe under a budget" in " ".join(shown.split())


@pytest.mark.usefixtures("no_programs")
def test_version(capsys: Captured) -> None:
    assert cli.invoke(["--version"]) == 0
    out = capsys.readouterr().out
    assert f"ggufrq {__version__}\n" in out
    assert load_pin().commit in out and default_patch_set().hash in out


@pytest.mark.usefixtures("no_programs")
def test_where(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cli.invoke(["where", "cache"]) == 0
    assert cli.invoke(["where", "log"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(paths.cache_dir()), str(paths.logs_dir())]
    assert list(paths.logs_dir().iterdir()) == []  # asking leaves no log
    assert cli.invoke(["where", "bin"]) == 5
    assert "try: ggufrq build" in capsys.readouterr().err
    made = Build("key", tmp_path, tmp_path / "obj" / "bin", tmp_path / "src", {})
    monkeypatch.setattr(builds, "require_build", lambda: made)
    assert cli.invoke(["where", "bin"]) == 0 == cli.invoke(["where", "source"])
    assert capsys.readouterr().out.splitlines() == [str(made.bin), str(made.source)]


def test_every_command_has_help(capsys: Captured) -> None:
    for name in cli.COMMANDS:
        assert cli.invoke([name, "--help"]) == 0, name
        assert "Usage: ggufrq " + name in capsys.readouterr().out
    assert cli.invoke(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.COMMANDS)


def test_the_help_lists_commands_by_what_they_are_for(capsys: Captured) -> None:
    assert cli.invoke(["--help"]) == 0
    _, *sections = re.split(r"^(\w[\w ]*):$", capsys.readouterr().out, flags=re.MULTILINE)
    listed = {
        title: tuple(re.findall(r"^  ([a-z]+) ", body, re.MULTILINE))
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    }
    assert {title: names for title, names in listed.items() if title != "Options"} == cli.GROUPS
    named = [name for names in cli.GROUPS.values() for name in names]
    assert len(named) == len(set(named)) and named == list(cli.COMMANDS)


@pytest.fixture
def patched_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain folder to which our patch set, replaced by a small one, applies."""
    root, tree = tmp_path / "patches", tmp_path / "tree"
    (root / "overlay").mkdir(parents=True)
    tree.mkdir()
    (tree / "a.c").write_text("one\ntwo\nthree\n")
    (root / "series").write_text("a.patch\n")
    (root / "a.patch").write_text(
        "Why.\n\n--- a/a.c\n+++ b/a.c\n@@ -1,3 +1,4 @@\n one\n two\n+hook\n three\n"
    )
    monkeypatch.setattr(paths, "data_dir", lambda name: tmp_path / name)
    return tree


def test_check_of_a_folder(patched_tree: Path, capsys: Captured) -> None:
    before = tree_hash(patched_tree)
    assert cli.invoke(["build", "--check", "--source", str(patched_tree)]) == 0
    out = capsys.readouterr().out
    assert "the patch set applies" in out and "1 patches, 1 hunks in 1 files" in out
    assert f"(tree {before}; the patches are made for {load_pin().commit})" in out
    assert cli.invoke(["build", "--check", "--source", str(patched_tree), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["applies"] is True
    (patched_tree / "a.c").write_text("one\ntwo and a half\nthree\n")
    changed = tree_hash(patched_tree)
    assert cli.invoke(["build", "--check", "--source", str(patched_tree)]) == PatchError.exit_code
    out, err = capsys.readouterr()
    assert out == "" and "a.patch: a.c, hunk 1 of 1 (line 1)" in err
    assert tree_hash(patched_tree) == changed
    assert sorted(path.name for path in patched_tree.iterdir()) == ["a.c"]


def test_check_tells_the_commit_of_a_checkout(
    patched_tree: Path, capsys: Captured, git: Callable[..., str]
) -> None:
    git(patched_tree, "init", "-q")
    git(patched_tree, "add", "-A")
    git(patched_tree, "commit", "-q", "-m", "x")
    commit = git(patched_tree, "rev-parse", "HEAD")
    assert cli.invoke(["build", "--check", "--source", str(patched_tree)]) == 0
    assert f"commit {commit}; the patches are made for" in capsys.readouterr().out


def test_check_of_a_patch_set_that_is_not_in_order(patched_tree: Path, capsys: Captured) -> None:
    (patched_tree.parent / "patches" / "lost.patch").write_text("x")
    assert cli.invoke(["build", "--check", "--source", str(patched_tree)]) == PatchError.exit_code
    assert "lost.patch is not listed in series" in capsys.readouterr().err
    assert cli.invoke(["build", "--check", "--source", "nowhere"]) == PatchError.exit_code


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_unwind(tmp_path: Path, number: int, status: int) -> None:
    code = (
        "import sys, time, click; from ggufrq import cli; from ggufrq.base import proc\n"
        "def body(): proc.run([sys.executable, '-u', '-c', 'import time; print(1); time.sleep(60)'],"
        " on_stdout=lambda _: print('ready', flush=True))\n"
        "cli._LazyGroup.get_command = lambda *_: click.Command('x', callback=body)\n"
        "cli.main(['x'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in err


def test_module_runs_as_a_program() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "ggufrq", "where", "cache"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.strip() == str(paths.cache_dir())

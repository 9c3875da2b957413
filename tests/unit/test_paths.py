from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from shards import split_model

from ggufrq import cli
from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError
from ggufrq.build import builds, doctor
from ggufrq.models import resolve


def test_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / "some where"))
    assert paths.cache_dir() == tmp_path / "some where"
    for folder in (paths.builds_dir(), paths.sources_dir(), paths.logs_dir()):
        assert folder.is_dir() and folder.parent == tmp_path / "some where"


def test_cache_falls_back_to_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGUFRQ_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name, appauthor: str(tmp_path / name))
    assert paths.cache_dir() == tmp_path / "ggufrq"


def test_cache_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(GgufrqError, match="cannot create the folder") as caught:
        paths.cache_dir()
    assert "GGUFRQ_CACHE" in (caught.value.remedy or "")


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without HOME and without an entry in the system's list; temporary files are in the folder."""

    def fails(*_: object, **__: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("GGUFRQ_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", fails)
    monkeypatch.setattr(Path, "expanduser", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_what_only_reads_works(no_home: Path) -> None:
    assert builds.find_build() is None
    assert paths.logs_dir().is_relative_to(no_home)
    (model,) = split_model(no_home / "m-F32", 1)
    result = CliRunner().invoke(cli.cli, ["fallback", "llama.cpp", str(model)], catch_exceptions=False)
    assert result.exit_code == 0 and "q8_0" in result.output
    assert paths.expanded("~/x") == Path("~/x")


def test_without_a_home_the_rest_is_explained(no_home: Path) -> None:
    for arguments in (["where", "cache"], ["run", "~nobody/m.gguf", "-p", "x"], ["build"]):
        result = CliRunner().invoke(cli.cli, arguments)
        assert isinstance(result.exception, GgufrqError), (arguments, result.output, result.exception)
    with pytest.raises(GgufrqError, match="HOME is not set") as caught:
        paths.cache_dir()
    assert "set GGUFRQ_CACHE" in str(caught.value.remedy)
    checks = {check.name: check for check in doctor.examine()}
    assert checks["disk"].state == "missing" and "HOME" in checks["disk"].found


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of others, or on a disk that is read-only: this user's own files are elsewhere."""
    shared = tmp_path / "shared"
    monkeypatch.setenv("GGUFRQ_CACHE", str(shared))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert paths.own_dir("logs") == shared / "logs"
    (shared / "models").mkdir()
    (shared / "models" / "docs-qwen3-8m").mkdir()
    (shared / "profiles").touch()  # nobody, not even root, makes a folder of it
    assert paths.own_dir("profiles").is_relative_to(tmp_path / "temporary")
    assert resolve.embedded_folder("docs-qwen3-8m") == shared / "models" / "docs-qwen3-8m"


def test_that_files_go_elsewhere_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    shared.touch()  # nobody, not even root, makes folders in it
    monkeypatch.setenv("GGUFRQ_CACHE", str(shared))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert paths.logs_dir().is_relative_to(tmp_path)
    assert capsys.readouterr().err == "", "logs alone are worth no word"
    own = paths.own_dir("profiles").parent
    assert paths.own_dir("models").parent == own
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{shared} is not this user's to write to" in said[0]
    assert str(own) in said[0] and "GGUFRQ_CACHE" in said[0]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
@pytest.mark.parametrize("mode", [0o555, 0o500])
def test_a_folder_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    shared = tmp_path / "shared"
    (shared / "logs").mkdir(parents=True)
    (shared / "logs").chmod(mode)
    monkeypatch.setenv("GGUFRQ_CACHE", str(shared))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not paths.logs_dir().is_relative_to(shared)


def test_data_is_taken_from_the_package_before_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ggufrq"
    (tmp_path / "patches").mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", package)
    assert paths.data_dir("patches") == tmp_path / "patches"
    (package / "data" / "patches").mkdir(parents=True)
    assert paths.data_dir("patches") == package / "data" / "patches"
    with pytest.raises(GgufrqError, match="models"):
        paths.data_dir("models")


def test_atomic_write_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file"
    paths.atomic_write(target, "eins ä")
    assert target.read_bytes() == "eins ä".encode()
    paths.atomic_write(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("folder", [False, True])
def test_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(RuntimeError), paths.atomic_path(target) as temporary:
        if folder:
            (temporary / "sub").mkdir(parents=True)
            (temporary / "sub" / "file").write_text("half")
        else:
            temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary != target
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_atomic_folder(tmp_path: Path) -> None:
    with paths.atomic_path(tmp_path / "made") as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert (tmp_path / "made" / "file").exists()


def test_remove_tree_takes_read_only_files(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "y"
    folder.mkdir(parents=True)
    (folder / "file").touch()
    (folder / "file").chmod(stat.S_IRUSR)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    paths.remove_tree(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    paths.remove_tree(tmp_path / "x")

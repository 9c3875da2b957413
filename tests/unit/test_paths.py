from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError


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

"""Any upstream as a verified tree in the cache, on a small upstream with the real git."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ggufrq.base import trees
from ggufrq.base.errors import SourceError
from ggufrq.base.trees import tree_hash
from ggufrq.source import origins
from ggufrq.source import snapshot as module
from ggufrq.source.snapshot import snapshot
from tests.source.conftest import Upstream


@pytest.fixture(autouse=True)
def pinned(upstream: Upstream, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_pin", lambda: upstream.pin)


def test_the_pin(upstream: Upstream) -> None:
    found = snapshot("pin")
    assert found.pinned and found.pin == upstream.pin and found.name == "made-up 1.0"
    assert tree_hash(found.tree) == upstream.pin.tree
    assert snapshot("1.0").pin == found.pin == snapshot(upstream.pin.commit).pin


def test_a_commit_or_a_branch_by_git(upstream: Upstream) -> None:
    found = snapshot(upstream.later)
    assert found.pin.commit == upstream.later and not found.pinned and found.name == upstream.later[:9]
    assert "return 1" in (found.tree / "src" / "main.c").read_text()
    assert snapshot("master").pin == found.pin and snapshot("master").name == "master"
    with pytest.raises(SourceError, match="no-such-tag cannot be fetched"):
        snapshot("no-such-tag")


def test_a_checkout_gives_what_is_committed(upstream: Upstream) -> None:
    (upstream.repository / "src" / "main.c").write_text("not committed\n")
    found = snapshot(str(upstream.repository))
    assert found.pinned and tree_hash(found.tree) == upstream.pin.tree
    with pytest.raises(SourceError, match="no git checkout"):
        snapshot(str(upstream.plain))


def test_an_sdist_is_remembered_by_its_version(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = upstream.sdist.with_name("made_up-1.2.3.tar.gz")
    shutil.copyfile(upstream.sdist, archive)
    found = snapshot(str(archive))
    assert found.name == "made-up 1.2.3" and found.pin.commit == upstream.pin.commit
    monkeypatch.setattr(origins, "download", lambda *_: pytest.fail("fetched again"))
    assert snapshot("1.2.3").pin == found.pin and snapshot(found.source) == found


def test_a_release_is_downloaded(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, version: str, folder: Path) -> Path:
        assert (name, version) == ("made-up", "2.0.0")
        return Path(shutil.copy(upstream.sdist, folder / "made_up-2.0.0.tar.gz"))

    monkeypatch.setattr(origins, "download", download)
    assert snapshot("2.0.0").name == "made-up 2.0.0"


def test_nothing_is_left_of_a_failure(upstream: Upstream, cache: Path) -> None:
    broken = upstream.sdist.with_name("made_up-9.9.9.tar.gz")
    broken.write_bytes(upstream.sdist.read_bytes()[:2000])
    with pytest.raises(Exception, match=r".+"):
        snapshot(str(broken))
    assert not list((cache / "sources").glob(".snapshot*"))


def test_a_file_system_without_modes_and_links(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "KEEPS_MODES", False)
    found = snapshot(str(upstream.sdist))
    assert tree_hash(found.tree) == upstream.pin.tree and not (found.tree / "link").is_symlink()
    assert snapshot(upstream.pin.commit).tree == found.tree

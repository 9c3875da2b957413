"""Every way to the pinned source, on a small upstream with the real git. A local archive plays PyPI."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufrq.base import proc, trees
from ggufrq.base.errors import SourceError, ToolError
from ggufrq.base.results import file_sha256
from ggufrq.base.trees import tree_hash
from ggufrq.source import obtain
from ggufrq.source.origins import checkout_commit
from ggufrq.source.pin import Pin, load_pin

pytestmark = pytest.mark.usefixtures("cache")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run."""
    seen: list[list[str]] = []
    spawn = proc._spawn

    def record(command: list[str], **options: Any) -> Any:
        seen.append(command)
        return spawn(command, **options)

    monkeypatch.setattr(proc, "_spawn", record)
    return seen


@pytest.fixture
def pypi(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What `pip download` brings; no network."""
    offered = {"archive": upstream.sdist}
    run = proc.run

    def pip_or_real(args: Any, **options: Any) -> Any:
        words = [str(word) for word in args]
        if "pip" not in words:
            return run(args, **options)
        folder = Path(words[words.index("--dest") + 1])
        assert words[-1] == "made-up==1.0"
        folder.mkdir()
        shutil.copy(offered["archive"], folder / "made_up-1.0.tar.gz")
        return proc.Completed(words, 0, "", "", 0.1)

    monkeypatch.setattr(proc, "run", pip_or_real)
    return offered


def test_tree_hash_is_gits(upstream: Any) -> None:
    assert tree_hash(upstream.plain) == upstream.pin.tree
    assert tree_hash(upstream.repository) == upstream.pin.tree  # .git left out
    (upstream.plain / "empty" / "folder").mkdir(parents=True)
    assert tree_hash(upstream.plain) == upstream.pin.tree
    (upstream.plain / "run.sh").chmod(0o644)
    assert tree_hash(upstream.plain) != upstream.pin.tree


def test_tree_hash_of_nothing_and_with_names_left_out(tmp_path: Path, upstream: Any) -> None:
    (tmp_path / "none").mkdir()
    assert tree_hash(tmp_path / "none") == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
    (upstream.plain / "src" / "__pycache__").mkdir()
    (upstream.plain / "src" / "__pycache__" / "x.pyc").touch()
    assert tree_hash(upstream.plain) != upstream.pin.tree
    assert tree_hash(upstream.plain, ignore=["__pycache__"]) == upstream.pin.tree


@pytest.mark.parametrize("way", ["git", "pypi", "plain", "checkout", "sdist file", "auto"])
def test_every_way_gives_the_same_tree(upstream: Any, pypi: Any, cache: Path, way: str) -> None:
    given = {"plain": upstream.plain, "checkout": upstream.repository, "sdist file": upstream.sdist}
    tree = obtain.pristine(upstream.pin, str(given.get(way, way)))
    assert tree.is_relative_to(cache)
    assert files(tree) == files(upstream.plain)
    assert tree_hash(tree) == upstream.pin.tree
    left = {path.name for path in tree.parent.parent.iterdir()}
    assert left == {upstream.pin.commit, f"{upstream.pin.commit}.lock"}


def test_cached_source_runs_nothing(upstream: Any, ran: list[list[str]]) -> None:
    first = obtain.pristine(upstream.pin, str(upstream.plain))
    ran.clear()
    for way in ("auto", "git", "pypi"):
        assert obtain.pristine(upstream.pin, way) == first
    assert obtain.cached(upstream.pin) == first
    assert ran == []


def test_a_changed_cached_tree_is_noticed_and_replaced(
    upstream: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = obtain.pristine(upstream.pin, "git")
    (tree / "src" / "main.c").write_text("tampered\n")
    assert obtain.cached(upstream.pin) == tree  # the quick look believes the marker
    assert obtain.cached(upstream.pin, thorough=True) is None
    again = obtain.pristine(upstream.pin, "git")
    assert "tampered" not in (again / "src" / "main.c").read_text()
    assert "is not what was verified" in capsys.readouterr().err


def test_what_a_killed_run_left_is_not_trusted(upstream: Any, cache: Path) -> None:
    home = cache / "sources"
    half = home / f".{upstream.pin.commit}.12345.tmp" / "llama.cpp"
    half.mkdir(parents=True)
    (half / "half").touch()
    no_marker = home / upstream.pin.commit / "llama.cpp"
    no_marker.mkdir(parents=True)
    assert obtain.cached(upstream.pin) is None
    tree = obtain.pristine(upstream.pin, "git")
    assert tree_hash(tree) == upstream.pin.tree
    assert not half.exists()


def test_exactly_the_pinned_commit_is_fetched(upstream: Any, ran: list[list[str]]) -> None:
    tree = obtain.pristine(upstream.pin, "git")  # the branch has moved on since
    assert "return 0" in (tree / "src" / "main.c").read_text()
    fetch = next(command for command in ran if "fetch" in command)
    assert fetch[-1] == upstream.pin.commit and "--depth" in fetch


def test_the_url_can_be_replaced(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = replace(upstream.pin, url="file:///no/such/repository")
    with pytest.raises(SourceError, match=r"git cannot reach file:///no/such/repository"):
        obtain.pristine(pin, "git")
    monkeypatch.setenv("GGUFRQ_GIT_URL", upstream.pin.url)
    assert tree_hash(obtain.pristine(pin, "git")) == pin.tree


def test_auto_turns_to_pypi_and_says_so(upstream: Any, pypi: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pin = replace(upstream.pin, url="file:///no/such/repository")
    assert tree_hash(obtain.pristine(pin, "auto")) == pin.tree
    said = capsys.readouterr().err.splitlines()
    assert "git cannot reach file:///no/such/repository" in said[0]
    assert "PyPI" in said[0] and "made-up==1.0" in said[1]


def test_auto_gives_git_a_short_time(
    upstream: Any, pypi: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slow"
    folder.mkdir()
    real = shutil.which("git")
    (folder / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *ls-remote*) exec sleep 60;; esac\nexec {real} "$@"\n'
    )
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(obtain, "PROBE_SECONDS", 0.5)
    assert tree_hash(obtain.pristine(upstream.pin, "auto")) == upstream.pin.tree


def test_a_commit_that_the_remote_has_not(upstream: Any) -> None:
    pin = replace(upstream.pin, commit="12345678" * 5)
    with pytest.raises(SourceError, match=f"commit {pin.commit} cannot be fetched"):
        obtain.pristine(pin, "git")


def test_a_commit_with_another_tree(upstream: Any, cache: Path) -> None:
    pin = replace(upstream.pin, tree="0" * 40)
    with pytest.raises(SourceError, match=f"has tree {upstream.pin.tree}, wanted is {'0' * 40}"):
        obtain.pristine(pin, "git")
    assert [path.name for path in (cache / "sources").iterdir()] == [f"{pin.commit}.lock"]


@pytest.mark.parametrize("how", ["truncated", "corrupted", "another"])
def test_a_bad_sdist_names_both_hashes_and_is_not_kept(
    upstream: Any, pypi: dict[str, Path], cache: Path, tmp_path: Path, how: str
) -> None:
    content = bytearray(upstream.sdist.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "corrupted":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"not even an archive")
    bad = tmp_path / "bad.tar.gz"
    bad.write_bytes(content)
    pypi["archive"] = bad
    with pytest.raises(SourceError) as caught:
        obtain.pristine(upstream.pin, "pypi")
    assert file_sha256(bad) in caught.value.message
    assert upstream.pin.sdist.sha256 in caught.value.message
    assert not list((cache / "sources").rglob("*.tar.gz"))
    assert obtain.cached(upstream.pin) is None


def test_an_sdist_of_another_commit(
    upstream: Any, with_sdist: Callable[[Pin, Path], Pin], git: Callable[..., str], tmp_path: Path
) -> None:
    git(upstream.repository, "checkout", "-q", upstream.later)
    other = tmp_path / "other.tar.gz"
    with tarfile.open(other, "w:gz") as tar:
        tar.add(upstream.plain, "made_up-1.0/vendor/x")
        tar.add(upstream.repository / ".git", "made_up-1.0/.git/modules/x")
    with pytest.raises(SourceError) as caught:
        obtain.pristine(with_sdist(upstream.pin, other), str(other))
    assert upstream.later in caught.value.message and upstream.pin.commit in caught.value.message


def test_an_sdist_whose_files_are_not_those_of_its_commit(
    upstream: Any, with_sdist: Callable[[Pin, Path], Pin], tmp_path: Path
) -> None:
    (upstream.plain / "src" / "main.c").write_text("not what was committed\n")
    other = tmp_path / "other.tar.gz"
    with tarfile.open(other, "w:gz") as tar:
        tar.add(upstream.plain, "made_up-1.0/vendor/x")
        tar.add(upstream.repository / ".git", "made_up-1.0/.git/modules/x")
    with pytest.raises(SourceError, match=upstream.pin.tree):
        obtain.pristine(with_sdist(upstream.pin, other), str(other))


@pytest.mark.parametrize(
    ("name", "link", "expected"),
    [
        ("made_up-1.0/vendor/x/../../../evil", None, "points outside"),
        ("made_up-1.0/vendor/x/evil", "../../../../etc", "unexpected kind"),
        ("made_up-1.0/vendor/x/evil", "/etc/passwd", "unexpected kind"),
    ],
)
def test_an_archive_cannot_write_outside(
    upstream: Any,
    with_sdist: Callable[[Pin, Path], Pin],
    tmp_path: Path,
    cache: Path,
    name: str,
    link: str | None,
    expected: str,
) -> None:
    evil = tmp_path / "evil.tar.gz"
    info = tarfile.TarInfo(name)
    if link is not None:
        info.type, info.linkname = tarfile.SYMTYPE, link
    with tarfile.open(evil, "w:gz") as tar:
        tar.add(upstream.plain, "made_up-1.0/vendor/x")
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(SourceError, match=expected):
        obtain.pristine(with_sdist(upstream.pin, evil), str(evil))
    assert not list(tmp_path.rglob("evil"))


def test_a_checkout_at_another_commit(upstream: Any, git: Callable[..., str]) -> None:
    git(upstream.repository, "checkout", "-q", upstream.later)
    with pytest.raises(SourceError) as caught:
        obtain.pristine(upstream.pin, str(upstream.repository))
    assert upstream.later in caught.value.message and upstream.pin.commit in caught.value.message
    assert f"checkout {upstream.pin.commit}" in (caught.value.remedy or "")


def test_a_checkout_with_changes(upstream: Any) -> None:
    (upstream.repository / "untracked.txt").write_text("does not matter\n")
    assert tree_hash(obtain.pristine(upstream.pin, str(upstream.repository))) == upstream.pin.tree
    (upstream.repository / "src" / "main.c").write_text("changed\n")
    with pytest.raises(SourceError, match=r"files were changed in it: src/main\.c"):
        obtain.pristine(upstream.pin, str(upstream.repository))


def test_a_folder_is_never_modified(upstream: Any) -> None:
    def state() -> dict[str, tuple[int, int]]:
        found = [path for path in upstream.repository.rglob("*") if not path.is_symlink()]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}

    os.utime(upstream.repository / "src" / "main.c")  # makes git want to refresh its index
    before = state()
    obtain.pristine(upstream.pin, str(upstream.repository))
    assert state() == before


def test_a_plain_folder_of_another_version(upstream: Any) -> None:
    (upstream.plain / "src" / "main.c").write_text("another version\n")
    with pytest.raises(SourceError) as caught:
        obtain.pristine(upstream.pin, str(upstream.plain))
    assert tree_hash(upstream.plain) in caught.value.message
    assert upstream.pin.tree in caught.value.message


def test_a_repository_around_a_plain_folder_does_not_count(upstream: Any, git: Callable[..., str]) -> None:
    git(upstream.plain.parent, "init", "-q")
    assert checkout_commit(upstream.plain) is None
    assert checkout_commit(upstream.repository) == upstream.pin.commit
    (upstream.plain / ".git").write_text("gitdir: ../gone\n")  # as a submodule that was copied out
    assert checkout_commit(upstream.plain) is None
    assert tree_hash(obtain.pristine(upstream.pin, str(upstream.plain))) == upstream.pin.tree


def test_a_source_that_does_not_exist(upstream: Any) -> None:
    with pytest.raises(SourceError, match="'nowhere' is neither a folder nor one of auto, git, pypi"):
        obtain.pristine(upstream.pin, "nowhere")


def test_without_pip(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = proc.run

    def no_pip(args: Any, **options: Any) -> Any:
        if "pip" in args:
            raise ToolError("python failed with exit status 1\n  /usr/bin/python3: No module named pip")
        return run(args, **options)

    monkeypatch.setattr(proc, "run", no_pip)
    with pytest.raises(SourceError, match="No module named pip") as caught:
        obtain.pristine(upstream.pin, "pypi")
    assert "ensurepip" in (caught.value.remedy or "")


def test_without_git(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match="git is not there"):
        obtain.pristine(upstream.pin, "git")


def test_our_pin(tmp_path: Path) -> None:
    pin = load_pin()
    assert pin.commit.startswith(pin.short) and pin.sdist is not None and len(pin.sdist.sha256) == 64
    bad = tmp_path / "pin.toml"
    bad.write_text('[llama_cpp]\nurl = "x"\ncommit = "short"\ntree = "short"\ndate = "x"\n')
    with pytest.raises(SourceError, match="40 hexadecimal digits"):
        load_pin(bad)
    bad.write_text("[llama_cpp\n")
    with pytest.raises(SourceError, match="cannot be read"):
        load_pin(bad)


@pytest.mark.parametrize("way", ["git", "pypi"])
def test_a_file_system_without_modes_and_links(
    upstream: Any, pypi: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """As on Windows: what the archive says of modes is noted, so that the tree can still be verified."""
    monkeypatch.setattr(trees, "KEEPS_MODES", False)
    tree = obtain.pristine(upstream.pin, way)
    assert not (tree / "link").is_symlink() and (tree / "link").read_text() == "src/main.c"
    assert obtain.cached(upstream.pin, thorough=True) == tree
    (tree / "run.sh").write_text("changed\n")
    assert obtain.cached(upstream.pin, thorough=True) is None
    again = obtain.pristine(upstream.pin, way)
    assert (again / "run.sh").read_text() == "#!/bin/sh\n"

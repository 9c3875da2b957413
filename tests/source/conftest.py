"""A small upstream in every form that llama.cpp comes in: repository, sdist, plain folder."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ggufrq.source.pin import Pin, Sdist


@dataclass
class Upstream:
    repository: Path
    bare: Path
    sdist: Path
    plain: Path
    pin: Pin
    later: str


def write_tree(folder: Path) -> None:
    (folder / "src" / "deep").mkdir(parents=True)
    (folder / "src" / "main.c").write_text("int main(void) { return 0; }\n")
    (folder / "src" / "deep" / "crlf.txt").write_bytes(b"a\r\nb\r\n")
    (folder / "src" / "deep" / "bytes.bin").write_bytes(bytes(range(256)) * 10)
    (folder / "src.c").write_text("// sorts between src and src/\n")
    (folder / "build.log").write_text("tracked although ignored\n")
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "ümlaut.txt").write_text("ä\n", encoding="utf-8")
    (folder / "link").symlink_to("src/main.c")


def pack_sdist(
    path: Path, top: str, members: dict[str, Path], extra: list[tarfile.TarInfo] | None = None
) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, source in members.items():
            tar.add(source, f"{top}/{name}")
        for info in extra or []:
            tar.addfile(info, io.BytesIO(b""))


@pytest.fixture
def upstream(tmp_path: Path, git: Callable[..., str]) -> Upstream:
    base = tmp_path / "up stream"
    repository, bare, plain = base / "work", base / "bare.git", base / "plain"
    write_tree(repository)
    shutil.copytree(repository, plain, symlinks=True)
    git(repository, "-c", "init.defaultBranch=master", "init", "-q")
    git(repository, "-c", "core.autocrlf=false", "add", "-A", "-f")
    git(repository, "commit", "-q", "-m", "first")
    commit, tree = git(repository, "rev-parse", "HEAD"), git(repository, "rev-parse", "HEAD^{tree}")
    sdist = base / "made_up-1.0.tar.gz"
    pointer = plain / ".git"  # as a submodule has it
    pointer.write_text("gitdir: ../../.git/modules/x\n")
    pack_sdist(sdist, "made_up-1.0", {"vendor/x": plain, ".git/modules/x": repository / ".git"})
    pointer.unlink()
    git(base, "clone", "-q", "--bare", str(repository), str(bare))
    (repository / "src" / "main.c").write_text("int main(void) { return 1; }\n")
    git(repository, "commit", "-q", "-a", "-m", "second")
    later = git(repository, "rev-parse", "HEAD")
    git(repository, "push", "-q", str(bare), "HEAD:master")
    git(repository, "checkout", "-q", commit)
    pin = Pin(
        url=bare.as_uri(),
        commit=commit,
        tree=tree,
        date="2026-01-01",
        sdist=Sdist(
            "made-up", "1.0", hashlib.sha256(sdist.read_bytes()).hexdigest(), "vendor/x", ".git/modules/x"
        ),
    )
    return Upstream(repository, bare, sdist, plain, pin, later)


@pytest.fixture
def with_sdist() -> Callable[[Pin, Path], Pin]:
    """The pin with the sha256 of another archive."""

    def run(pin: Pin, archive: Path) -> Pin:
        assert pin.sdist is not None
        return replace(pin, sdist=replace(pin.sdist, sha256=hashlib.sha256(archive.read_bytes()).hexdigest()))

    return run

"""Following upstream on a small one, with the real git: fitted patches, work trees, patches written anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggufrq.base.errors import BuildError, PatchError, UsageError
from ggufrq.base.trees import tree_hash
from ggufrq.build.builds import ensure_build
from ggufrq.build.project import BuildOptions, Project
from ggufrq.patchset import compat, patches, refresh, series, worktree
from ggufrq.patchset.series import problems
from ggufrq.source import obtain as pristine_source
from ggufrq.source import snapshot
from ggufrq.source.pin import PIN_FILE, Pin, load_pin, pin_toml
from ggufrq.source.snapshot import Snapshot

Git = Callable[..., str]

A = [f"line {number}" for number in range(1, 41)]
D = ["int f(", *[f"  {number}" for number in range(10)]] * 2


def write(tree: Path, **files: list[str]) -> None:
    (tree / "src").mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (tree / "src" / f"{name}.c").write_text("\n".join(lines) + "\n")


@pytest.fixture
def versions(tmp_path: Path, git: Git, cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Snapshot]:
    """A pinned upstream, and one in which a hook's place has moved, changed, or gone."""
    repository = tmp_path / "up stream"
    write(repository, a=A, b=A, c=A, d=D)
    git(repository, "-c", "init.defaultBranch=master", "init", "-q")
    found = {}
    for name in ("pinned", "other"):
        if name == "other":
            moved = ["new first line", *A]
            write(
                repository,
                a=moved,
                b=[*A[:19], "twenty, other", *A[20:]],
                c=A[:15],
                d=[*D[:3], "  x", *D[4:]],
            )
        git(repository, "add", "-A")
        git(repository, "commit", "-q", "-m", name)
        commit, tree = git(repository, "rev-parse", "HEAD"), git(repository, "rev-parse", "HEAD^{tree}")
        folder = tmp_path / name
        shutil.copytree(repository, folder, ignore=shutil.ignore_patterns(".git"))
        found[name] = Snapshot(name, Pin(repository.as_uri(), commit, tree, "2026-01-02"), folder)
    pin = found["pinned"].pin
    for module in (snapshot, worktree):
        monkeypatch.setattr(module, "load_pin", lambda: pin)
    monkeypatch.setattr(worktree, "pristine", lambda _: found["pinned"].tree)
    monkeypatch.setattr(pristine_source, "PROBE_SECONDS", 1.0)
    return found


@pytest.fixture
def root(tmp_path: Path, versions: dict[str, Snapshot], git: Git) -> Path:
    """Two patches and an overlay, made by a first export."""
    folder = tmp_path / "patch set"
    (folder / "core").mkdir(parents=True)
    (folder / "overlay" / "src").mkdir(parents=True)
    (folder / "overlay" / "src" / "ours.c").write_text("int ours;\n")
    (folder / "series").write_text("# ours\n")
    work = worktree.import_to(tmp_path / "first", versions["pinned"], folder)
    put(work.folder, git, "core/one.patch\n\nHook a.\n\nAnd why.", a=[*A[:10], "hook a", *A[10:]])
    put(
        work.folder,
        git,
        "core/two.patch\n\nHook b and c.",
        b=[*A[:20], "hook b", *A[20:]],
        c=[*A[:5], "hook c5", *A[5:30], "hook c30", *A[30:]],
    )
    refresh.refreshed(work, versions["pinned"], folder).write(folder)
    return folder


def put(folder: Path, git: Git, message: str, **files: list[str]) -> None:
    write(folder, **files)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_new_patches_enter_the_series(root: Path) -> None:
    loaded = series.load(root)
    assert [(patch.name, patch.header) for patch in loaded.patches] == [
        ("core/one.patch", "Hook a.\n\nAnd why."),
        ("core/two.patch", "Hook b and c."),
    ]
    assert (root / "series").read_text() == "# ours\ncore/one.patch\ncore/two.patch\n"
    assert loaded.hunks == 4


def test_import_and_refresh_give_the_same_bytes(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path
) -> None:
    before = contents(root)
    assert refresh.refreshed_anew(versions["pinned"], root).changed(root) == []
    with (root / "core" / "one.patch").open("a") as file:
        file.write("-- \n2.39\n")  # as git format-patch ends
    assert refresh.refreshed_anew(versions["pinned"], root).write(root) == ["core/one.patch"]
    assert contents(root) == before


def test_a_fixup_changes_its_patch_alone(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    work = worktree.import_to(tmp_path / "work", versions["pinned"], root)
    before = contents(root)
    one = next(commit for commit, name in work.commits() if name == "core/one.patch")
    ours = next(commit for commit, name in work.commits() if name == "overlay")
    file = work.folder / "src" / "a.c"
    file.write_text(file.read_text().replace("hook a", "better hook a"))
    with pytest.raises(PatchError, match="not committed"):
        refresh.refreshed(work, versions["pinned"], root)
    git(work.folder, "commit", "-q", "-a", "--fixup", one)
    (work.folder / "src" / "ours.c").write_text("int ours = 1;\n")
    (work.folder / "src" / "more.c").write_text("int more;\n")
    git(work.folder, "add", "-A")
    git(work.folder, "commit", "-q", "--fixup", ours)
    changed = refresh.refreshed(work, versions["pinned"], root).write(root)
    assert changed == ["core/one.patch", "overlay/src/more.c", "overlay/src/ours.c"]
    assert b"+better hook a\n" in (root / "core" / "one.patch").read_bytes()
    assert contents(root)["core/two.patch"] == before["core/two.patch"]
    assert series.load(root).patches[0].header == "Hook a.\n\nAnd why."
    assert refresh.refreshed_anew(versions["pinned"], root).changed(root) == []


def test_a_stray_commit_is_refused(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    work = worktree.import_to(tmp_path / "work", versions["pinned"], root)
    put(work.folder, git, "try something", a=["x"])
    with pytest.raises(PatchError, match="'try something'"):
        refresh.refreshed(work, versions["pinned"], root)
    with pytest.raises(UsageError, match="no work tree"):
        worktree.open_worktree(tmp_path)
    assert worktree.open_worktree(work.folder).source == "pin"
    with pytest.raises(UsageError, match="there already"):
        worktree.import_to(root, versions["pinned"], root)


def test_another_upstream_is_fitted_by_hand_once(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    other, folder = versions["other"], tmp_path / "work"
    before = contents(root)
    assert len(patches.fit(compat.load(root, other.pin.commit), other.tree).failures) == 2
    with pytest.raises(PatchError, match=r"core/two\.patch does not fit") as caught:
        worktree.import_to(folder, other, root)
    assert "src/b.c, hunk 1 of 1" in caught.value.message and "src/c.c, hunk 2 of 2" in caught.value.message
    assert "hook a" in (folder / "src" / "a.c").read_text()  # what fits is there, moved with its lines
    assert "hook c5" in (folder / "src" / "c.c").read_text()
    with pytest.raises(PatchError, match=r"still lie in .*b\.c\.rej"):
        worktree.import_to(folder, other, root)
    with pytest.raises(PatchError, match="stopped before its end"):
        refresh.refreshed(worktree.open_worktree(folder), other, root)
    for left in folder.rglob("*.rej"):
        left.unlink()
    lines = (folder / "src" / "b.c").read_text()
    (folder / "src" / "b.c").write_text(lines.replace("twenty, other\n", "twenty, other\nhook b\n"))
    work = worktree.import_to(folder, other, root)
    assert refresh.refreshed(work, other, root).write(root) == [
        f"compat/{other.pin.commit[:9]}/core/two.patch"
    ]
    text = (root / "compat" / other.pin.commit[:9] / "core" / "two.patch").read_text()
    assert text.startswith(f"Fit core/two.patch to llama.cpp {other.pin.commit[:9]} (2026-01-02)\n\n")
    assert text.count("Instead of: ") == 2 and "+hook b\n" in text and "hook c" not in text
    # Now it applies by itself, the pinned series is what it was, and another import stops nowhere.
    fitted = compat.load(root, other.pin.commit)
    assert patches.fit(fitted, other.tree).failures == ()
    assert fitted.hash != series.load(root).hash
    assert {name: content for name, content in contents(root).items() if "compat" not in name} == before
    assert problems(root) == [] == compat.problems(root)
    patches.apply(fitted, other.tree, what="it")
    assert tree_hash(other.tree) == git(folder, "rev-parse", "HEAD^{tree}")


def fit_other(root: Path, other: Snapshot, folder: Path) -> worktree.Worktree:
    with pytest.raises(PatchError):
        worktree.import_to(folder, other, root)
    for left in folder.rglob("*.rej"):
        left.unlink()
    file = folder / "src" / "b.c"
    file.write_text(file.read_text().replace("twenty, other\n", "twenty, other\nhook b\n"))
    work = worktree.import_to(folder, other, root)
    refresh.refreshed(work, other, root).write(root)
    return work


def test_the_series_may_change_beside_what_is_fitted(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    other = versions["other"]
    fit_other(root, other, tmp_path / "work")
    pinned = worktree.import_to(tmp_path / "pinned work", versions["pinned"], root)
    commit = next(commit for commit, name in pinned.commits() if name == "core/two.patch")
    file = pinned.folder / "src" / "c.c"
    file.write_text(file.read_text().replace("hook c5", "other hook c5"))
    git(pinned.folder, "commit", "-q", "-a", "--fixup", commit)
    refresh.refreshed(pinned, versions["pinned"], root).write(root)
    assert patches.fit(compat.load(root, other.pin.commit), other.tree).failures == ()
    # A change of the very hunk that something stands in for is told, and asks for another look.
    file = pinned.folder / "src" / "b.c"
    file.write_text(file.read_text().replace("hook b", "other hook b"))
    commit = next(commit for commit, name in pinned.commits() if name == "core/two.patch")
    git(pinned.folder, "commit", "-q", "-a", "--fixup", commit)
    refresh.refreshed(pinned, versions["pinned"], root).write(root)
    with pytest.raises(PatchError, match=r"hunks of core/two\.patch in src/b\.c that have changed"):
        compat.load(root, other.pin.commit)
    with pytest.raises(PatchError, match=r"src/b\.c, hunk 1 of 1") as caught:
        worktree.import_to(tmp_path / "again", other, root)
    assert "src/c.c" not in caught.value.message  # decided before, and still good


def test_git_merges_what_only_its_context_changed(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    other = versions["other"]
    repository = tmp_path / "up stream"
    write(repository, a=A, b=[*A[:17], "eighteen, other", *A[18:]], c=A)  # three lines above the hook
    git(repository, "commit", "-q", "-a", "-m", "third")
    commit, tree = git(repository, "rev-parse", "HEAD"), git(repository, "rev-parse", "HEAD^{tree}")
    shutil.rmtree(other.tree)
    shutil.copytree(repository, other.tree, ignore=shutil.ignore_patterns(".git"))
    third = Snapshot("third", Pin("", commit, tree, "2026-01-03"), other.tree)
    assert len(patches.fit(series.load(root), third.tree).failures) == 1
    refresh.refreshed_anew(third, root).write(root)
    assert patches.fit(compat.load(root, commit), third.tree).failures == ()


def test_hunks_that_do_the_same_in_functions_of_one_name_are_fitted_together(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    other = versions["other"]
    pinned = worktree.import_to(tmp_path / "pinned work", versions["pinned"], root)
    hooked = [*D[:6], "  hook", *D[6:17], "  hook", *D[17:]]
    put(pinned.folder, git, "core/three.patch\n\nHook d twice.", d=hooked)
    refresh.refreshed(pinned, versions["pinned"], root).write(root)
    one, two = series.load(root).patches[-1].files[0].hunks
    assert one.key == two.key
    work = fit_other(root, other, tmp_path / "work")  # the first hunk by merging, the second as it is
    fitting = (compat.folder(root, other.pin.commit) / "core" / "three.patch").read_text()
    assert fitting.count("Instead of: ") == 1 and fitting.count("+  hook\n") == 2
    assert patches.fit(compat.load(root, other.pin.commit), other.tree).failures == ()
    assert (work.folder / "src" / "d.c").read_text().count("hook") == 2
    assert refresh.refreshed_anew(other, root).changed(root) == []


def leave_metal_out(root: Path, versions: dict[str, Snapshot], folder: Path, git: Git) -> Path:
    """A series with a patch for Metal, which is left out of the other upstream; the file that says so."""
    other = versions["other"]
    pinned = worktree.import_to(folder / "pinned work", versions["pinned"], root)
    file = pinned.folder / "src" / "c.c"
    lines = file.read_text().splitlines()
    put(
        pinned.folder,
        git,
        "metal/three.patch\n\nHook for Metal.",
        a=["metal", *A[:10], "hook a", *A[10:]],
        c=[*lines[:-2], "metal"],
    )
    refresh.refreshed(pinned, versions["pinned"], root).write(root)
    work = folder / "work"
    with pytest.raises(PatchError, match=r"core/two"):
        worktree.import_to(work, other, root)
    for left in work.rglob("*.rej"):
        left.unlink()
    with pytest.raises(PatchError, match=r"metal/three"):
        worktree.import_to(work, other, root)
    git(work, "reset", "-q", "--hard")
    git(work, "clean", "-q", "-f", "-d")
    refresh.refreshed(worktree.import_to(work, other, root), other, root).write(root)
    return compat.folder(root, other.pin.commit) / "metal" / "three.patch"


def test_the_patch_of_a_backend_is_left_out_as_a_whole(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    other = versions["other"]
    file = leave_metal_out(root, versions, tmp_path, git)
    commit = other.pin.commit
    says = f"metal/three.patch is left out of llama.cpp {commit[:9]} (2026-01-02)\n\n"
    says += "Without: metal/three.patch\n"
    assert file.read_text() == says
    file.write_text(says.replace("metal/three.patch is left out of", "No Metal in"))
    fitted = compat.load(root, commit)
    assert fitted.without == ("metal",) and series.load(root).without == ()
    assert [patch.name for patch in fitted.patches if "metal" in patch.name] == []
    assert patches.fit(fitted, other.tree).failures == ()
    assert compat.fitted(root, commit) == ["core/two.patch"]
    assert refresh.refreshed_anew(other, root).changed(root) == []  # words and all
    with pytest.raises(BuildError, match=f"do not run on metal with llama.cpp {commit[:9]}"):
        ensure_build(BuildOptions("metal"), project=Project(other.pin, fitted))
    # A later change of what is left out changes nothing there.
    pinned = worktree.open_worktree(tmp_path / "pinned work")
    (pinned.folder / "src" / "a.c").write_text("other metal\n")
    git(pinned.folder, "commit", "-q", "-a", "--fixup", "HEAD")
    refresh.refreshed(pinned, versions["pinned"], root).write(root)
    assert patches.fit(compat.load(root, commit), other.tree).failures == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("core/two.patch", "Words.\n\nWithout: core/two.patch\n"),
        ("metal/three.patch", "Words.\n\nWithout: metal/other.patch\n"),
        ("metal/three.patch", "Words.\n\nInstead of: src/c.c 01234567\nWithout: metal/three.patch\n"),
    ],
)
def test_what_cannot_be_left_out_is_told(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git, name: str, text: str
) -> None:
    file = leave_metal_out(root, versions, tmp_path, git).parents[1] / name
    file.write_text(text)
    with pytest.raises(PatchError, match=r"only for the patch of a backend"):
        compat.load(root, versions["other"].pin.commit)
    assert len(compat.problems(root)) == 1 and str(file) in compat.problems(root)[0]


def test_the_overlay_is_fitted_by_a_patch(
    root: Path, versions: dict[str, Snapshot], tmp_path: Path, git: Git
) -> None:
    other = versions["other"]
    work = fit_other(root, other, tmp_path / "work")
    (work.folder / "src" / "ours.c").write_text("int ours; // other\n")
    git(work.folder, "commit", "-q", "-a", "-m", "overlay.patch\n\nAnother API.")
    refresh.refreshed(work, other, root).write(root)
    fitted = compat.load(root, other.pin.commit)
    assert (root / "overlay" / "src" / "ours.c").read_text() == "int ours;\n"
    tree = shutil.copytree(other.tree, tmp_path / "copy")
    patches.apply(fitted, tree, what="it")
    assert (tree / "src" / "ours.c").read_text() == "int ours; // other\n"
    assert refresh.refreshed_anew(versions["other"], root).changed(root) == []


def test_what_fits_nothing_is_named(root: Path, versions: dict[str, Snapshot]) -> None:
    folder = root / "compat" / versions["other"].pin.commit[:9]
    folder.mkdir(parents=True)
    (folder / "lost.patch").write_text("Words.\n")
    with pytest.raises(PatchError, match=r"lost\.patch fits no patch of the series"):
        compat.load(root, versions["other"].pin.commit)
    (folder / "lost.patch").write_text("")
    assert compat.problems(root) == [
        f"compat/{folder.name}/lost.patch has no header that says what it stands in for"
    ]


def test_rows(root: Path) -> None:
    from ggufrq.flows import upstream

    def row(commit: str, day: str, **more: Any) -> dict[str, Any]:
        base = {
            "upstream": "x",
            "commit": commit,
            "date": day,
            "applies": True,
            "builds": True,
            "problems": [],
        }
        return {**base, **more}

    upstream.write_row(root, row("a" * 40, "2026-01-01"))
    upstream.write_row(root, row("b" * 40, "2026-02-01"))
    upstream.write_row(root, row("a" * 40, "2026-01-01", applies=False))
    rows = upstream.read_rows(root)
    assert [(one["commit"][0], upstream.passed(one)) for one in rows] == [("b", True), ("a", False)]
    assert json.loads((root / "compat" / "rows.json").read_text()) == rows
    (root / "compat" / "rows.json").write_text("{")
    with pytest.raises(PatchError, match="cannot be read"):
        upstream.read_rows(root)


def test_the_pin_moves(root: Path, versions: dict[str, Snapshot], tmp_path: Path, monkeypatch: Any) -> None:
    other = versions["other"]
    work = fit_other(root, other, tmp_path / "work")
    found = refresh.refreshed(work, other, root, as_pin=True)
    assert found.write(root) == [
        f"compat/{other.pin.commit[:9]}/core/two.patch", "core/one.patch", "core/two.patch",
    ]  # fmt: skip
    assert not list((root / "compat").rglob("*.patch"))
    loaded = series.load(root)
    assert [patch.header for patch in loaded.patches] == ["Hook a.\n\nAnd why.", "Hook b and c."]
    assert patches.fit(loaded, other.tree) == patches.Fit()
    for module in (snapshot, worktree):
        monkeypatch.setattr(module, "load_pin", lambda: other.pin)
    assert refresh.refreshed_anew(other, root).changed(root) == []


def test_a_pin_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "pin.toml").write_text(pin_toml(load_pin()))
    assert load_pin(tmp_path / "pin.toml") == load_pin()
    assert PIN_FILE.read_text() == pin_toml(load_pin())

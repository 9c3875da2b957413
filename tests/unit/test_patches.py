"""The patch set on small trees, with the real git."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ggufrq.base import paths
from ggufrq.base.errors import PatchError
from ggufrq.base.trees import tree_hash
from ggufrq.patchset import compat, patches, series
from ggufrq.patchset.series import default_patch_set, load, problems

LINES = [f"line {number}" for number in range(1, 61)]


def text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def patch_text(
    file: str, old: list[str], changes: dict[int, str], header: str = "Hook something.\n\n"
) -> str:
    """A patch that puts a line after each given line number, with three lines of context, one hunk each."""
    out = [f"diff --git a/{file} b/{file}", f"--- a/{file}", f"+++ b/{file}"]
    for shift, (at, new) in enumerate(sorted(changes.items())):
        before, after = old[at - 3 : at], old[at : at + 3]
        out.append(f"@@ -{at - 2},6 +{at - 2 + shift},7 @@ {patches.function_of(old, at - 2)}")
        out += [f" {line}" for line in before] + [f"+{new}"] + [f" {line}" for line in after]
    return header + text(out)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "a tree"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "a.c").write_text(text(LINES))
    (folder / "src" / "b.c").write_text(text(LINES))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two stacked patches and an overlay of one file."""
    folder = tmp_path / "patch set"
    (folder / "core").mkdir(parents=True)
    (folder / "overlay" / "src").mkdir(parents=True)
    (folder / "overlay" / "src" / "new.c").write_text("int x;\n")
    (folder / "series").write_text("# ours\ncore/first.patch\n\ncore/second.patch  # stacked\n")
    first = patch_text("src/a.c", LINES, {10: "hook 10", 40: "hook 40"})
    stacked = [*LINES[:10], "hook 10", *LINES[10:]]
    second = patch_text("src/a.c", stacked, {12: "hook 12"}) + patch_text(
        "src/b.c", LINES, {5: "hook b"}, header=""
    )
    (folder / "core" / "first.patch").write_text(first)
    (folder / "core" / "second.patch").write_text(second)
    return folder


def test_load(root: Path) -> None:
    found = load(root)
    assert [patch.name for patch in found.patches] == ["core/first.patch", "core/second.patch"]
    assert found.patches[0].header == "Hook something."
    assert found.overlay == ("src/new.c",)
    assert found.files == ["src/a.c", "src/b.c"]
    assert found.hunks == 4
    assert found.patches[0].files[0].hunks[1] == series.Hunk(2, 38, "line 37", 1)
    assert problems(root) == []


def test_an_empty_folder_is_an_empty_patch_set(tmp_path: Path, tree: Path) -> None:
    before = tree_hash(tree)
    found = load(tmp_path)
    assert found.patches == () and found.overlay == ()
    patches.apply(found, tree, what="it")
    assert tree_hash(tree) == before


def test_apply(root: Path, tree: Path) -> None:
    patches.apply(load(root), tree, what="it")
    lines = (tree / "src" / "a.c").read_text().splitlines()
    assert lines[8:14] == ["line 9", "line 10", "hook 10", "line 11", "hook 12", "line 12"]
    assert "hook 40" in lines
    assert (tree / "src" / "new.c").read_text() == "int x;\n"
    assert not list(tree.rglob("*.rej")) + list(tree.rglob("*.orig"))


def test_it_applies_inside_a_repository_and_in_one(root: Path, tree: Path, git: object) -> None:
    assert callable(git)
    git(tree.parent, "init", "-q")  # one around it, which git would otherwise take paths from
    patches.apply(load(root), tree, what="it")
    assert "hook 10" in (tree / "src" / "a.c").read_text()


def test_an_offset_is_fine_but_fuzz_is_not(root: Path, tree: Path) -> None:
    moved = text(["new first", *LINES])
    (tree / "src" / "a.c").write_text(moved)
    assert patches.fit(load(root), tree).failures == ()
    outermost = moved.replace("line 38\n", "line thirty-eight\n")  # the first context line of a hunk
    (tree / "src" / "a.c").write_text(outermost)
    assert len(patches.fit(load(root), tree).failures) == 1


def test_a_hunk_may_move_but_not_into_another_function(root: Path, tree: Path) -> None:
    body = ["    switch (type) {", "        case A:", "        case B:", "            go();", "    }", "}"]
    old = ["// top", "", "void first(void) {", *body, "", "void second(void) {", *body]
    (root / "core" / "first.patch").write_text(patch_text("src/a.c", old, {6: "        case OURS:"}))
    (root / "series").write_text("core/first.patch\n")
    loaded = load(root)
    assert loaded.patches[0].files[0].hunks[0].context == "void first(void) {"
    (tree / "src" / "a.c").write_text(text(["// more", "// more", *old]))
    found = patches.fit(loaded, tree)
    assert found.failures == () and found.moved == ("core/first.patch: src/a.c, hunk 1, now at line 6",)
    # In the first function the place is gone; the same lines stand in the second.
    (tree / "src" / "a.c").write_text(
        text([*old[:4], "        case NEW:", *old[4:]]).replace("case A", "case Z", 1)
    )
    found = patches.fit(loaded, tree)
    assert [str(failure) for failure in found.failures] == [
        "core/first.patch: src/a.c, hunk 1 of 1 (line 4, in 'void first(void) {'): "
        "its lines stand in 'void second(void) {' only"
    ]


def test_a_changed_file_fails_with_file_and_hunk_and_is_not_touched(root: Path, tree: Path) -> None:
    content = text(LINES).replace("line 41\n", "line forty-one\n")
    (tree / "src" / "a.c").write_text(content)
    before = tree_hash(tree)
    with pytest.raises(PatchError) as caught:
        patches.apply(load(root), tree, what="llama.cpp 123abc")
    message = caught.value.message
    assert "llama.cpp 123abc" in message
    assert "core/first.patch: src/a.c, hunk 2 of 2 (line 38, in 'line 37')" in message
    assert "second" not in message
    assert tree_hash(tree) == before
    assert not (tree / "src" / "new.c").exists()


def test_all_failing_places_are_named_at_once(root: Path, tree: Path) -> None:
    (tree / "src" / "a.c").write_text(text(LINES).replace("line 9\n", "x\n").replace("line 39\n", "y\n"))
    (tree / "src" / "b.c").unlink()
    (tree / "src" / "new.c").touch()
    found = patches.fit(load(root), tree).failures
    places = [(failure.patch, failure.file, failure.hunk and failure.hunk.number) for failure in found]
    assert places == [
        ("overlay", "src/new.c", None),
        ("core/first.patch", "src/a.c", 1),
        ("core/first.patch", "src/a.c", 2),
        ("core/second.patch", "src/a.c", 1),
        ("core/second.patch", "src/b.c", None),
    ]
    assert "no such file" in str(found[-1])


def test_an_overlay_file_never_replaces_one(root: Path, tree: Path) -> None:
    (tree / "src" / "new.c").write_text("theirs\n")
    with pytest.raises(PatchError, match=re.escape("src/new.c: exists in the source already")):
        patches.apply(load(root), tree, what="it")
    assert (tree / "src" / "new.c").read_text() == "theirs\n"
    assert "hook" not in (tree / "src" / "a.c").read_text()


def test_a_tree_that_is_patched_already_is_recognised(root: Path, tree: Path) -> None:
    found = load(root)
    patches.apply(found, tree, what="it")
    assert any("holds this patch already" in str(failure) for failure in patches.fit(found, tree).failures)


def test_user_settings_of_git_do_not_matter(
    root: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text("[core]\n autocrlf = true\n[apply]\n ignorewhitespace = change\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    (tree / "src" / "b.c").write_text(text(LINES).replace("line 6", "line  6"))
    assert [failure.file for failure in patches.fit(load(root), tree).failures] == ["src/b.c"]
    (tree / "src" / "b.c").write_text(text(LINES))
    patches.apply(load(root), tree, what="it")
    assert b"\r" not in (tree / "src" / "a.c").read_bytes()


def test_the_hash_depends_on_what_is_built_only(root: Path) -> None:
    first = load(root).hash
    assert load(root).hash == first
    (root / "series").write_text("core/first.patch\ncore/second.patch\n")
    (root / "README.md").write_text("words")
    (root / "overlay" / "src" / "new.c~").write_text("an editor's copy")
    assert load(root).hash == first
    (root / "series").write_text("core/second.patch\ncore/first.patch\n")
    assert load(root).hash != first
    (root / "series").write_text("core/first.patch\ncore/second.patch\n")
    (root / "overlay" / "src" / "new.c").write_text("int y;\n")
    second = load(root).hash
    assert second != first
    (root / "overlay" / "src" / "new.c").rename(root / "overlay" / "src" / "newer.c")
    assert load(root).hash not in (first, second)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda root: (root / "core" / "lost.patch").write_text("x"),
            "core/lost.patch is not listed in series",
        ),
        (
            lambda root: (root / "core" / "first.patch").unlink(),
            "series lists core/first.patch, which is not there",
        ),
        (
            lambda root: (root / "series").write_text("core/first.patch\n" * 2),
            "series lists core/first.patch twice",
        ),
        (
            lambda root: (root / "core" / "first.patch").write_text(
                patch_text("src/a.c", LINES, {9: "x"}, header="")
            ),
            "core/first.patch has no header that says what it does and why",
        ),
    ],
)
def test_problems(root: Path, change: object, expected: str) -> None:
    assert callable(change)
    change(root)
    assert expected in problems(root)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("only words\n", "changes no file"),
        ("--- a/x\n+++ b/x\n@@ -1,3 +1,4 @@\n a\n+b\n", "hunk 1 of x ends too early"),
        ("--- a/x\n+++ b/x\n@@ -1,1 +1,2 @@\n-a\n-b\n+c\n+d\n", "holds other lines than its header says"),
        ("diff --git a/x b/x\nnew file mode 100644\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+a\n", "overlay"),
        ("--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+a\n", "may only change existing files"),
        ("--- a/x\n+++ b/y\n@@ -1 +1 @@\n-a\n+b\n", "not turn x into y"),
        ("diff --git a/x b/x\nGIT binary patch\nliteral 3\n", "binary"),
        ("@@ -1 +1 @@\n-a\n+b\n", "a hunk before any file name"),
    ],
)
def test_malformed_patches_name_file_and_line(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "bad.patch").write_text(content)
    (tmp_path / "series").write_text("bad.patch\n")
    with pytest.raises(PatchError, match=r"^bad\.patch, line \d+: ") as caught:
        load(tmp_path)
    assert expected in caught.value.message


@pytest.mark.parametrize("name", ["../out.patch", "/abs.patch", "core/readme.txt"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "series").write_text(f"# first\n{name}\n")
    with pytest.raises(PatchError, match="line 2"):
        load(tmp_path)


def test_missing_git_is_explained(root: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PatchError, match="git is not there"):
        patches.fit(load(root), tree)


def test_our_own_patch_set_is_in_order() -> None:
    root = paths.data_dir("patches")
    assert problems(root) == [] == compat.problems(root)
    assert default_patch_set().hash == load(root).hash


@pytest.mark.parametrize(
    ("topics", "most"), [(("core", "cpu"), 20), (("cuda",), 7), (("metal",), 8), (("vulkan",), 15)]
)
def test_hooks_are_few(topics: tuple[str, ...], most: int) -> None:
    """Hunks cost work at every version of upstream: what a new hook does belongs into the overlay."""
    found = {p.name: p.hunks for p in default_patch_set().patches if p.name.split("/")[0] in topics}
    assert found and sum(found.values()) <= most, found


def test_the_page_tells_how_many_hunks_each_patch_has() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "patching.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| ([a-z]+/[a-z-]+) \| \d+ \| (\d+) \|$", page, re.MULTILINE)
    there = {p.name.removesuffix(".patch"): p.hunks for p in default_patch_set().patches}
    assert {name: int(hunks) for name, hunks in told} == there

"""The documents: generated parts are up to date, and every command in them is one."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from snippets import Snippet, options_of, snippets

from ggufrq.base.errors import GgufrqError
from ggufrq.cli import COMMANDS, cli, docs

REPOSITORY = Path(__file__).resolve().parents[2]
ALL = snippets(REPOSITORY)


def test_generated_pages_are_up_to_date() -> None:
    wrong = [str(path.relative_to(REPOSITORY)) for path in docs.outdated(REPOSITORY)]
    assert not wrong, f"run {docs.COMMAND}: {', '.join(wrong)}"


def test_a_changed_page_and_a_stray_one_are_found_and_mended(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "upstream.md").write_text(f"Words.\n{docs._BEGIN}\nold\n{docs._END}\nMore.\n")
    docs.write(tmp_path)
    assert docs.outdated(tmp_path) == []
    stray, page = (tmp_path / "docs" / "commands" / f"{name}.md" for name in ("gone", "run"))
    stray.write_text("x")
    page.write_text(page.read_text().replace("--kv", "--vk"))
    assert set(docs.outdated(tmp_path)) == {stray, page}
    docs.write(tmp_path)
    assert docs.outdated(tmp_path) == [] and not stray.exists()
    text = (tmp_path / "docs" / "upstream.md").read_text()
    assert text.startswith("Words.\n") and text.endswith("\nMore.\n") and "old" not in text
    (tmp_path / "docs" / "upstream.md").write_text("no place for a table")
    with pytest.raises(GgufrqError, match="around its table"):
        docs.outdated(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_holds_all_options(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    text = docs.page(name)
    for param in command.params:
        if isinstance(param, click.Option):
            assert all(f"{option}" in text for option in param.opts), param.name


def test_there_is_something_to_test() -> None:
    words = {snippet.words[0] for snippet in ALL}
    assert {"ggufrq", "make"} <= words and len(ALL) > 50
    assert len({snippet.file for snippet in ALL}) > 15


@pytest.mark.parametrize("snippet", ALL, ids=lambda snippet: snippet.id)
def test_every_command_in_the_documents_parses(snippet: Snippet) -> None:
    if snippet.words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in snippet.words[1:] if "=" not in word and word != "…"]
        assert set(named) <= set(targets), snippet.line
    else:
        options_of(snippet.words[1:])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("rum MODEL", "no command 'rum'"),
        ("run MODEL --prompt-text x", "No such option"),
        ("run", "MODEL is missing"),
        ("build --backend abacus", "'abacus' is not"),
        ("upstream check", "--source is missing"),
        ("upstream czech --source 0.3.35", "no command 'czech'"),
        ("doctor MODEL bin", "too many"),
    ],
)
def test_a_command_that_is_none_is_found(line: str, error: str) -> None:
    with pytest.raises((click.ClickException, AssertionError), match=error):
        options_of(line.split())

"""Commands in the documents, taken out of their blocks of code and parsed as the command line would."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ggufrq.cli import cli

_ENDS = re.compile(r"^(?:[|&;<>]+.*|\d?>.*|)$")


@dataclass(frozen=True)
class Snippet:
    """A command in a document: the file below the repository, the line as it stands, and its words."""

    file: str
    line: str
    words: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.file}: {self.line[:60]}"


def snippets(repository: Path) -> list[Snippet]:
    """Lines of code in README, CONTRIBUTING and docs that call ggufrq or make, each once per file."""
    files = [
        *(repository / name for name in ("README.md", "CONTRIBUTING.md")),
        *(repository / "docs").rglob("*.md"),
    ]
    found: dict[Snippet, None] = {}
    for path in sorted(files):
        for line in _code(path.read_text(encoding="utf-8")):
            for words in commands(line):
                found[Snippet(path.relative_to(repository).as_posix(), line, tuple(words))] = None
    return list(found)


def _code(text: str) -> Iterator[str]:
    """Lines of fenced and indented blocks, continued ones joined."""
    fenced, before = False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            if line.endswith("\\"):
                before += line.strip()[:-1] + " "
                continue
            yield before + line.strip()
        before = ""


def commands(line: str) -> Iterator[list[str]]:
    """The calls of ggufrq and make in a line of shell."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a line of another language
        return
    command: list[str] = []
    for word in [*words, "&&"]:
        if not _ENDS.match(word):
            command.append(word.rstrip(";"))
            continue
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
            del command[0]
        if len(command) > 1 and command[0] in ("ggufrq", "make"):
            yield command
        command = []


def options_of(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command line would read: names and values. Types that need a file to be there are not tried.

    Raises click's errors, or AssertionError when a command or something required is missing.
    """
    group: click.Group = cli
    ctx = click.Context(cli, info_name="ggufrq")
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        assert any(rest[0] in param.opts for param in cli.params) or rest[0] in ("--help", "-h"), rest[0]
        if rest.pop(0) in ("--version", "--help", "-h"):
            return {}
    while True:
        assert rest, f"{ctx.info_name} takes a command"
        name = rest.pop(0)
        command = group.get_command(ctx, name)
        assert command is not None, f"there is no command '{name}'"
        ctx = click.Context(command, info_name=name, parent=ctx)
        if not isinstance(command, click.Group) or rest in (["--help"], ["-h"]):
            break
        group = command
    if "--help" in rest or "-h" in rest:
        return {}
    values, left, _ = command.make_parser(ctx).parse_args(rest)
    assert not left, f"too many arguments: {left}"
    for param in command.params:
        value = values.get(param.name or "")
        given = value is not None and value != () and type(value).__name__ != "Sentinel"
        if not given:
            shown = (
                param.metavar or param.human_readable_name
                if isinstance(param, click.Argument)
                else param.opts[0]
            )
            assert not param.required, f"{shown} is missing"
        elif isinstance(param.type, (click.Choice, click.IntRange, click.FloatRange)) and not _placeholder(
            value
        ):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                param.type.convert(one, param, ctx)
    return values


def _placeholder(value: Any) -> bool:
    """Whether a word stands for a value: ``N``, ``…``, ``MODEL``, ``A|B``."""
    return isinstance(value, str) and re.fullmatch(r"[A-Z][A-Z0-9_]*|…|[\w.]+(\|[\w.]+)+", value) is not None

"""``python -m ggufrq.cli.docs``: write what in ``docs/`` is generated: a page per command from its help, and
the table of ``docs/upstream.md`` from the rows of ``ggufrq upstream check``. ``--check`` only tells whether
they are as they would be written.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError
from ggufrq.cli import COMMANDS, cli
from ggufrq.flows import upstream

COMMAND = "python -m ggufrq.cli.docs"
_NOTE = f"<!-- written by {COMMAND} from the help of the command; change that -->"
_TITLES = {"cuda": "CUDA", "metal": "Metal", "vulkan": "Vulkan"}
_BEGIN, _END = f"<!-- the table is written by {COMMAND} -->", "<!-- end of the table -->"


def generated(root: Path) -> dict[Path, str]:
    """What is generated below the checkout ``root``: text by file. Raises GgufrqError when the place of the
    table is not there."""
    folder = root / "docs" / "commands"
    files = {folder / f"{name}.md": page(name) for name in COMMANDS}
    files[folder / "README.md"] = index()
    target = root / "docs" / "upstream.md"
    text = target.read_text(encoding="utf-8")
    if _BEGIN not in text or _END not in text:
        raise GgufrqError(f"{target} has no lines '{_BEGIN}' and '{_END}' around its table")
    head, tail = text.split(_BEGIN)[0], text.split(_END)[1]
    files[target] = f"{head}{_BEGIN}\n{table(upstream.read_rows(root / 'patches'))}\n{_END}{tail}"
    return files


def outdated(root: Path) -> list[Path]:
    """Files below ``root`` that are not what would be written, and pages of commands that are gone."""
    files = generated(root)
    wrong = [path for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]
    return wrong + [path for path in (root / "docs" / "commands").glob("*.md") if path not in files]


def write(root: Path) -> list[Path]:
    """Write what is outdated; returns the files."""
    files, changed = generated(root), outdated(root)
    for path in changed:
        if path in files:
            paths.atomic_write(path, files[path])
        else:
            path.unlink()
    return changed


def index() -> str:
    """The page that lists all commands."""
    rows = [f"| [`ggufrq {name}`]({name}.md) | {_summary(_command(name))} |" for name in COMMANDS]
    text = "\n".join([_NOTE, "# Commands", "", "| command | what it does |", "|---|---|", *rows])
    shared = "\n".join(_options(cli, click.Context(cli, info_name="ggufrq")))
    return f"{text}\n\nOptions before the command:\n\n{shared}\n"


def page(name: str) -> str:
    """The page of a command, with its subcommands."""
    return "\n".join([_NOTE, *_sections(_command(name), f"ggufrq {name}", 1)]).rstrip() + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """The compatibility table in Markdown."""
    lines = [
        "| upstream | llama.cpp | applies | builds | tests | iso3: mean KLD (pinned) | checked |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(row) for row in rows]
    machines = {f"{row['cpu']}, {row['cores']} cores, {row['compiler']}" for row in rows if row.get("cpu")}
    sets = {row["series"][:8] for row in rows}
    commands = {row["command"] for row in rows if row.get("command")}
    if commands:
        words = ["; ".join(sorted(machines)), f"series {', '.join(sorted(sets))}"]
        lines += ["", f"{'; '.join(words)}; figures by `{'`, `'.join(sorted(commands))}`."]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    applies = f"{len(row['fitted'])} patches fitted" if row["fitted"] else "as it is"
    without = [_TITLES.get(name, name) for name in row.get("without", [])]
    applies += f", without {' and '.join(without)}" if without else ""
    wrong = [name for name, verdict in row["tests"].items() if verdict != "ok"]
    tests = f"{len(row['tests']) - len(wrong)} of {len(row['tests'])} pass" if row["tests"] else ""
    iso3 = row["figures"].get("iso3")
    cells = [
        f"{row['upstream']}{' (pinned)' if row['pinned'] else ''}",
        f"`{row['commit'][:9]}` {row['date']}",
        applies if row["applies"] else "no",
        {True: "yes", False: "no", None: ""}[row["builds"]],
        f"{tests}; not {', '.join(wrong)}" if wrong else tests,
        f"{iso3['kld']:.5f} ({iso3['kld_pinned']:.5f})" if iso3 else "",
        row["checked"],
    ]
    return f"| {' | '.join(cells)} |"


def _command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def _summary(command: click.Command) -> str:
    return " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())


def _sections(command: click.Command, name: str, level: int) -> Iterator[str]:
    ctx = click.Context(command, info_name=name)
    prose, examples = _help(command.help or "")
    yield f"{'#' * level} {name}"
    yield ""
    yield from prose
    usage = " ".join([name, *command.collect_usage_pieces(ctx)])
    yield from [f"Usage: `{usage}`", ""]
    if examples:
        yield from ["Examples:", "", *(f"    {line}" for line in examples), ""]
    yield from [*_options(command, ctx), ""]
    if isinstance(command, click.Group):
        for sub in command.list_commands(ctx):
            found = command.get_command(ctx, sub)
            assert found is not None
            yield from _sections(found, f"{name} {sub}", level + 1)


def _help(text: str) -> tuple[list[str], list[str]]:
    """Paragraphs, and the lines of the block ``Examples:``."""
    prose: list[str] = []
    examples: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text).replace("\b\n", "\b")):
        lines = [line.strip() for line in paragraph.removeprefix("\b").splitlines()]
        if lines[0] == "Examples:":
            examples = lines[1:]
        elif paragraph.startswith("\b"):
            prose += [*(f"    {line}" for line in lines), ""]
        else:
            prose += [" ".join(lines), ""]
    return prose, examples


def _options(command: click.Command, ctx: click.Context) -> list[str]:
    records = [param.get_help_record(ctx) for param in command.get_params(ctx) if "--help" not in param.opts]
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in filter(None, records) if text]
    return ["| option | |", "|---|---|", *rows] if rows else []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write, or with ``--check`` look; the exit status is 1 when something was outdated."""
    root = paths.checkout_dir()
    if "--check" in sys.argv[1:]:
        wrong = outdated(root)
        for path in wrong:
            print(f"{path.relative_to(root)} is not what `{COMMAND}` writes; run that")
        sys.exit(1 if wrong else 0)
    for path in write(root):
        print(path.relative_to(root))


if __name__ == "__main__":
    main()

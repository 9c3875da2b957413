"""The order of the packages: each imports only from those before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import ggufrq

#: The order. ``ggufrq/__main__.py`` stands behind all of them, ``ggufrq/__init__.py`` imports none.
ORDER = (
    "base",
    "codec",
    "cache",
    "report",
    "source",
    "patchset",
    "ggufs",
    "build",
    "profile",
    "models",
    "hf",
    "tools",
    "runtimes",
    "drive",
    "make",
    "measure",
    "search",
    "mlx",
    "memory",
    "advise",
    "card",
    "publish",
    "flows",
    "cli",
)
PACKAGE = Path(ggufrq.__file__).parent


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module (``base.errors``) of every import of ours in a file, those inside functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ggufrq" and parts[1:] not in ([], ["__version__"]):
                module = PACKAGE.joinpath(*parts[1:])
                if not module.is_dir() and not module.with_suffix(".py").is_file():
                    parts.pop()  # the name of a function or class
                yield node.lineno, ".".join(parts[1:])


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours by its name without ``ggufrq.``, that of a package without ``__init__``."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path


def test_a_package_imports_only_from_those_before_it() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)
    wrong = []
    for name, path in modules():
        mine = name.partition(".")[0]
        before = {"__init__": 0, "__main__": len(ORDER)}
        allowed = ORDER[: before[mine] if mine in before else ORDER.index(mine) + 1]
        wrong += [
            f"{path}:{line} imports {other}"
            for line, other in imported(path)
            if other.partition(".")[0] not in allowed
        ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(
        {name: {other for _, other in imported(path)} - {name} for name, path in modules()}
    ).prepare()


def test_the_tree_in_contributing_has_the_order() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^      ([a-z]+)/ ", text, re.MULTILINE)[: len(ORDER)]) == ORDER

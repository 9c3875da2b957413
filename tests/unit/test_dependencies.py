"""What is imported is what pyproject.toml asks for."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from ggufrq.base.toml import tomllib

ROOT = Path(__file__).resolve().parents[2]
#: Ourselves, and what is found in llama.cpp's tree and in wheels of llama-cpp-python.
NOT_INSTALLED = {"ggufrq", "conversion", "llama_cpp"}


def declared() -> set[str]:
    """Names of the distributions that every installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {normal(re.split(r"[^\w.-]", line)[0]) for line in project["dependencies"]}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def test_every_import_is_declared() -> None:
    modules = set[str]().union(*(imported(path) for path in (ROOT / "ggufrq").rglob("*.py")))
    others = modules - NOT_INSTALLED - set(sys.stdlib_module_names)
    assert {"yaml", "jinja2", "numpy"} <= others
    of = packages_distributions()
    missing = {name for name in others if not {normal(d) for d in of.get(name, [name])} & declared()}
    assert missing == set()

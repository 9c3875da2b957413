"""What is imported is what pyproject.toml asks for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from ggufrq.base.toml import tomllib

ROOT = Path(__file__).resolve().parents[2]
#: Ourselves, what is in llama.cpp's tree and in wheels of llama-cpp-python, what comes with torch for CUDA.
NOT_INSTALLED = {"ggufrq", "conversion", "llama_cpp", "triton"}


def declared(extra: str = "") -> set[str]:
    """Names of the distributions that every installation has, or those of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {normal(re.split(r"[^\w.-]", line)[0]) for line in lines}


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


def undeclared(paths: Iterable[Path], names: set[str]) -> set[str]:
    """Modules of others that these files import and these distributions do not bring."""
    modules = set[str]().union(*(imported(path) for path in paths))
    others = modules - NOT_INSTALLED - set(sys.stdlib_module_names)
    of = packages_distributions()
    return {name for name in others if not {normal(d) for d in of.get(name, [name])} & names}


def test_every_import_is_declared() -> None:
    package = ROOT / "ggufrq"
    extras = {name: set((package / name).rglob("*.py")) for name in ("hf", "mlx")}
    extras["hf"] |= {package / "measure" / "lane_hf.py", package / "cli" / "validate_hf.py"}  # --lane hf
    usual = set(package.rglob("*.py")).difference(*extras.values())
    assert {"yaml", "jinja2", "numpy"} <= set[str]().union(*map(imported, usual))
    assert undeclared(usual, declared()) == set()
    for name, optional in extras.items():
        assert undeclared(optional, declared() | declared(name)) == set()


def test_what_an_extra_brings_is_imported_by_nothing_else() -> None:
    names = {"torch", "transformers", "mlx", "mlx_lm"}
    program = f"import ggufrq.cli, sys; sys.exit(bool({names!r} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "extra, module", [("hf", "torch"), ("hf", "transformers"), ("mlx", "mlx.core"), ("mlx", "mlx_lm")]
)
def test_an_extra_that_is_missing_is_named(extra: str, module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; import ggufrq.{extra}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and f"pip install 'ggufrq[{extra}]'" in done.stderr.splitlines()[-1]

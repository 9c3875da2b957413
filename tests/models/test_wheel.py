"""The wheel: what it carries, and that it works outside the checkout, in folders with spaces and umlauts."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest

from ggufrq.base import paths, proc
from ggufrq.build.project import Build
from ggufrq.make.plan import Family
from ggufrq.patchset.series import default_patch_set

REPOSITORY = Path(__file__).resolve().parents[2]
#: PyPI takes no larger files.
LIMIT = 100 << 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    proc.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=REPOSITORY)
    (made,) = folder.glob("*.whl")
    return made


def test_it_carries_all_data(wheel: Path) -> None:
    assert wheel.stat().st_size < LIMIT
    held = {name.removeprefix("ggufrq/") for name in zipfile.ZipFile(wheel).namelist()}
    assert not [name for name in held if name.endswith((".gguf", ".pyc", ".rej")) or "__pycache__" in name]
    listed = proc.run(["git", "ls-files", "ggufrq", "patches", "cmake"], cwd=REPOSITORY, check=False)
    for name in listed.stdout.splitlines():  # none in an unpacked sdist
        inside = name.removeprefix("ggufrq/") if name.startswith("ggufrq/") else f"data/{name}"
        assert inside in held, name
    patch_set = default_patch_set()
    assert {f"data/patches/{patch.name}" for patch in patch_set.patches} <= held
    assert {f"data/patches/overlay/{name}" for name in patch_set.overlay} <= held
    assert {
        "source/pin.toml",
        "data/patches/series",
        "data/patches/compat/rows.json",
        "data/texts/heldout.txt",
    } <= held


def test_it_runs_outside_the_checkout(
    wheel: Path, llama_build: Build, families: dict[str, Family], tmp_path: Path
) -> None:
    home = tmp_path / "Ordner für Räder"
    site, cache, work = home / "site packages", home / "der cache", home / "ein ort"
    proc.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel])
    work.mkdir()
    cache.mkdir()
    (cache / "builds").symlink_to(llama_build.root.parent)
    model = work / "ein modell ü.gguf"
    os.link(families["docs-qwen3-8m"].file("Q8_0"), model)
    env = {"PYTHONPATH": str(site), paths.CACHE_VARIABLE: str(cache), "PYTHONUTF8": None}

    def ggufrq(*arguments: str) -> proc.Completed:
        return proc.run([sys.executable, "-m", "ggufrq", *arguments], cwd=work, env=env)

    where = proc.run([sys.executable, "-c", "import ggufrq; print(ggufrq.__file__)"], cwd=work, env=env)
    assert Path(where.stdout.strip()).is_relative_to(site)
    assert default_patch_set().hash in ggufrq("--version").stdout
    assert ggufrq("where", "bin").stdout.strip() == str(cache / "builds" / llama_build.key / "obj" / "bin")
    said = ggufrq("run", model.name, "-p", "The CREATE TABLE", "--kv", "iso3", "-n", "8", "--json").stdout
    assert '"type_k": "iso3"' in said
    ggufrq("quantize", model.name, "--types", "Q4_K_M", "--requantize", "-o", "aus gabe ß")
    made = sorted(path.name for path in (work / "aus gabe ß").glob("*.gguf"))
    assert len(made) == 2 and made[0].endswith("-Q4_K_M.gguf") and made[1].endswith("-kv.gguf")

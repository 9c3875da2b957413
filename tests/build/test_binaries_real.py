"""A real bundle: it runs where it is unpacked and installed, asks for an old system only, and is the same
when it is made again elsewhere."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest

from ggufrq.base import paths, proc
from ggufrq.base.errors import BuildError
from ggufrq.build import base_system, builds, elf, mingw, prebuilt
from ggufrq.build.base_system import BaseSystem
from ggufrq.build.debian import Unreachable
from ggufrq.build.elf import version_key
from ggufrq.build.project import BuildOptions
from ggufrq.flows.binaries import job
from ggufrq.source import obtain
from ggufrq.source.pin import load_pin

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(platform.system() != "Linux", reason="bundles are made on Linux"),
]
PROMPT = "The CREATE TABLE statement"


@pytest.fixture(scope="module")
def base() -> BaseSystem:
    try:
        return base_system.old(platform.machine())
    except Unreachable as error:
        pytest.skip(f"no libraries of an older Debian: {error}")


@pytest.fixture(scope="module")
def bundle(base: BaseSystem, tmp_path_factory: pytest.TempPathFactory) -> job.Bundle:
    return job.make(tmp_path_factory.mktemp("dist"), arch=base.arch)


def run(tmp_path: Path, **environment: str) -> str:
    """``ggufrq run`` with no compiler on the PATH and nothing in the cache; what it says."""
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "ggufrq", "run", "docs-qwen3-8m", "--kv", "iso3", "-n", "8"]
    env = {"PATH": str(tmp_path / "empty"), paths.CACHE_VARIABLE: str(tmp_path / "cache"), **environment}
    done = proc.run([*command, "-p", PROMPT, "--raw", "--temp", "0"], env=env, timeout=600)
    assert "iso3" in done.stderr and len(done.stdout.split()) > 3
    return done.stdout


def test_it_asks_for_an_old_system_only(bundle: job.Bundle) -> None:
    assert not bundle.needs.outside
    assert version_key(bundle.needs.versions["GLIBC"]) <= (2, 31)
    assert bundle.tag == f"manylinux_2_31_{platform.machine()}" and bundle.wheel.name.endswith(
        f"{bundle.tag}.whl"
    )
    held = bundle.manifest["files"]
    assert sum(name.startswith("bin/libggml-cpu-") for name in held) >= 8 and "bin/libgomp.so.1" in held
    assert str(Path.home()) not in str(bundle.manifest)


def test_an_archive_runs_wherever_it_is_unpacked(bundle: job.Bundle, tmp_path: Path) -> None:
    with tarfile.open(bundle.archive) as tar:
        tar.extractall(tmp_path / "ein ort ü")
    (folder,) = (tmp_path / "ein ort ü").iterdir()
    assert all(str(Path.home()).encode() not in path.read_bytes() for path in (folder / "bin").iterdir())
    for name in (folder / "bin").iterdir():
        assert elf.read(name) is not None
    run(tmp_path, **{prebuilt.VARIABLE: str(folder)})
    help_text = proc.run([folder / "bin" / "llama-quantize", "--help"], check=False)
    assert "Q4_K_M" in help_text.stdout + help_text.stderr


def test_an_installed_wheel_runs(bundle: job.Bundle, tmp_path: Path) -> None:
    site = tmp_path / "site packages"
    proc.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, bundle.wheel])
    run(tmp_path, PYTHONPATH=os.pathsep.join([str(site), *filter(None, sys.path)]))


def test_written_again_it_is_the_same(bundle: job.Bundle, base: BaseSystem, tmp_path: Path) -> None:
    again = job.make(tmp_path, arch=base.arch)
    assert again.archive.read_bytes() == bundle.archive.read_bytes()
    assert again.wheel.read_bytes() == bundle.wheel.read_bytes()


def test_compiled_elsewhere_it_is_the_same(
    base: BaseSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One library, in two places, once with ccache (which makes paths relative) and once without."""
    tree = str(obtain.pristine(load_pin()))
    made = []
    for number in ("1", "2"):
        monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / f"place {number}"))
        if number == "2":
            monkeypatch.setenv("CCACHE_DISABLE", "1")
        build = builds.ensure_build(BuildOptions.portable(base=base), source=tree, targets=["ggml-base"])
        made.append((build.bin / "libggml-base.so").read_bytes())
    assert made[0] == made[1]


def test_what_newer_compilers_call_is_there(base: BaseSystem, tmp_path: Path) -> None:
    """As GCC 14 does where an exception would leave a function that lets none out."""
    base.prepare(tmp_path)
    defined = base.definitions(tmp_path)
    source = tmp_path / "program.cpp"
    source.write_text(
        'extern "C" void __cxa_call_terminate(void *);\n'
        "int main(int n, char **) { if (n > 1) { __cxa_call_terminate(nullptr); } }\n"
    )
    flags = [*shlex.split(defined["CMAKE_CXX_FLAGS"]), f"--sysroot={base.root}", "-o", tmp_path / "program"]
    libraries = shlex.split(defined["CMAKE_CXX_STANDARD_LIBRARIES"])
    proc.run([defined["CMAKE_CXX_COMPILER"], source, *flags, *libraries])
    assert proc.run([tmp_path / "program"]).rc == 0
    assert proc.run([tmp_path / "program", "1"], check=False).rc == -signal.SIGABRT


@pytest.mark.skipif(shutil.which("x86_64-w64-mingw32-g++-posix") is None, reason="takes mingw-w64")
def test_a_module_for_windows() -> None:
    """It loads what is there, holds no move that takes a stack of 32 bytes for granted, and is the same when
    it is linked again."""
    base = mingw.windows("x86_64")
    options = BuildOptions.portable(base=base)
    module = builds.ensure_build(options, targets=["ggml-cpu-haswell"]).bin / "ggml-cpu-haswell.dll"
    found = base.asks(module)
    assert found is not None and "ggml-base.dll" in found.needed
    others = set(found.needed) - base.system.libraries - {"ggml-base.dll"}
    assert all(base.library(name) is not None for name in others)
    code = proc.run([base.compiler("objdump"), "-d", "--no-show-raw-insn", module], timeout=600).stdout
    assert re.search(r"vmovups %ymm\d+,.*\(%rsp\)", code)
    assert not re.search(r"vmov(?:ap[sd]|dqa)\s.*(?:%ymm\d+,.*\(|\),%ymm)", code)
    linked = module.read_bytes()
    module.unlink()
    builds.ensure_build(options, targets=["ggml-cpu-haswell"])
    assert module.read_bytes() == linked
    name = "libwinpthread-1.dll"
    whole, stripped = BaseSystem.library(base, name), base.library(name)
    assert whole is not None and stripped is not None
    times = {
        re.findall(r"^Time/Date\t.*", proc.run([base.compiler("objdump"), "-p", file]).stdout, re.MULTILINE)[
            0
        ]
        for file in (whole, stripped)
    }
    assert len(times) == 1


def test_a_base_without_its_compiler(base: BaseSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match="which compiles for"):
        base.definitions(Path("/build"))

"""The Metal kernels on this machine, see shim/ and fake_metal.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msl
import pytest
from fake_metal import HERE, HOST, OURS, RQ, UPSTREAM, Driver, Harness, compiler, in_parallel

from ggufrq.base import proc
from ggufrq.build.project import Build


@pytest.fixture(scope="session")
def clang() -> list[str]:
    """A clang++ that takes the shim."""
    try:
        return msl.clang()
    except LookupError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def metal(llama_build: Build) -> Path:
    """The patched ggml-metal."""
    return llama_build.source / "ggml" / "src" / "ggml-metal"


@pytest.fixture(scope="session")
def embedded(metal: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What upstream's CMake embeds, by library."""
    found = msl.embed(metal, tmp_path_factory.mktemp("embed"))
    return {name: path.read_text() for name, path in found.items()}


@pytest.fixture(scope="session")
def harness(
    llama_build: Build,
    clang: list[str],
    metal: Path,
    embedded: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Harness:
    """All compiled, once."""
    folder = tmp_path_factory.mktemp("metal")
    found = Harness(llama_build, clang, folder, embedded)
    # functions of ggml's headers, and makecontext on macOS
    unavoidable = ("-Wno-unused-function", "-Wno-deprecated-declarations")
    include = [f"-I{path}" for path in (HERE, metal, metal.parent, metal.parent.parent / "include")]

    def host(name: str, source: Path) -> tuple[str, Path]:
        target = folder / f"{name.replace('/', '-')}.host.o"
        strict = ["-w"] if source.is_relative_to(metal) else ["-Wall", "-Wextra", "-Werror", *unavoidable]
        proc.run([compiler(), "-std=c++17", "-O1", *strict, *include, "-c", source, "-o", target])
        return f"host {name}", target

    def kernels(library: str, wanted: Callable[[str], bool]) -> tuple[str, Path]:
        return library, found.compile_kernels(library, embedded[library], folder / f"{library}.o", wanted)

    jobs: list[Callable[[], Any]] = [lambda name=name: kernels(name, bool) for name in RQ]
    jobs += [lambda item=item: kernels(*item) for item in UPSTREAM.items()]
    jobs += [lambda name=name: host(f"upstream-{name}", metal / f"ggml-metal-{name}.cpp") for name in HOST]
    jobs += [lambda name=name: host(name, HERE / f"{name}.cpp") for name in OURS]
    found.objects.update(in_parallel(jobs))
    return found


@pytest.fixture(scope="session")
def driver(harness: Harness) -> Driver:
    """The driver with the kernels as they are."""
    return harness.link(harness.folder / "driver", harness.kernels())

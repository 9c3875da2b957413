"""Models in f16, and programs of ours compiled against the build."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kv_drivers import DENSE, HYBRID, NARROW, ONE_THREAD
from narrow import with_heads_of

from ggufrq.base import paths, proc
from ggufrq.build.project import Build
from ggufrq.models.convert import convert

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def f16_models(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both embedded models as f16 GGUF files, and the dense one in heads of 64."""
    folder = tmp_path_factory.mktemp("f16 models")
    sources = {name: paths.data_dir("models") / name for name in (HYBRID, DENSE)}
    sources[NARROW] = with_heads_of(64, folder)
    return {
        name: convert(source, folder / f"{name}.gguf", llama_build.source) for name, source in sources.items()
    }


@pytest.fixture(scope="session")
def compiled(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compiled(name, *flags): the program of name.cpp beside this file."""

    def build(name: str, *flags: str) -> Path:
        out = tmp_path_factory.mktemp("driver") / name
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        folders = ("include", "ggml/include", "ggml/src")
        include = [f"-I{llama_build.source / folder}" for folder in folders]
        link = [f"-L{llama_build.bin}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{llama_build.bin}"]
        proc.run([compiler, "-std=c++17", "-O1", *flags, *include, HERE / f"{name}.cpp", "-o", out, *link])
        return out

    return build


@pytest.fixture(scope="session")
def driver(compiled: Callable[..., Path]) -> Path:
    """kv_cache.cpp, compiled against the build."""
    return compiled("kv_cache")


@pytest.fixture(scope="session")
def twins(compiled: Callable[..., Path]) -> Path:
    """twins.cpp as a library: two devices, Twin0 and Twin1, for GGML_BACKEND_PATH."""
    return compiled("twins", "-shared", "-fPIC")


@pytest.fixture(scope="session")
def tiny_models(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Upstream's own generator makes a tiny random model per architecture."""
    folder = tmp_path_factory.mktemp("architectures")
    proc.run([llama_build.tool("test-llama-archs"), "-s", "1", "-o", folder], env=ONE_THREAD, timeout=600)
    return {path.stem: path for path in sorted(folder.rglob("*.gguf"))}

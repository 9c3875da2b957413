"""What a device cannot do with a cache type is said when a context is made, not found out by its slowness."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.build.project import Build

pytestmark = pytest.mark.build

HERE = Path(__file__).resolve().parent
OVERLAY = HERE.parents[1] / "patches" / "overlay" / "src"


@pytest.fixture(scope="module")
def program(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """device_check.cpp, compiled against the build."""
    out = tmp_path_factory.mktemp("device") / "device_check"
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    source = llama_build.source
    folders = ("src", "include", "ggml/include", "ggml/src")
    include = [f"-I{folder}" for folder in (OVERLAY, *(source / folder for folder in folders))]
    link = [f"-L{llama_build.bin}", "-lllama", "-lggml-base", f"-Wl,-rpath,{llama_build.bin}"]
    sources = [HERE / "device_check.cpp", OVERLAY / "llama-rq-device.cpp"]
    proc.run([compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", *include, *sources, "-o", out, *link])
    return out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "iso3", "planar4"], ""),
        (["nothing", "iso3", "f16", "no-flash-attn"], ""),
        (["set_rows", "iso3", "q8_0"], "cannot store rows of iso3"),
        # what is stored has another name, which nobody typed
        (["nothing", "iso3", "iso3", "64/64"], ""),
        (["siblings", "iso3", "iso3", "64/64"], "cannot store rows of iso3 at head_dim 64"),
        (["siblings", "q8_0", "planar4", "128/192"], "cannot store rows of planar4 at head_dim 192"),
        (["siblings", "iso3", "iso3", "128/128"], ""),
        (
            ["mixed", "iso3", "iso3", "192/128"],
            "no attention kernel for K in iso3 and V in iso3 at head_dim 192/128 and 4 heads to a KV head",
        ),
        (["mixed", "iso3", "iso3"], ""),
        (
            ["mixed", "iso3", "q4_0"],
            "has no attention kernel for K in iso3 and V in q4_0 at head_dim 128",
        ),
        (["prompts", "rotor2", "rotor2"], "has no attention kernel for K in rotor2 and V in rotor2"),
        (["mul_mat", "iso3", "f16", "no-flash-attn"], "without flash attention for K in iso3"),
    ],
)
def test_what_a_device_lacks(program: Path, arguments: list[str], said: str) -> None:
    line = proc.run([program, *arguments]).stdout.strip()
    assert line == said or (said and said in line)

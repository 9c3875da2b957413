"""What the CUDA backend says of operations on our types; no CUDA needed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.build.project import Build

pytestmark = pytest.mark.build

HERE = Path(__file__).resolve().parent
OVERLAY = HERE.parents[1] / "patches" / "overlay" / "ggml" / "src"


def test_what_is_there_is_taken_and_what_is_not_is_refused(llama_build: Build, tmp_path: Path) -> None:
    """Shapes of attention are as upstream's kernels have them, but for capped scores, which those have for
    heads of 128 and more and do not say so; products with our types are in no list of upstream's."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    ggml = llama_build.source / "ggml"
    include = [f"-I{folder}" for folder in (OVERLAY, ggml / "include", ggml / "src")]
    link = [f"-L{llama_build.bin}", "-lggml-base", f"-Wl,-rpath,{llama_build.bin}"]
    strict = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unused-function"]
    program = tmp_path / "cuda_supports"
    proc.run([compiler, *strict, *include, HERE / "cuda_supports.cpp", "-o", program, *link])
    said = json.loads(proc.run([program]).stdout)

    for name in ("iso3", "rq3_64"):
        for operation in ("set_rows", "get_rows", "cpy from f32", "cpy to f32", "cpy within"):
            assert said.pop(f"{name} {operation}") == "yes", operation
        for operation in ("cpy from f16", "cpy to planar", "cpy of columns"):
            assert said.pop(f"{name} {operation}") == "no", operation
        assert said.pop(f"{name} mul_mat") == "upstream"
        assert [said.pop(f"{name}/{v}") for v in (name, "f16", "q8_0", "q4_0")] == ["upstream"] * 3 + ["no"]
    assert said == {
        "iso3 capped": "upstream",
        "rq3_64 capped": "no",
        "rq3_64/iso3 192/128": "upstream",
        "rq3_64/iso3 192/128 capped": "no",
        "rq3_64 576/512": "upstream",
        "rq3_64 320/256": "upstream",
        "f16 64 capped": "upstream",
    }

"""Which library of a build is loaded: the one of that name, or the module that suits the processor best."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.build.ggml_library import library

pytestmark = [pytest.mark.native, pytest.mark.skipif(sys.platform != "linux", reason="modules of Linux")]


def module(compiler: str, path: Path, score: int) -> None:
    source = path.with_suffix(".c")
    source.write_text(f"int ggml_backend_score(void) {{ return {score}; }}\n")
    proc.run([compiler, "-shared", "-fPIC", source, "-o", path])


def test_the_module_that_suits_this_processor_best(compiler: str, tmp_path: Path) -> None:
    for name, score in (("haswell", 64), ("zen4", 700), ("x64", 1), ("sapphirerapids", 0)):
        module(compiler, tmp_path / f"libggml-cpu-{name}.so", score)
    assert library(tmp_path, "ggml-cpu").ggml_backend_score() == 700
    with pytest.raises(OSError, match="has no library ggml-base"):
        library(tmp_path, "ggml-base")
    module(compiler, tmp_path / "libggml-base.so.0", 5)
    assert library(tmp_path, "ggml-base").ggml_backend_score() == 5, "as it is called in a bundle"

"""Our CUDA files and those that the hooks are in, compiled for one card by NVIDIA's compiler; no GPU needed.

The whole of ggml-cuda takes a quarter of an hour on two cores, these files two minutes; the rest is
upstream's. Compiler and cuBLAS come from the system or, once, from NVIDIA's wheels into the cache.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from ggufrq.base import paths, proc
from ggufrq.base.errors import ToolError
from ggufrq.build import builds, cuda_toolkit
from ggufrq.build.project import BuildOptions

pytestmark = [pytest.mark.build, pytest.mark.cuda_compile, pytest.mark.slow]

OVERLAY = Path(__file__).resolve().parents[2] / "patches" / "overlay" / "ggml" / "src" / "ggml-cuda"
OBJECTS = "ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir"
HOOKED = ("convert.cu", "fattn.cu", "ggml-cuda.cu")


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete toolkit; NVIDIA's wheels are installed into the cache where there is none."""
    if not cuda_toolkit.missing():
        return
    digest = hashlib.sha256(" ".join(cuda_toolkit.WHEELS).encode()).hexdigest()[:12]
    target = paths.cache_dir() / f"cuda-wheels-{digest}"
    if not target.is_dir():
        try:
            with paths.atomic_path(target) as making:
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", making]
                proc.run([*command, *cuda_toolkit.WHEELS], timeout=900)
        except ToolError as error:
            pytest.skip(f"no CUDA compiler here, and none from PyPI: {error}")
    monkeypatch.setenv("CUDA_PATH", str(next((target / "nvidia").glob("cu[0-9]*"))))


@pytest.mark.skipif(os.name != "posix", reason="object files are named as on POSIX")
def test_our_files_and_the_hooked_ones_compile(toolkit: None) -> None:
    names = [*sorted(path.name for path in OVERLAY.glob("*.cu")), *HOOKED]
    assert len(names) >= 10
    targets = [f"{OBJECTS}/{name}.o" for name in names]
    options = BuildOptions(backend="cuda", cmake_args=("-DCMAKE_CUDA_ARCHITECTURES=90-real",))
    made = builds.ensure_build(options, targets=targets)
    assert all((made.root / "obj" / target).is_file() for target in targets)
    assert made.manifest["versions"]["nvcc"].startswith("1")

"""The bundle of scripts/gpu_check.py, of a build for the CPU: the same but for the code of the card."""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.base.errors import BuildError
from ggufrq.build.project import Build

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import gpu_bundle
import gpu_check

pytestmark = pytest.mark.build


@pytest.mark.parametrize("name", gpu_check.OPS)
def test_a_pattern_finds_cases(llama_build: Build, name: str) -> None:
    op, params = gpu_check.OPS[name]
    program = llama_build.tool("test-backend-ops")
    listed = proc.run([program, "support", "-b", "CPU", "-o", op, "-p", params]).stdout
    assert len(re.findall(r"\(.*(?:iso|planar|rotor|family)", listed)) >= 10


def test_the_bundle_is_complete_and_one_that_is_not_is_refused(llama_build: Build, tmp_path: Path) -> None:
    root = tmp_path / "gpu-check"
    root.mkdir()
    facts = gpu_bundle.collect(root, llama_build.root, 90, models=False)
    assert facts["left"] == [] and facts["patch_set"] == llama_build.manifest["patch_set"]
    assert facts["bytes"]["stripped"] < facts["bytes"]["built"]
    assert {*gpu_bundle.PROGRAMS, "libllama.so.0", "libstdc++.so.6"} <= {
        p.name for p in (root / "bin").iterdir()
    }

    def prove() -> str:
        with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
            tar.add(root, "gpu-check")
        return gpu_bundle.prove(tmp_path / "bundle.tar", llama_build.root)

    assert prove().endswith("no device: the bundle is of a build without CUDA")
    (root / "bin" / "libllama.so.0").unlink()
    facts["files"].pop("bin/libllama.so.0")
    gpu_bundle.write_facts(root, facts)
    with pytest.raises(BuildError, match=r"status 1(.|\n)*libllama\.so\.0"):
        prove()

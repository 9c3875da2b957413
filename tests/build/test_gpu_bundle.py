"""The bundle of scripts/gpu_check.py, of a build for the CPU: the same but for the code of the card."""

from __future__ import annotations

import platform
import re
import sys
import tarfile
from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.base.errors import BuildError
from ggufrq.build.project import Build
from ggufrq.build.toolchain import compiler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import gpu_bundle
import gpu_check

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the bundle is for Linux on x86-64"
    ),
]


@pytest.mark.parametrize("name", gpu_check.OPS)
def test_a_pattern_finds_cases(llama_build: Build, name: str) -> None:
    op, params = gpu_check.OPS[name]
    program = llama_build.tool("test-backend-ops")
    listed = proc.run([program, "support", "-b", "CPU", "-o", op, "-p", params]).stdout
    assert len(re.findall(r"\(.*(?:iso|planar|rotor|family|rq._64)", listed)) >= 10


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


#: CUDA's runtime with a card whose copy of 4 GiB takes 4 ms, or with none; a call that is wrong fails.
RUNTIME = """
#include <stddef.h>
typedef int status;
static char memory[2]; static char events[2]; static int n_memory, n_events, copied;
const char * cudaGetErrorString(status s) { return s == 100 ? "no device is detected" : "wrong call"; }
status cudaGetDeviceCount(int * n) { *n = CARDS; return CARDS ? 0 : 100; }
status cudaSetDevice(int device) { return device != 0; }
status cudaMalloc(void ** p, size_t n) { *p = memory + n_memory++; return n != (size_t) 4 << 30; }
status cudaEventCreate(void ** e) { *e = events + n_events++; return n_events > 2; }
status cudaEventRecord(void * e, void * stream) { return e != events + copied % 2 || stream != NULL; }
status cudaMemcpyAsync(void * d, void * s, size_t n, int kind, void * stream) {
    copied++;
    return d != memory || s != memory + 1 || n != (size_t) 4 << 30 || kind != 3 || stream != NULL;
}
status cudaEventSynchronize(void * e) { return e != events + 1; }
status cudaEventElapsedTime(float * ms, void * a, void * b) {
    copied = 0;
    *ms = 4.0f;
    return a != events || b != events + 1;
}
status cudaDeviceGetAttribute(int * v, int what, int device) {
    *v = what == 75 ? 9 : what == 76 ? 0 : what == 16 ? 132 : -1;
    return device;
}
status cudaDriverGetVersion(int * v) { *v = 13000; return 0; }
status cudaRuntimeGetVersion(int * v) { *v = 13000; return 0; }
"""


@pytest.mark.parametrize("cards", [0, 1])
def test_what_the_driver_is_asked(tmp_path: Path, cards: int) -> None:
    (tmp_path / "runtime.c").write_text(RUNTIME)
    library = tmp_path / "libcudart.so.13"
    found = compiler()
    assert found is not None
    proc.run(
        [found.path, "-x", "c", f"-DCARDS={cards}", "-shared", "-fPIC", "-o", library, tmp_path / "runtime.c"]
    )
    want = {"cuda": 13000, "runtime": 13000, "capability": "9.0", "multiprocessors": 132, "copy": 2147.5}
    none = {"no_device": "cudaGetDeviceCount: no device is detected"}
    assert gpu_check.probe(library) == (want if cards else none)

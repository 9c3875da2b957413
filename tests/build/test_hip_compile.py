"""Our CUDA files and those that the hooks are in, compiled as HIP for AMD cards; no GPU needed.

Where ROCm 6.1 or newer is installed its compiler does it. Elsewhere, on Debian, the headers of HIP, hipBLAS
and rocBLAS come from the release that has them new enough, and clang from this one, both unpacked into the
cache: every kernel becomes machine code, but is not linked to AMD's device libraries, and no program is made.
What passed is kept by the hash of all sources and headers, so that it is not compiled again.
"""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from ggufrq.base import machine, parallel, paths, proc
from ggufrq.base.errors import ToolError
from ggufrq.build import hip_toolkit
from ggufrq.build.debian import Unreachable, own_release, unpack
from ggufrq.build.project import Build

pytestmark = [pytest.mark.build, pytest.mark.hip_compile, pytest.mark.slow]

OVERLAY = Path(__file__).resolve().parents[2] / "patches" / "overlay" / "ggml" / "src" / "ggml-cuda"
HOOKED = ("convert.cu", "fattn.cu", "ggml-cuda.cu")
#: All files for Radeon RX 7900; some for Instinct MI200, whose wavefronts of 64 lanes two of our warps share.
CARD = "gfx1100"
WIDE_CARD, WIDE = "gfx90a", ("rq-fattn-rq3.cu", "rq.cu")
DEBIAN = "forky"
CLANG = ["clang-19", "libclang-common-19-dev", "libclang-cpp19", "libllvm19"]
HEADERS = ["libamdhip64-dev", "libhipblas-dev", "libhipblas-common-dev", "librocblas-dev"]

# as ggml-hip's CMake has them; of upstream's attention kernels for K and V the ones in f16
_PAIRS = product(("F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"), repeat=2)
_DEFINED = ("GGML_USE_HIP", "GGML_HIP_GRAPHS", "GGML_HIP_NO_VMM", "GGML_SHARED", "GGML_SCHED_MAX_COPIES=4")
FLAGS = [
    *("-x", "hip", "-S", "-O3", "-std=gnu++17", "-fPIC", "-DNDEBUG", "-D__HIP_PLATFORM_AMD__=1"),
    *(f"-D{name}" for name in _DEFINED),
    *(f"-DGGML_CUDA_FA_{k}_{v}={int(k == v == 'F16')}" for k, v in _PAIRS),
]


@dataclass(frozen=True)
class Compiler:
    """clang++ with the flags that make it find HIP, the environment it runs in, and what it calls itself."""

    command: list[str]
    environment: dict[str, str]
    version: str


def _of_rocm(found: hip_toolkit.Toolkit) -> Compiler:
    return Compiler([str(found.compiler), f"--rocm-path={found.root}"], {}, found.version)


def _of_debian() -> Compiler:
    """clang of this Debian, the headers of a newer one. Raises Unreachable."""
    names = " ".join([*CLANG, own_release(), DEBIAN, *HEADERS, platform.machine()])
    root = paths.cache_dir() / f"hip-debian-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
    if not root.is_dir():
        with paths.atomic_path(root) as making:
            unpack(making, CLANG, release=DEBIAN, alone=HEADERS)
    text = (root / "usr/include/hip/hip_version.h").read_text(encoding="utf-8")
    version = ".".join(re.findall(r"#define HIP_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text))
    bin_folder = root / "usr/lib" / CLANG[0].replace("clang", "llvm") / "bin"
    libraries = [root / "usr/lib" / f"{platform.machine()}-linux-gnu", bin_folder.parent / "lib"]
    command = [str(bin_folder / "clang++"), "-nogpulib", f"--rocm-path={root / 'usr'}"]
    command += [f"--hip-version={version}", "-isystem", str(root / "usr/include")]
    return Compiler(command, {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}, f"{CLANG[0]}, HIP {version}")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    try:
        found = hip_toolkit.toolkit()
        compiler = _of_debian() if hip_toolkit.missing() or found is None else _of_rocm(found)
    except Unreachable as error:
        pytest.skip(f"no HIP of 6.1 or newer here, and none from Debian: {error}")
    hello = tmp_path_factory.mktemp("hip") / "hello.cu"
    hello.write_text("#include <hip/hip_runtime.h>\n#include <hipblas/hipblas.h>\n__global__ void k() {}\n")
    try:
        _compile(compiler, hello, CARD, hello.parent)
    except ToolError as error:
        pytest.skip(f"{compiler.version} does not compile an empty kernel: {error}")
    return compiler


def _compile(compiler: Compiler, file: Path, card: str, folder: Path, *flags: str) -> None:
    """Machine code of the card and, for the first card, the host's part, both as assembly."""
    for part in ("device", "host") if card == CARD else ("device",):
        target = folder / f"{file.stem}-{card}-{part}.s"
        where = [f"--cuda-{part}-only", f"--offload-arch={card}", file, "-o", target]
        proc.run([*compiler.command, *FLAGS, *flags, *where], env=dict(compiler.environment), timeout=900)
        assert target.stat().st_size > 0


def _digest(compiler: Compiler, source: Path) -> str:
    parts = [*compiler.command, compiler.version, *FLAGS, CARD, WIDE_CARD, *WIDE]
    for folder in ("ggml/include", "ggml/src", "ggml/src/ggml-cuda", "ggml/src/ggml-cuda/vendors"):
        for path in sorted((source / folder).iterdir()):
            if path.suffix in (".h", ".cuh", ".cu"):
                parts.append(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def test_our_files_and_the_hooked_ones_compile_for_amd(
    compiler: Compiler, llama_build: Build, tmp_path: Path
) -> None:
    sources = llama_build.source / "ggml" / "src"
    passed = paths.cache_dir() / "hip-compiled" / _digest(compiler, llama_build.source)
    names = [*sorted(path.name for path in OVERLAY.glob("*.cu")), *HOOKED]
    assert len(names) >= 10
    if passed.is_file():
        return
    include = [f"-I{folder}" for folder in (sources, sources.parent / "include", sources / "ggml-cuda")]
    work = [*((name, WIDE_CARD) for name in WIDE), *((name, CARD) for name in reversed(names))]

    def one(item: tuple[str, str]) -> None:
        _compile(compiler, sources / "ggml-cuda" / item[0], item[1], tmp_path, *include)

    assert len(list(parallel.each(one, work, machine.compile_jobs()))) == len(work)
    paths.atomic_write(passed, "\n".join(f"{name} {card}" for name, card in work) + "\n")

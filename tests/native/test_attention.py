"""The CPU kernels of the cache types against upstream's attention: natively, under sanitizers, and on ARM."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.build import toolchain
from ggufrq.build.project import Build

pytestmark = [pytest.mark.native, pytest.mark.build]

SOURCE = Path(__file__).resolve().parent / "attention"
CROSS = "aarch64-linux-gnu"


def build_alone(folder: Path, tree: Path, *options: str, target: str = "rq_attention") -> Path:
    """The test program with a static ggml of its own, made by CMake; or all of that ggml."""
    cmake, ninja = toolchain.cmake(), toolchain.ninja()
    assert cmake is not None
    assert ninja is not None
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja.path}"]
    paths = ["-S", str(SOURCE), "-B", str(folder), f"-DGGML_TREE={tree / 'ggml'}"]
    proc.run([cmake.path, *generator, *paths, "-DCMAKE_BUILD_TYPE=Release", *options])
    proc.run([cmake.path, "--build", folder, "--target", target])
    return folder / "rq_attention"


def passed(output: str, cases: int) -> bool:
    return output.splitlines()[-1].startswith(f"{cases} cases, 0 failed, ")


def test_against_upstream(llama_build: Build, tmp_path: Path) -> None:
    out = tmp_path / "rq_attention"
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    include = [f"-I{llama_build.source / 'ggml' / folder}" for folder in ("include", "src")]
    link = [f"-L{llama_build.bin}", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{llama_build.bin}"]
    proc.run([compiler, "-std=c++17", "-O2", *include, SOURCE / "rq_attention.cpp", "-o", out, *link])
    assert passed(proc.run([out, "400", "1"], env={"OMP_WAIT_POLICY": "passive"}, timeout=300).stdout, 400)


@pytest.mark.thorough
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(llama_build: Build, tmp_path: Path, sanitizer: str) -> None:
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all"
    options = [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]
    if sanitizer == "thread":
        options.append("-DGGML_SANITIZE_THREAD=ON")
    program = build_alone(tmp_path / "build", llama_build.source, *options)
    assert passed(proc.run([program, "200", "2", "512"], timeout=1200).stdout, 200)


@pytest.mark.thorough
@pytest.mark.parametrize(("arch", "what"), [("armv8-a", "neon"), ("armv8.2-a+dotprod", "neon and dotprod")])
def test_arm(llama_build: Build, tmp_path: Path, arch: str, what: str) -> None:
    qemu = shutil.which("qemu-aarch64")
    if not shutil.which(f"{CROSS}-g++") or qemu is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (apt-get install them)")
    program = build_alone(
        tmp_path / "build",
        llama_build.source,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_C_COMPILER={CROSS}-gcc",
        f"-DCMAKE_CXX_COMPILER={CROSS}-g++",
        "-DGGML_NATIVE=OFF",
        f"-DGGML_CPU_ARM_ARCH={arch}",
    )
    done = proc.run([qemu, "-L", f"/usr/{CROSS}", program, "60", "3", "256"], timeout=1200)
    assert passed(done.stdout, 60), what


SIMD = ["SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2"]


@pytest.mark.thorough
@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="x86 only")
@pytest.mark.parametrize("state", ["ON", "OFF"])
def test_other_x86(llama_build: Build, tmp_path: Path, state: str) -> None:
    options = ["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}={state}" for name in SIMD)]
    program = build_alone(tmp_path / "build", llama_build.source, *options)
    assert passed(proc.run([program, "200", "4", "512"], timeout=1200).stdout, 200)


@pytest.mark.thorough
def test_all_variants(llama_build: Build, tmp_path: Path) -> None:
    """One library per CPU level, as distributions build them: all compile, and those that run here agree."""
    options = ["GGML_BACKEND_DL=ON", "GGML_CPU_ALL_VARIANTS=ON", "GGML_NATIVE=OFF", "BUILD_SHARED_LIBS=ON"]
    tree, folder = llama_build.source, tmp_path / "build"
    build_alone(folder, tree, *(f"-D{option}" for option in options), target="all")
    variants = sorted(folder.rglob("libggml-cpu-*.so"))
    assert len(variants) > 3
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    base = next(folder.rglob("libggml-base.so"))
    ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL)
    agreed = []
    for variant in variants:
        if ctypes.CDLL(str(variant)).ggml_backend_score() == 0:  # this CPU lacks what the variant needs
            continue
        out = tmp_path / variant.stem
        link = [variant, base, f"-Wl,-rpath,{variant.parent}", f"-Wl,-rpath,{base.parent}"]
        include = [f"-I{tree / 'ggml' / folder}" for folder in ("include", "src")]
        source = [*include, SOURCE / "rq_attention.cpp"]
        proc.run([compiler, "-std=c++17", "-O2", *source, "-o", out, *link])
        done = proc.run([out, "100", "5", "512"], env={"OMP_WAIT_POLICY": "passive"}, timeout=600)
        assert passed(done.stdout, 100), variant.name
        agreed.append(variant.name)
    assert agreed

"""Upstream's host code for Metal on a device that is none, with kernels compiled through the shim."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msl

from ggufrq.base import proc
from ggufrq.build.project import Build

HERE = msl.HERE

HOST = ("ops", "device", "common", "fusion", "tuning")  # upstream's, in ggml-metal-*.cpp
OURS = ("device", "driver", "questions", "shim/lanes", "shim/kernels")

HEADS = (64, 64), (128, 128), (192, 128), (256, 256), (320, 256), (512, 512), (576, 512)
F16_HEADS = tuple(f"dk{k}_dv{v}" for k, v in HEADS)

#: Upstream's kernels that the tests run: those of ours, and what its attention needs.
UPSTREAM: dict[str, Callable[[str], bool]] = {
    "quantize": lambda name: name.endswith(("q8_0", "q4_0", "q8_0_f32", "q4_0_f32", "q8_0_f16", "q4_0_f16")),
    "fa_aux": lambda name: name.startswith("kernel_flash_attn_ext"),
    "fa_f16": lambda name: "bf16" not in name and name.endswith(F16_HEADS),
    "fa_vec_f16": lambda name: name.endswith(("vec_f16_dk320_dv256", "vec_f16_dk320_dv256_q2_ne2")),
    "fa_q8_0": lambda name: "dk128_dv128" in name,
    "fa_q4_0": lambda name: "dk128_dv128" in name,
    "fa_vec_q8_0": lambda name: name.endswith("dk128_dv128"),
    "fa_vec_q4_0": lambda name: name.endswith("dk128_dv128"),
}
RQ = ("rq", "fa_rq", "fa_vec_rq")


@dataclass(frozen=True)
class Driver:
    """driver.cpp, linked with kernels."""

    program: Path

    def __call__(self, *arguments: str | int, env: dict[str, str | None] | None = None) -> Any:
        """What it prints for these arguments."""
        # not faster with more threads, which would only disturb other tests
        done = proc.run([self.program, *map(str, arguments)], env={"OMP_NUM_THREADS": "1", **(env or {})})
        return json.loads(done.stdout)


@dataclass(frozen=True)
class Harness:
    """Makes drivers."""

    build: Build
    clang: list[str]
    folder: Path
    sources: dict[str, str]  # embedded kernels by library
    objects: dict[str, Path] = field(default_factory=dict)

    def compile_kernels(self, library: str, source: str, target: Path, wanted: Callable[[str], bool]) -> Path:
        """An object file of a library's kernels."""
        return msl.compile_kernels(self.clang, msl.translate(source, library, wanted), target)

    def link(self, target: Path, kernels: dict[str, Path]) -> Driver:
        """A driver of the host's objects and these kernels."""
        hosts = [path for name, path in self.objects.items() if name.startswith("host ")]
        proc.run([compiler(), *hosts, *kernels.values(), "-o", target, *self._libraries("ggml-cpu")])
        return Driver(target)

    def link_program(self, name: str) -> Path:
        """The program of name.cpp beside driver.cpp, with the host's side and no kernels."""
        source = self.build.source
        inside = ("ggml/src/ggml-metal", "ggml/src", "ggml/include", "include")
        include = [HERE, HERE.parent / "cache", *(source / folder for folder in inside)]
        skipped = ("host driver", "host questions")
        hosts = [path for key, path in self.objects.items() if key.startswith("host ") and key not in skipped]
        target = self.folder / name
        flags = ["-std=c++17", "-O1", *(f"-I{folder}" for folder in include)]
        proc.run(
            [
                compiler(),
                *flags,
                HERE / f"{name}.cpp",
                *hosts,
                "-o",
                target,
                *self._libraries("llama", "ggml"),
            ]
        )
        return target

    def _libraries(self, *more: str) -> list[str]:
        names = [f"-l{name}" for name in (*more, "ggml-base")]
        return [f"-L{self.build.bin}", *names, f"-Wl,-rpath,{self.build.bin}"]

    def kernels(self) -> dict[str, Path]:
        """The object files of all libraries."""
        return {name: path for name, path in self.objects.items() if not name.startswith("host ")}


def compiler() -> str:
    """The C++ compiler of the host's side."""
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def in_parallel(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Two at a time, as machines have at least."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]

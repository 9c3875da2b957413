"""What is built: options, targets, CMake's definitions, and the key that tells builds apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ToolError
from ggufrq.build import backends, cmake_files
from ggufrq.build.base_system import BaseSystem
from ggufrq.patchset.series import PatchSet, default_patch_set
from ggufrq.source.pin import Pin, load_pin

#: Variables that CMake and compilers read; they make another build.
_ENVIRONMENT = (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_TOOLCHAIN_FILE", "CMAKE_PREFIX_PATH"),
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
    *("HIPCXX", "HIPHOSTCXX", "HIPFLAGS"),
)

TARGETS = (
    "llama-quantize",
    "llama-completion",
    "llama-cli",
    "llama-perplexity",
    "llama-bench",
    "llama-imatrix",
    "llama-server",
    "llama-gguf-split",
    "llama-fit-params",
    "llama-rq-moments",
    "ggml-rpc-server",
)
TEST_TARGETS = (
    "test-backend-ops",
    "test-quantize-fns",
    "test-quantize-perf",
    "test-arg-parser",
    "test-llama-archs",
    "test-save-load-state",
    "test-state-restore-fragmented",
)


@dataclass(frozen=True)
class BuildOptions:
    """What a build is for. ``tests`` and ``jobs`` do not make another build, the rest does.

    ``native`` compiles for this very processor; ``cmake_args`` are added to CMake's command line as they are.
    ``base`` is the system that the result is to be given away for, None where it stays here.
    """

    backend: str = field(default_factory=backends.default)
    native: bool = True
    tests: bool = False
    jobs: int | None = None
    cmake_args: tuple[str, ...] = ()
    base: BaseSystem | None = None

    @classmethod
    def portable(cls, backend: str = "cpu", **others: Any) -> BuildOptions:
        """For all processors of the architecture: code for each kind is a module, of which the best is
        loaded."""
        every = tuple(f"-D{name}={on}" for name, on in cmake_files.options("portable").items())
        return cls(backend, False, cmake_args=every + others.pop("cmake_args", ()), **others)


@dataclass(frozen=True)
class Project:
    """What is built: the pinned source, the patch set, CMake's definitions, and the targets."""

    pin: Pin
    patch_set: PatchSet
    targets: tuple[str, ...] = TARGETS
    test_targets: tuple[str, ...] = TEST_TARGETS
    definitions: dict[str, str] = field(default_factory=lambda: cmake_files.options("common"), hash=False)


@dataclass(frozen=True)
class Build:
    """A complete build: its key, its folder, the folder of its programs, the patched source, and its
    manifest.
    """

    key: str
    root: Path
    bin: Path
    source: Path
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @property
    def lacks_five_bits(self) -> bool:
        """Whether caches lie on a GPU, unless told otherwise, by a backend without kernels for five bits."""
        return self.manifest.get("backend", "cpu") not in ("cpu", "vulkan")

    def tool(self, name: str) -> Path:
        """Path of a program of this build. Raises ToolError when it was not built."""
        for path in (self.bin / name, self.bin / f"{name}.exe"):  # for Windows, here or on Linux
            if path.is_file():
                return path
        command = "ggufrq build --tests" if name.startswith("test-") else f"ggufrq build --target {name}"
        raise ToolError(f"the build in {self.root} has no program '{name}'", remedy=command)


def llama_project() -> Project:
    """llama.cpp at the pinned commit with the patch set that comes with ggufrq."""
    return Project(load_pin(), default_patch_set())


def build_key(project: Project, options: BuildOptions) -> str:
    """The name of a build: commit, backend, and a hash of everything that its programs depend on."""
    backend = backends.get(options.backend)
    facts = {
        "commit": project.pin.commit,
        "patches": project.patch_set.hash,
        "definitions": sorted(definitions(project, options).items()),
        "machine": backend.identity(native=options.native),
        "cmake_args": list(options.cmake_args),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)},
    }
    if options.base is not None:
        facts["base"] = options.base.identity()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{project.pin.short}-{options.backend}-{digest[:12]}"


def definitions(project: Project, options: BuildOptions) -> dict[str, str]:
    """CMake's cache definitions: the project's, the backend's, and the stamp that the programs print."""
    backend = backends.get(options.backend)
    return {
        **project.definitions,
        **backend.definitions(native=options.native),
        "LLAMA_BUILD_COMMIT": f"{project.pin.short}-rq{project.patch_set.hash[:8]}",
    }


def wanted_targets(project: Project, options: BuildOptions, targets: Sequence[str] | None) -> tuple[str, ...]:
    """The targets asked for: those given or the usual ones, and with ``tests`` the tests."""
    chosen = tuple(targets) if targets else project.targets
    return chosen + (project.test_targets if options.tests else ())

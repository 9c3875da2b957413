"""AMD's HIP compiler and libraries, of ROCm or of the system's packages, and the AMD cards that are here."""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError
from ggufrq.build import toolchain
from ggufrq.build.toolchain import Missing

#: The oldest HIP that llama.cpp takes; its CMake says so, too, but only after a while.
OLDEST = (6, 1)

_LEAST = ".".join(map(str, OLDEST))
_REMEDY = (
    f"install ROCm {_LEAST} or newer with hipBLAS and rocBLAS (rocm.docs.amd.com), "
    "and set ROCM_PATH where that is not /opt/rocm"
)

_HEADERS = {
    "the headers of the runtime": "hip/hip_runtime.h",
    "hipBLAS": "hipblas/hipblas.h",
    "rocBLAS": "rocblas/rocblas.h",
}


@dataclass(frozen=True)
class Toolkit:
    """What ``hipconfig`` tells: the root of ROCm ("/usr" with Debian's packages), clang++, HIP's version."""

    root: Path
    compiler: Path
    version: str

    @property
    def fit(self) -> bool:
        """Whether llama.cpp takes this version."""
        numbers = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        return numbers >= OLDEST


def toolkit() -> Toolkit | None:
    """What is installed, of whatever version; None where there is no ``hipconfig`` that runs.

    It is looked for in the folder that the user chose by ``$ROCM_PATH`` or ``$HIP_PATH``, else on the PATH
    and in /opt/rocm.
    """
    program = _program("hipconfig")
    text = _output(program) if program else None
    return parse_toolkit(text) if text else None


def parse_toolkit(text: str) -> Toolkit | None:
    """What ``hipconfig`` printed; None where the version or a folder is not in it."""
    found = {}
    for name in ("HIP version", "ROCM_PATH", "HIP_CLANG_PATH"):
        line = re.search(rf"^{name} *: *(\S.*)$", text, re.MULTILINE)
        if line is None:
            return None
        found[name] = line[1].strip()
    version = found["HIP version"].partition("-")[0]
    return Toolkit(Path(found["ROCM_PATH"]), Path(found["HIP_CLANG_PATH"]) / "clang++", version)


def missing() -> list[Missing]:
    """What a build needs and does not find: HIP at all, a new one, or parts of it."""
    found = toolkit()
    if found is None:
        return [Missing("AMD's HIP (hipconfig, hipcc) was not found", _REMEDY)]
    if not found.fit:
        return [Missing(f"HIP {found.version} in {found.root} is too old, llama.cpp needs {_LEAST}", _REMEDY)]
    absent = [what for what, name in _HEADERS.items() if not (found.root / "include" / name).is_file()]
    if not found.compiler.is_file():
        absent.insert(0, f"the compiler ({found.compiler})")
    if absent:
        what = f"of HIP {found.version} in {found.root} {', '.join(absent)} was not found"
        return [Missing(what, _REMEDY)]
    return []


def find() -> Toolkit:
    """The toolkit to build with. Raises BuildError when there is none that is complete and new enough."""
    toolchain.require(missing())
    found = toolkit()
    assert found is not None, "or it would be missing"
    return found


def definitions(found: Toolkit) -> dict[str, str]:
    """CMake's definitions that make it take this toolkit, on the PATH or not."""
    return {
        "CMAKE_HIP_COMPILER": str(found.compiler),
        "CMAKE_HIP_COMPILER_ROCM_ROOT": str(found.root),
        "CMAKE_PREFIX_PATH": str(found.root),
    }


def cards() -> tuple[str, ...]:
    """Architectures of the AMD cards of this machine ("gfx1100"), by ROCm's rocm_agent_enumerator; none where
    it is missing or fails, as it does without the driver.
    """
    program = _program("rocm_agent_enumerator")
    return parse_cards(_output(program) or "") if program else ()


def parse_cards(text: str) -> tuple[str, ...]:
    """What ``rocm_agent_enumerator`` printed: an agent a line, gfx000 being the processor."""
    names = (line.strip() for line in text.splitlines())
    return tuple(name for name in names if re.fullmatch(r"gfx[1-9][0-9a-f]+", name))


def _program(name: str) -> Path | None:
    chosen = [os.environ[variable] for variable in ("ROCM_PATH", "HIP_PATH") if os.environ.get(variable)]
    folders = [f"{root}/bin" for root in chosen] or [os.environ.get("PATH", os.defpath), "/opt/rocm/bin"]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found) if found else None


@functools.lru_cache(maxsize=8)
def _output(program: Path) -> str | None:
    """What a program prints, asked once; None where it fails."""
    try:
        return proc.run([program], timeout=60, env={"LC_ALL": "C"}).stdout
    except ToolError:
        return None

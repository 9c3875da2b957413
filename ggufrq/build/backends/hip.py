"""AMD GPUs: the CUDA sources, compiled by HIP. A build needs ROCm with hipBLAS and rocBLAS, but no GPU."""

from __future__ import annotations

from ggufrq.build import cmake_files, hip_toolkit
from ggufrq.build.backends import cpu
from ggufrq.build.toolchain import Missing

#: Where no card is present: Radeon RX 6800 to 6950 and 7900, Instinct MI200 and MI300, which HIP 6.1 knows.
ARCHITECTURES = "gfx1030;gfx1100;gfx90a;gfx942"


def architectures() -> str:
    """What code is generated for, as CMake names it: the cards present, or a list of common ones."""
    return ";".join(sorted(set(hip_toolkit.cards()))) or ARCHITECTURES


def detected() -> bool:
    """Never: our kernels have not run on an AMD card yet, so who wants this backend has to name it."""
    return False


def definitions(*, native: bool) -> dict[str, str]:
    """The CPU backend's, too: what does not fit on the GPU runs there."""
    return {
        **cpu.definitions(native=native),
        **cmake_files.options("hip"),
        "CMAKE_HIP_ARCHITECTURES": architectures(),
        **hip_toolkit.definitions(hip_toolkit.find()),
    }


def identity(*, native: bool) -> str:
    """The processor and HIP; the cards are in the definitions."""
    return f"{cpu.identity(native=native)} hip {hip_toolkit.find().version}"


def missing() -> list[Missing]:
    """A C++ compiler, and HIP of a version that llama.cpp takes, with its libraries."""
    return [*cpu.missing(), *hip_toolkit.missing()]


def versions() -> dict[str, str]:
    """HIP and, where there are any, the cards' architectures."""
    found = {"hip": hip_toolkit.find().version}
    cards = hip_toolkit.cards()
    if cards:
        found["cards"] = ", ".join(cards)
    return found

"""NVIDIA GPUs. A build needs CUDA's compiler and cuBLAS, from the system or from NVIDIA's PyPI wheels, but no
GPU.
"""

from __future__ import annotations

from ggufrq import cuda_toolkit
from ggufrq.backends import cpu
from ggufrq.toolchain import Missing

#: Where no card is present: code for Turing and Ampere that the driver compiles at start, and native code for
#: consumer Ampere, Ada, Hopper and consumer Blackwell. That takes the compiler an hour and more on few cores.
ARCHITECTURES = "75-virtual;80-virtual;86-real;89-real;90-real;120a-real"


def architectures() -> str:
    """What code is generated for, as CMake names it: the cards present, or a list that serves most."""
    present = sorted({card.architecture for card in cuda_toolkit.cards()})
    return ";".join(f"{one}-real" for one in present) or ARCHITECTURES


def detected() -> bool:
    """Whether a card is present and all that a build needs."""
    return bool(cuda_toolkit.cards()) and not cuda_toolkit.missing()


def definitions(*, native: bool) -> dict[str, str]:
    """The CPU backend's, too: what does not fit on the GPU runs there. Makes the folder of links if it takes
    one.
    """
    return {
        **cpu.definitions(native=native),
        "GGML_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": architectures(),
        **cuda_toolkit.definitions(cuda_toolkit.find()),
    }


def identity(*, native: bool) -> str:
    """The processor and the compiler; the cards are in the definitions."""
    return f"{cpu.identity(native=native)} nvcc {cuda_toolkit.find().version}"


def missing() -> list[Missing]:
    """A C++ compiler and the parts of a CUDA toolkit."""
    return [*cpu.missing(), *cuda_toolkit.missing()]


def versions() -> dict[str, str]:
    """nvcc and, where there are any, the cards with their driver."""
    found = {"nvcc": cuda_toolkit.find().version}
    cards = cuda_toolkit.cards()
    if cards:
        found["cards"] = ", ".join(card.name for card in cards)
        found["driver"] = cards[0].driver
    return found

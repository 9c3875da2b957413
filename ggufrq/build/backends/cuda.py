"""NVIDIA GPUs. A build needs CUDA's compiler and cuBLAS, from the system or from NVIDIA's PyPI wheels, but no
GPU.
"""

from __future__ import annotations

from ggufrq.build import cmake_files, cuda_toolkit
from ggufrq.build.backends import cpu
from ggufrq.build.toolchain import Missing

#: Where no card is present: code that the driver compiles at start for Pascal, Volta, Turing and Ampere,
#: native code for consumer Ampere, Ada, Hopper and consumer Blackwell; each with the CUDA version that knows
#: it first and the one that no longer does. That takes the compiler an hour and more on few cores.
ARCHITECTURES = (
    ("61-virtual", (0, 0), (13, 0)),
    ("70-virtual", (0, 0), (13, 0)),
    ("75-virtual", (0, 0), None),
    ("80-virtual", (0, 0), None),
    ("86-real", (0, 0), None),
    ("89-real", (11, 8), None),
    ("90-real", (11, 8), None),
    ("120a-real", (12, 8), None),
)


def architectures(toolkit: str) -> str:
    """What code is generated for, as CMake names it: the cards present, or a list that serves most.

    ``toolkit`` is nvcc's version, "12.4.131"; one that is no number is taken to know all of today's cards.
    """
    present = sorted({card.architecture for card in cuda_toolkit.cards()})
    if present:
        return ";".join(f"{one}-real" for one in present)
    numbers = toolkit.split(".")[:2]
    version = tuple(map(int, numbers)) if all(map(str.isdigit, numbers)) else (13, 0)
    return ";".join(
        name for name, first, last in ARCHITECTURES if first <= version and (last is None or version < last)
    )


def detected() -> bool:
    """Whether a card is present and all that a build needs."""
    return bool(cuda_toolkit.cards()) and not cuda_toolkit.missing()


def definitions(*, native: bool) -> dict[str, str]:
    """The CPU backend's, too: what does not fit on the GPU runs there. Makes the folder of links if it takes
    one.
    """
    toolkit = cuda_toolkit.find()
    return {
        **cpu.definitions(native=native),
        **cmake_files.options("cuda"),
        "CMAKE_CUDA_ARCHITECTURES": architectures(toolkit.version),
        **cuda_toolkit.definitions(toolkit),
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

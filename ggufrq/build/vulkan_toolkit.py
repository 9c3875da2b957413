"""Vulkan's loader, headers and glslc, of the system or of an SDK, and the GPUs that Vulkan shows."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError
from ggufrq.build import toolchain
from ggufrq.build.toolchain import Missing

#: The oldest glslc that llama.cpp's shaders and ours were compiled by.
OLDEST = (2023, 2)
#: The first headers with VK_EXT_layer_settings, which llama.cpp uses; Debian 12's (1.3.239) lack it.
OLDEST_HEADERS = (1, 3, 272)

_SYSTEM = (Path("/usr"), Path("/usr/local"))


@dataclass(frozen=True)
class Toolkit:
    """The parts: glslc with its version ("2023.2"), the folder of headers with theirs ("1.4.309"), the loader
    to link with, and the folder of CMake's file for the headers of SPIR-V.
    """

    glslc: Path
    version: str
    include: Path
    headers: str
    loader: Path
    spirv: Path

    @property
    def of_the_system(self) -> bool:
        """Whether its headers lie among the system's own, not in an SDK's folder."""
        return self.include.resolve().parent in _SYSTEM

    @property
    def too_old(self) -> str | None:
        """What of it is too old, in words."""
        for what, version, least in (
            (f"glslc {self.version or 'of unknown version'} ({self.glslc})", self.version, OLDEST),
            (f"Vulkan {self.headers} of the headers in {self.include}", self.headers, OLDEST_HEADERS),
        ):
            if tuple(int(part) for part in re.findall(r"\d+", version)[: len(least)]) < least:
                return f"{what} is too old, {'.'.join(map(str, least))} or newer is needed"
        return None


def toolkit() -> Toolkit | None:
    """What is installed, of whatever version; None where a part is missing.

    It is looked for in the folder that ``$VULKAN_SDK`` names, else in the system's.
    """
    glslc, include, loader, spirv = (part[1] for part in _parts())
    if glslc is None or include is None or loader is None or spirv is None:
        return None
    return Toolkit(glslc, _version(glslc), include, _of_headers(include), loader, spirv)


def missing() -> list[Missing]:
    """What a build needs and does not find, all of it in one sentence, or that one is too old."""
    absent = [name for name, path in _parts() if path is None]
    if absent:
        where = os.environ.get("VULKAN_SDK") or "the system"
        return [
            Missing(f"of Vulkan {', '.join(absent)} was not found in {where}", toolchain.remedy("vulkan"))
        ]
    found = toolkit()
    if found is not None and found.too_old:
        return [Missing(found.too_old, "install LunarG's Vulkan SDK (vulkan.lunarg.com) and set VULKAN_SDK")]
    return []


def find() -> Toolkit:
    """The toolkit to build with. Raises BuildError when there is none that is complete and new enough."""
    toolchain.require(missing())
    found = toolkit()
    assert found is not None, "or it would be missing"
    return found


def definitions(found: Toolkit) -> dict[str, str]:
    """CMake's definitions that make it take these parts."""
    return {
        "Vulkan_GLSLC_EXECUTABLE": str(found.glslc),
        "Vulkan_INCLUDE_DIR": str(found.include),
        "Vulkan_LIBRARY": str(found.loader),
        "SPIRV-Headers_DIR": str(found.spirv),
    }


def devices() -> tuple[str, ...]:
    """Names of the GPUs that ``vulkaninfo`` shows; none where it is missing or fails. Drivers that compute on
    the processor are left out, as llama.cpp does.
    """
    program = shutil.which("vulkaninfo")
    if program is None:
        return ()
    try:
        return parse_devices(proc.run([program, "--summary"], timeout=60, env={"LC_ALL": "C"}).stdout)
    except ToolError:
        return ()


def parse_devices(text: str) -> tuple[str, ...]:
    """What ``vulkaninfo --summary`` printed."""
    found = re.findall(r"deviceType\s*= PHYSICAL_DEVICE_TYPE_(\w+)\s+deviceName\s*= (.*\S)", text)
    return tuple(name for kind, name in found if kind != "CPU")


def _parts() -> list[tuple[str, Path | None]]:
    """Each part by what it is called, with its place."""
    sdk = os.environ.get("VULKAN_SDK")
    roots = (Path(sdk),) if sdk else _SYSTEM
    glslc = shutil.which("glslc", path=str(Path(sdk) / "bin") if sdk else None)
    library = "vulkan-1.lib" if platform.system() == "Windows" else "libvulkan.*"
    cmake = "cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake"
    include = _first(roots, "include/vulkan/vulkan.hpp")
    spirv = _first(roots, f"share/{cmake}", f"lib*/{cmake}", f"lib/*/{cmake}")
    return [
        ("glslc", Path(glslc) if glslc else None),
        ("the headers (vulkan.hpp)", include.parents[1] if include else None),
        (
            "the loader to link with",
            _first(roots, f"lib*/{library}", f"lib/*/{library}", suffixes=(".so", ".dylib", ".lib")),
        ),
        ("the headers of SPIR-V", spirv.parent if spirv else None),
    ]


def _first(roots: Iterable[Path], *patterns: str, suffixes: tuple[str, ...] = ()) -> Path | None:
    for root in roots:
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                if path.is_file() and (not suffixes or path.suffix in suffixes):
                    return path
    return None


def _version(glslc: Path) -> str:
    """ "2023.2" of "shaderc v2023.2 v2023.2" or "shaderc 2023.2-1"; empty where it does not tell."""
    try:
        text = proc.run([glslc, "--version"], timeout=60, env={"LC_ALL": "C"}).stdout
    except ToolError:
        return ""
    told = re.match(r"shaderc v?(\d+\.\d+)", text)
    return told[1] if told else ""


def _of_headers(include: Path) -> str:
    """ "1.4.309" as vulkan_core.h has it."""
    file = include / "vulkan" / "vulkan_core.h"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    patch = re.search(r"^#define VK_HEADER_VERSION (\d+)", text, re.MULTILINE)
    whole = re.search(
        r"^#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(0, (\d+), (\d+),", text, re.MULTILINE
    )
    return f"{whole[1]}.{whole[2]}.{patch[1]}" if patch and whole else ""

"""What this machine has: cores, memory, disk, and the processor's SIMD level."""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError

GIB = 1 << 30
#: Memory that one compiler process may take; the largest files of llama.cpp come near it.
BYTES_PER_JOB = int(1.5 * GIB)
#: How often, and after how many seconds, it is looked whether others run.
_LOOKS, _BETWEEN = 4, 0.01

#: Flags as Linux names them that decide which instructions a native build may hold.
_ISA_FLAGS = [
    "sse3",
    "pni",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "popcnt",
    "avx",
    "f16c",
    "fma",
    "bmi1",
    "bmi2",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512cd",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "svei8mm",
    "sme",
    "rvv",
    "v",
    "vx",
]


@dataclass(frozen=True)
class Processor:
    """The processor: its name, architecture, and instruction-set flags (sorted)."""

    name: str
    arch: str
    flags: tuple[str, ...]

    @property
    def simd(self) -> str:
        """The widest vector instructions, for people."""
        have = set(self.flags)
        if "avx512f" in have:
            extra = [
                label for flag, label in (("avx512_vnni", "VNNI"), ("avx512_bf16", "BF16")) if flag in have
            ]
            extra += ["AMX"] if "amx_tile" in have else []
            return "AVX-512" + (f" ({', '.join(extra)})" if extra else "")
        for flag, label in (("avx2", "AVX2"), ("avx", "AVX"), ("sse4_2", "SSE4.2")):
            if flag in have:
                return label
        if "asimd" in have:
            extra = [
                label
                for flag, label in (("asimddp", "dot product"), ("i8mm", "i8mm"), ("sve", "SVE"))
                if flag in have
            ]
            return "NEON" + (f" ({', '.join(extra)})" if extra else "")
        return "none known"


@lru_cache(maxsize=1)
def processor() -> Processor:
    """The processor of this machine; unknown parts are empty rather than guessed."""
    arch = platform.machine().lower()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields: dict[str, str] = {}
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
        flags = set((fields.get("flags") or fields.get("Features") or "").split())
        name = fields.get("model name") or fields.get("CPU part") or ""
        return Processor(name, arch, tuple(flag for flag in sorted(set(_ISA_FLAGS)) if flag in flags))
    if platform.system() == "Darwin":
        try:
            name = proc.run(["sysctl", "-n", "machdep.cpu.brand_string"], timeout=10).stdout.strip()
        except ToolError:
            name = ""
        return Processor(name, arch, ("asimd", "asimddp") if arch == "arm64" else ("avx2",))
    return Processor(platform.processor(), arch, ())


def system() -> str:
    """Operating system, its release and the architecture. (``platform.platform()`` would start a program.)"""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def cores() -> int:
    """Cores that this process may use, container limits included."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            available = min(available, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return max(1, available)


def is_busy() -> bool:
    """Whether other programs use cores that this one would use, all through a moment. False where the system
    does not tell."""
    running = []
    for _ in range(_LOOKS):
        try:
            running.append(
                int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
            )
        except (OSError, ValueError, IndexError):
            return False
        time.sleep(_BETWEEN)
    others = min(running) - 1  # this one runs, too
    return others > 0 and others + cores() > (os.cpu_count() or 1)


def memory() -> tuple[int, int] | None:
    """Total and available memory in bytes, container limits included, or None where the system does not
    tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, available = fields["MemTotal"], fields["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
        return total, total
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        total, available = min(total, limit), min(available, max(0, limit - used))
    except (OSError, ValueError):
        pass
    return total, available


def compile_jobs() -> int:
    """How many compilers to run at once: one per core as far as the free memory goes."""
    found = memory()
    return cores() if found is None else max(1, min(cores(), found[1] // BYTES_PER_JOB))


def free_disk(folder: Path) -> int:
    """Free bytes on the disk that holds ``folder``."""
    return shutil.disk_usage(folder).free

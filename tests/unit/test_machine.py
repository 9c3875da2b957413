from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.base import machine
from ggufrq.base.machine import GIB, Processor

pytestmark = pytest.mark.usefixtures("no_programs")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"), "AVX-512 (VNNI, BF16, AMX)"),
        (("avx512f",), "AVX-512"),
        (("avx", "avx2", "sse4_2"), "AVX2"),
        (("sse4_2",), "SSE4.2"),
        (("asimd", "asimddp", "sve"), "NEON (dot product, SVE)"),
        ((), "none known"),
    ],
)
def test_simd(flags: tuple[str, ...], expected: str) -> None:
    assert Processor("x", "y", flags).simd == expected


@pytest.mark.parametrize(
    ("cores", "free", "jobs"), [(8, 64 * GIB, 8), (8, 4 * GIB, 2), (8, GIB // 2, 1), (1, 64 * GIB, 1)]
)
def test_compile_jobs(monkeypatch: pytest.MonkeyPatch, cores: int, free: int, jobs: int) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "memory", lambda: (64 * GIB, free))
    assert machine.compile_jobs() == jobs


def test_compile_jobs_where_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.setattr(machine, "memory", lambda: None)
    assert machine.compile_jobs() == 6


def test_this_machine(tmp_path: Path) -> None:
    assert machine.cores() >= 1
    found = machine.memory()
    assert found is None or 0 <= found[1] <= found[0]
    assert machine.free_disk(tmp_path) > 0
    assert machine.processor().arch

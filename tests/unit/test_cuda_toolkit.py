"""The parts of a CUDA toolkit, wherever they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.base import proc
from ggufrq.base.errors import BuildError, UsageError
from ggufrq.base.proc import Completed
from ggufrq.build import backends, cuda_toolkit, doctor
from ggufrq.build.backends import cuda
from ggufrq.build.cuda_toolkit import Card

SMI = "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.159.04\nNVIDIA GeForce RTX 5090, 12.0, 32607, 580.159.04\n"


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No toolkit but those that a test makes, no card, nvcc that gives a version."""
    for name in ("CUDA_PATH", "CUDA_HOME", "CUDACXX", "GGUFRQ_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(cuda_toolkit, "_wheel_folders", lambda: iter(()))
    monkeypatch.setattr(cuda_toolkit, "_version", lambda nvcc: "13.0.88")
    monkeypatch.setattr(cuda_toolkit, "cards", lambda: ())


def test_cards() -> None:
    h100, consumer = cuda_toolkit.parse_cards(SMI)
    assert h100 == Card("NVIDIA H100 80GB HBM3", "9.0", 81559, "580.159.04")
    assert (h100.architecture, consumer.architecture) == ("90", "120a")
    assert cuda_toolkit.parse_cards("No devices were found\n") == ()
    assert cuda_toolkit.parse_cards("Some Card, 8.6, [N/A], 1.2\n")[0].memory == 0


def test_what_is_missing_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lack,) = cuda_toolkit.missing()
    assert "nvcc" in lack.what and "cuBLAS" in lack.what and "nvidia-cublas" in lack.remedy
    root = touch(tmp_path / "system", "bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so")
    monkeypatch.setenv("CUDA_PATH", str(root))
    (lack,) = cuda_toolkit.missing()
    assert "nvcc" not in lack.what and "cuBLAS" in lack.what
    with pytest.raises(BuildError, match="cuBLAS") as caught:
        cuda_toolkit.find()
    assert "pip install" in (caught.value.remedy or "")


def test_a_whole_toolkit_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(
        tmp_path / "system",
        *("bin/nvcc", "include/cuda_runtime.h", "include/cublas_v2.h", "lib64/libcudart.so"),
        *("lib64/libcublas.so", "lib64/stubs/libcuda.so"),
    )
    monkeypatch.setenv("CUDA_PATH", str(root))
    found = cuda_toolkit.find()
    assert found.root == root and found.nvcc == root / "bin" / "nvcc" and found.version == "13.0.88"


def test_parts_of_several_are_linked_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler without cuBLAS, and a wheel whose libraries lack their plain names."""
    system = touch(tmp_path / "system", "bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so")
    wheel = touch(
        tmp_path / "cu13",
        *("include/cublas_v2.h", "include/cuda_runtime.h", "lib/libcublas.so.13", "lib/libcublasLt.so.13"),
        "nvvm/bin/cicc",
    )
    monkeypatch.setenv("CUDA_PATH", str(system))
    monkeypatch.setattr(cuda_toolkit, "_wheel_folders", lambda: iter([wheel]))
    stub = tmp_path / "libcuda.so"
    stub.write_text("")
    monkeypatch.setattr(cuda_toolkit, "_driver_library", lambda root: stub)
    root = cuda_toolkit.find().root
    assert root not in (system, wheel)
    assert (root / "bin" / "nvcc").resolve() == system / "bin" / "nvcc"
    assert (root / "include" / "cuda_runtime.h").resolve() == system / "include" / "cuda_runtime.h"
    assert (root / "include" / "cublas_v2.h").resolve() == wheel / "include" / "cublas_v2.h"
    assert (root / "lib64" / "libcublas.so").resolve() == wheel / "lib" / "libcublas.so.13"
    assert (root / "nvvm" / "bin" / "cicc").is_file()
    assert (root / "lib64" / "stubs" / "libcuda.so").resolve() == stub
    assert cuda_toolkit.find().root == root
    (wheel / "include" / "cublas_v2.h").unlink()  # the wheel was updated
    touch(wheel, "include/cublas_v2.h")
    (wheel / "lib" / "libcublas.so.13").rename(wheel / "lib" / "libcublas.so.14")
    (root / "include" / "cublas_v2.h").unlink()
    assert (cuda_toolkit.find().root / "lib64" / "libcublas.so.14").is_file()


def test_the_backend_that_is_here_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.default() == "cpu"
    monkeypatch.setattr(cuda_toolkit, "cards", lambda: cuda_toolkit.parse_cards(SMI))
    assert backends.default() == "cpu"  # a card, but nothing to build with
    monkeypatch.setattr(cuda_toolkit, "missing", lambda: [])
    assert backends.default() == "cuda"
    assert cuda.architectures("13.0.88") == "120a-real;90-real"
    monkeypatch.setenv("GGUFRQ_BACKEND", "cpu")
    assert backends.default() == "cpu"
    monkeypatch.setenv("GGUFRQ_BACKEND", "abacus")
    with pytest.raises(UsageError, match="no backend 'abacus'"):
        backends.default()


def test_without_a_card_the_code_is_for_what_the_compiler_knows() -> None:
    new = cuda.architectures("13.0.88")
    assert new == "75-virtual;80-virtual;86-real;89-real;90-real;120a-real" == cuda.architectures("unknown")
    assert (
        cuda.architectures("12.4.131")
        == "61-virtual;70-virtual;75-virtual;80-virtual;86-real;89-real;90-real"
    )
    assert cuda.architectures("11.7.64") == "61-virtual;70-virtual;75-virtual;80-virtual;86-real"
    assert cuda.architectures("12.8.61").endswith("90-real;120a-real")


def test_nvidia_smi_that_fails_means_no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    cuda_toolkit.cards.cache_clear()
    assert cuda_toolkit.cards() == ()
    cuda_toolkit.cards.cache_clear()


def test_nvcc_tells_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    text = "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0\n"
    monkeypatch.setattr(proc, "run", lambda *_, **__: Completed([], 0, text, "", 0.0))
    assert cuda_toolkit._version(Path("nvcc")) == "13.0.88"


def test_doctor_tells_of_a_card_that_nothing_can_be_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._gpu().found.startswith("none")
    monkeypatch.setattr(cuda_toolkit, "cards", lambda: cuda_toolkit.parse_cards(SMI))
    told = doctor._gpu()
    assert told.state == "optional" and "H100 80GB HBM3 (80 GiB)" in told.found and "cuBLAS" in told.found
    assert "pip install" in told.remedy
    monkeypatch.setattr(cuda_toolkit, "missing", lambda: [])
    assert doctor._gpu().state == "ok" and "driver 580" in doctor._gpu().found

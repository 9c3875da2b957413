"""The cache types inside llama.cpp: on both embedded models, and one short run on every architecture."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ggufrq import paths, proc
from ggufrq.build import Build
from ggufrq.convert import convert

pytestmark = [pytest.mark.build, pytest.mark.models]

HERE = Path(__file__).resolve().parent
HYBRID, DENSE = "docs-qwen3.5-8m", "docs-qwen3-8m"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def f16_models(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both embedded models as f16 GGUF files."""
    folder = tmp_path_factory.mktemp("f16 models")
    return {
        name: convert(paths.data_dir("models") / name, folder / f"{name}.gguf", llama_build.source)
        for name in (HYBRID, DENSE)
    }


@pytest.fixture(scope="session")
def driver(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kv_cache.cpp, compiled against the build."""
    out = tmp_path_factory.mktemp("driver") / "kv_cache"
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    include = [f"-I{llama_build.source / folder}" for folder in ("include", "ggml/include")]
    link = [f"-L{llama_build.bin}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{llama_build.bin}"]
    proc.run([compiler, "-std=c++17", "-O1", *include, HERE / "kv_cache.cpp", "-o", out, *link])
    return out


def run(driver: Path, *arguments: str | Path, mode: str | None = None) -> dict[str, Any]:
    done = proc.run([driver, *arguments], env={**ONE_THREAD, "LLAMA_RQ_MODE": mode}, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# type of K and V, flash attention, largest error against f16: the embedded models lose less than half of it
PAIRS = [
    ("iso3", "planar4", True, 0.02),
    ("planar3", "rotor3", True, 0.02),
    ("iso4", "iso4", True, 0.005),
    ("rotor2", "rotor2", True, 0.15),
    ("iso3", "f16", False, 0.02),
    ("planar4", "q8_0", True, 0.005),
    ("f16", "iso3", True, 0.02),
]


@pytest.mark.parametrize("model", [DENSE, HYBRID])
@pytest.mark.parametrize(("k", "v", "flash", "bound"), PAIRS)
def test_a_cache_survives_what_upstreams_does(
    driver: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    model: str,
    k: str,
    v: str,
    flash: bool,
    bound: float,
) -> None:
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[model], text, k, v, "1" if flash else "0", tmp_path / "state.bin")
    got = run(driver, *arguments, "write")
    assert 0 < got["plain"] < bound and 0 < got["next"] < bound, got
    if model == DENSE:  # upstream cannot shift the positions of the other one
        assert 0 < got["shifted"] < 2 * bound, got
    # Where a cell stands moves the last bits of a sum, and with them indices of the codes in the next layer:
    # less than the code itself costs. A sequence that saw another one would differ by a hundred times that.
    assert max(got["sequences_unified"], got["sequences_streams"], got["copied"]) < bound, got
    assert run(driver, *arguments, "read") == {"restored": True, "state": pytest.approx(0, abs=1e-7)}


def test_rotation_modes_differ_and_all_are_right(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    text = paths.data_dir("texts") / "heldout.txt"
    errors = {}
    for mode in ("full", "block", "hadamard", "none", "full/block"):
        arguments = (f16_models[DENSE], text, "iso3", "iso3", "1", tmp_path / "state.bin")
        errors[mode] = run(driver, *arguments, "write", mode=mode)["plain"]
    assert len(set(errors.values())) == len(errors), errors
    assert all(0 < error < 0.05 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("k", "v", "mode"), [("iso3", "iso3", "block"), ("rotor3", "iso3", None), ("q8_0", "q8_0", None)]
)
def test_a_state_of_another_type_or_rotation_is_refused(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path, k: str, v: str, mode: str | None
) -> None:
    text, state = paths.data_dir("texts") / "heldout.txt", tmp_path / "state.bin"
    run(driver, f16_models[DENSE], text, "iso3", "iso3", "1", state, "write")
    assert run(driver, f16_models[DENSE], text, k, v, "1", state, "read", mode=mode) == {"restored": False}


def test_an_unknown_rotation_mode_is_an_error(llama_build: Build, f16_models: dict[str, Path]) -> None:
    command = [llama_build.tool("llama-completion"), "-m", f16_models[DENSE], "-ctk", "iso3", "-no-cnv"]
    environment = {**ONE_THREAD, "LLAMA_RQ_MODE": "ful"}
    runs = [proc.run([*command, "-p", "a", "-n", "1"], env=environment, check=False) for _ in range(4)]
    assert all(done.rc > 0 for done in runs)
    sentence = "unknown rotation mode 'ful', use full, block, hadamard or none"
    assert any(sentence in done.stdout + done.stderr for done in runs)  # the end of a log may be lost


def test_every_architecture_runs_or_is_refused_with_a_sentence(llama_build: Build, tmp_path: Path) -> None:
    """Upstream's own generator makes a tiny random model per architecture; none may crash with our types."""
    proc.run([llama_build.tool("test-llama-archs"), "-o", tmp_path], env=ONE_THREAD, timeout=600)
    models = sorted(tmp_path.rglob("*.gguf"))
    assert len(models) > 100
    refused: dict[str, str] = {}
    for model in models:
        command = [
            str(llama_build.tool("llama-completion")),
            "-m",
            str(model),
            "-ctk",
            "iso3",
            "-ctv",
            "rotor3",
        ]
        command += ["-p", "1 2 3", "-n", "4", "-no-cnv", "-t", "1"]
        for _ in range(
            6
        ):  # a failing program may lose the end of its log: upstream does not wait for that thread
            done = proc.run(command, env=ONE_THREAD, check=False, timeout=120)
            output = done.stdout + done.stderr
            assert done.rc >= 0, f"{model.name} crashed: {output[-2000:]}"
            sentences = [line for line in output.splitlines() if "llama_rq: " in line and " use " in line]
            if done.rc == 0 or sentences:
                break
        if done.rc != 0:
            if model.name.startswith("grok"):  # has no flash attention, so upstream refuses any quantized V
                continue
            assert sentences, f"{model.name}: {output[-2000:]}"
            refused[model.name] = sentences[0]
    assert any("head_dim of 576" in sentence for sentence in refused.values())
    assert any("head_dim of 64" in sentence for sentence in refused.values())
    assert any("indexer" in sentence for sentence in refused.values())
    assert len(refused) < len(models) / 4


@pytest.mark.slow
@pytest.mark.parametrize("op", ["FLASH_ATTN_EXT", "MUL_MAT", "GET_ROWS", "SET_ROWS", "CPY"])
def test_upstreams_test_of_operations_passes_for_our_types(llama_build: Build, op: str) -> None:
    command = [llama_build.tool("test-backend-ops"), "test", "-b", "CPU", "-o", op, "-p", "planar|iso|rotor"]
    done = proc.run(command, env=ONE_THREAD, timeout=900)
    assert "1/1 backends passed" in done.stdout.replace("\x1b[1;32m", "").replace("\x1b[0m", "")
    assert done.stdout.count("iso3") > 2

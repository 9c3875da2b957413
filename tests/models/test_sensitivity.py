"""Sensitivity with the real build: few types, a short text; the recipe makes a file of the promised size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from families import family_of

from ggufrq.base import paths
from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.cli.quantize import quantize as quantize_command
from ggufrq.cli.sensitivity import sensitivity as command
from ggufrq.ggufs import imatrix
from ggufrq.ggufs.files import read_gguf
from ggufrq.make.family import plan_family
from ggufrq.make.fold.codes import Codes
from ggufrq.make.fold.weights import Weights
from ggufrq.make.inventory import inventory
from ggufrq.make.plan import Family, Request, Want
from ggufrq.make.recipe import Recipe, load
from ggufrq.measure.weight_quality import WeightQuality, WeightSettings
from ggufrq.search.sensitivity import best_recipe, quick, trials
from ggufrq.search.sensitivity.solve import Budget

NAME = "docs-qwen3-8m"
SHORT = WeightSettings(n_ctx=256, chunks=2)


def source(families: dict[str, Family]) -> Path:
    return families[NAME].folder / f"{NAME}-BF16.gguf"


def goal(budget: Budget | None) -> best_recipe.Goal:
    return best_recipe.Goal(budget, ("q4_k", "q8_0"), settings=SHORT)


def test_recipe_becomes_the_file_that_was_measured(
    families: dict[str, Family], llama_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(size=6_000_123)
    request = Request(str(source(families)), (), tmp_path)
    result = best_recipe.analyse(request, llama_build, goal(budget))
    assert [len(singles) for singles in result.singles.values()] == [2] * 8 and result.matrix is None
    for four, eight in result.singles.values():
        assert 0 < eight.kld < four.kld < four.kld_p999
    found = result.found
    assert found is not None and found.bytes <= 6_000_123
    assert found.tuned[0].measured.kld == min(one.measured.kld for one in found.tuned)

    family = family_of(str(source(families)), [found.recipe], llama_build, out=tmp_path)
    (file,) = family.files
    assert file.bytes == file.path.stat().st_size == found.bytes
    facts = read_gguf(file.path)
    assert facts.tensor_types.items() >= found.checked[0].types.items()
    with WeightQuality(source(families), llama_build, settings=SHORT, threads=1) as quality:
        row = quality.row(file.path)
    assert row["kld_mean"] == pytest.approx(found.checked[0].measured.kld, abs=2e-6)

    monkeypatch.setattr(trials, "parallel", None)  # nothing is measured twice
    again = best_recipe.analyse(request, llama_build, goal(budget)).found
    assert again is not None and again.recipe == found.recipe and again.checked == found.checked
    assert not list(tmp_path.glob(".*"))


def test_commands(families: dict[str, Family], tmp_path: Path) -> None:
    few = ["--types", "q4_k,q8_0", "--ctx", "256", "--chunks", "2"]
    out = tmp_path / "mine.toml"
    arguments = [str(source(families)), "--bpw", "6", *few, "--folder", str(tmp_path), "-o", str(out)]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "ffn_down" in done.stdout and f"--recipe {out}" in done.stdout
    assert load(out).name == "sensitivity-6bpw"
    made = CliRunner().invoke(
        quantize_command, [str(source(families)), "--recipe", str(out), "-o", str(tmp_path), "--dry-run"]
    )
    assert made.exit_code == 0 and f"{NAME}-sensitivity-6bpw-" in made.stdout


def test_a_recipe_may_ask_for_a_matrix(
    families: dict[str, Family], llama_build: Build, tmp_path: Path
) -> None:
    """Where no type needs one; the plan then counts what the file says of it."""
    types = {"token_embd": "q8_0", "ffn_*": "q5_k", "attn_*": "q6_k"}
    plain = Recipe("r", tensors={f"*{name}.weight": kind for name, kind in types.items()})
    wants = (Want("r", plain), Want("s", replace(plain, name="s", imatrix=True)))
    plan = plan_family(Request(str(source(families)), wants, tmp_path), llama_build)
    without, asked = plan.outputs
    assert without.job.imatrix is None and asked.job.imatrix == tmp_path / f"{NAME}-imatrix.gguf"
    assert asked.forecast.file_bytes > without.forecast.file_bytes
    assert asked.forecast.types == without.forecast.types


def test_a_quantized_model_is_refused(
    families: dict[str, Family], llama_build: Build, tmp_path: Path
) -> None:
    request = Request(str(families[NAME].file("Q8_0")), (), tmp_path)
    with pytest.raises(ModelError, match="is quantized already"):
        best_recipe.analyse(request, llama_build, goal(Budget(bpw=Fraction(6))))


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_killed_and_run_again(
    families: dict[str, Family],
    llama_build: Build,
    tmp_path: Path,
    command_line: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / "cache"))
    few = ["--types", "q5_k,q8_0", "--ctx", "256", "--chunks", "2", "-j", "1", "--folder", str(tmp_path)]
    arguments = ["sensitivity", str(source(families)), *few]
    kept = paths.cache_dir() / "measurements"
    process = subprocess.Popen(
        command_line(llama_build, *arguments), stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(kept.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name for path in kept.glob("*.json")}
    assert 2 <= len(before) < 16

    taken = []
    take = trials.Trials._take
    monkeypatch.setattr(trials.Trials, "_take", lambda self, types: (taken.append(types), take(self, types)))
    asked = best_recipe.Goal(None, ("q5_k", "q8_0"), settings=SHORT, jobs=1)
    best_recipe.analyse(Request(str(source(families)), (), tmp_path), llama_build, asked)
    assert len(taken) == 16 - len(before)
    assert not list(tmp_path.glob(".*")), "what was half-made is gone"


def test_quick_by_the_command(families: dict[str, Family], tmp_path: Path) -> None:
    """A recipe within the budget, in one pass over the weights, that llama-quantize makes."""
    out = tmp_path / "mine.toml"
    arguments = [str(source(families)), "--size", "6000123", "--types", "q4_k,q6_k,q8_0", "--quick"]
    done = CliRunner().invoke(command, [*arguments, "--folder", str(tmp_path), "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["recipe"]["bytes"] <= 6_000_123 and data["imatrix"] is None
    estimates: dict[str, list[float]] = {}
    for one in data["singles"]:
        estimates.setdefault(one["unit"], []).append(one["estimate"])
    assert len(estimates) == 8
    for four, six, eight in estimates.values():
        assert 8 * six < four and 4 * eight < six, "relative errors go by a quarter for each bit"
    # the embedding computes the output, too: it is what counts most
    assert max(estimates, key=lambda unit: estimates[unit][0]) == "token_embd"
    kinds = data["recipe"]["chosen"]
    assert kinds["token_embd"] == "q6_k" and [name for name in kinds if kinds[name] == "q4_k"]
    assert "not measured" in load(out).description


def test_a_sample_of_rows_has_the_error_of_all(
    families: dict[str, Family], llama_build: Build, tmp_path: Path
) -> None:
    model = inventory(source(families), llama_build)
    (tensor,) = [tensor for tensor in model if tensor.name == "blk.3.ffn_up.weight"]
    wanted = {tensor: ["q3_k", "q5_k"]}
    found = quick.errors(source(families), None, wanted, llama_build)
    with Weights(source(families)) as weights:
        values = weights.read(tensor.name)
    for kind in wanted[tensor]:
        lost = Codes(llama_build).decoded(kind, values, np.ones(values.shape[1], np.float32)) - values
        assert found[tensor.name, kind] == pytest.approx(
            float(np.square(lost).sum() / np.square(values).sum()), rel=0.05
        )

    # Inputs that are never there cost nothing, and the others are rounded with more care
    power = np.zeros((1, values.shape[1]), np.float32)
    power[0, : values.shape[1] // 2] = 1.0
    entry = imatrix.Entry(power, np.ones(1, np.float32))
    imatrix.write(imatrix.Matrix({tensor.name: entry}, ("t",), 1, 512), tmp_path / "half.gguf")
    half = quick.errors(source(families), tmp_path / "half.gguf", wanted, llama_build)
    assert half[tensor.name, "q3_k"] < found[tensor.name, "q3_k"]

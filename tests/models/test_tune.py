"""Tuning with the real build: what is measured, kept, and printed."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner

from ggufrq.base.paths import data_dir
from ggufrq.build.project import Build
from ggufrq.cache.kv import parse_plan
from ggufrq.cli.tune import tune as command
from ggufrq.ggufs.kv_shape import kv_shape
from ggufrq.make.plan import Family
from ggufrq.measure.base_run import Scored
from ggufrq.measure.cost import subject
from ggufrq.search.tune import layers

HYBRID = "docs-qwen3.5-8m"
SCORED = Scored(512, 2, threads=1)


def goal(budget: str, types: str) -> layers.Goal:
    texts = data_dir("texts")
    return layers.Goal(
        Fraction(budget), layers.parse_types(types), texts / "calibration.txt", texts / "heldout.txt", SCORED
    )


def test_tuned_cache(
    families: dict[str, Family], llama_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject(HYBRID, families[HYBRID].file("Q8_0"), "Q8_0")
    assert model.shape is not None
    asked = goal("3.5", "iso2,iso4")
    result = layers.tune(model, llama_build, asked)
    assert result.bits <= 3.5 and result.bytes_per_token <= 3.5 * 2 * 2 * 512 / 8
    assert result.plan.bits(model.shape) == result.bits
    # fewer bits, more loss, for K and V of either layer; and each by itself loses less than all together
    whole = {m.plan.name: m.kld for m in result.tuned if not m.plan.layered}
    assert len(result.singles) == 4
    for types in result.singles.values():
        assert types["iso4"][0] < types["iso2"][0] < whole["iso2"]
        assert all(error < kld for kld, error in types.values())
    assert min(m.kld for m in result.tuned if m.bits <= 3.5) == next(
        m.kld for m in result.tuned if m.plan == result.plan
    )
    assert result.checked[0].plan == result.plan
    # nothing is measured twice
    monkeypatch.setattr("ggufrq.measure.base_run.run_tool", None)
    assert layers.tune(model, llama_build, asked) == result


def test_command(families: dict[str, Family], tmp_path: Path) -> None:
    model, file = families[HYBRID].file("Q8_0"), tmp_path / "tune.json"
    # what the test before has measured, when it ran: the command is quick then
    arguments = [str(model), "--types", "iso2,iso4", "--ctx", "512", "--chunks", "2", "-t", "1"]
    result = CliRunner().invoke(command, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    told = json.loads(file.read_text())
    plan = parse_plan(told["kv"])
    assert plan.bits(kv_shape(model)) == told["bits"] <= told["budget"] == 3.5
    assert f'--kv "{plan.name}"' in " ".join(result.stdout.split())
    assert len(told["singles"]) == 8 and told["text"] == "calibration.txt"
    assert any("--kv-layers" in line for line in told["commands"])
    assert result.stdout.startswith("docs-qwen3.5-8m, ")

"""Advice on a real model: measured, kept, and taken by run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ggufrq.build.project import Build
from ggufrq.cli.advise import advise as command
from ggufrq.cli.run import run
from ggufrq.make.plan import Family

HYBRID = "docs-qwen3.5-8m"


def test_measured_kept_and_taken(
    families: dict[str, Family],
    llama_build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / "cache"))
    model = str(families[HYBRID].file("Q8_0"))
    arguments = [model, "--kv", "iso4,iso2", "--chunks", "1", "-t", "1", "--ctx", "2K", "--json"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    f16, iso4, iso2 = told["rungs"]
    assert iso4["title"] == "iso4 +profile +first1 +recent32"
    assert f16["kld"] is None and 0 < iso4["kld_err"] < iso4["kld"] < iso2["kld"]
    assert iso2["cache"] < iso4["cache"] < f16["cache"] and all(rung["exact"] for rung in told["rungs"])
    assert told["recommended"] == "iso2" and iso2["kld"] < told["loss"]
    assert "--kv-recent 32" in told["commands"][iso4["title"]]
    monkeypatch.setattr("ggufrq.measure.base_run.run_tool", None)
    again = CliRunner().invoke(command, [*arguments, "--loss", str(iso4["kld"] + 2.1 * iso4["kld_err"])])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["recommended"] == "iso4"
    answer = CliRunner().invoke(run, [model, "-p", "Hello", "-n", "2", "-c", "512", "--kv", "auto"])
    assert answer.exit_code == 0, answer.output
    assert answer.stderr.startswith("--kv iso4, as ggufrq advise recommends for this model")
    assert "cache  iso4, " in answer.stderr

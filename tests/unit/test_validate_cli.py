"""The command's options, and what it leaves behind when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ggufrq.base.errors import GgufrqError, ToolError, UsageError
from ggufrq.build.project import Build
from ggufrq.cache.kv import Sought
from ggufrq.cli import validate as cli
from ggufrq.measure.validate import validation
from ggufrq.measure.validate.check import unmeasured
from ggufrq.measure.validate.plan import ValidationPlan
from ggufrq.report import html, terminal


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[ValidationPlan, dict[str, Any]]]:
    """Plans that were run, with the options of the run; the result of each has the checks of ``CHECKS``."""
    ran: list[tuple[ValidationPlan, dict[str, Any]]] = []

    def run(plan: ValidationPlan, build: Build, **options: Any) -> dict[str, Any]:
        ran.append((plan, options))
        options["out"].mkdir(parents=True)
        return {"again": plan.again, "checks": CHECKS, "cases": []}

    monkeypatch.setattr(validation, "validate", run)
    monkeypatch.setattr(cli, "require_build", lambda: Build("key", tmp_path, tmp_path, tmp_path, {}))
    monkeypatch.setattr(html, "render", lambda result: "<!doctype html>")
    monkeypatch.setattr(terminal, "render", lambda result: "the tables")
    monkeypatch.chdir(tmp_path)
    CHECKS.clear()
    return ran


CHECKS: list[dict[str, Any]] = []


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.validate, list(arguments))


def test_report_lies_in_a_folder_named_after_the_model(
    done: list[tuple[ValidationPlan, dict[str, Any]]], tmp_path: Path
) -> None:
    found = invoke(
        "docs-qwen3-8m", "--kv", "iso3; 0,-1:q8_0, f16", "--ctx", "512, 1024", "--quick", "--fresh",
        "--kv-calib", "none",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert found.stdout == "the tables\n"
    ((plan, options),) = done
    assert [case.name for case in plan.cases] == ["f16", "iso3 +first1 +recent32; 0,-1:q8_0"]
    assert plan.settings.ctx == (512, 1024) and options["fresh"]
    folder = tmp_path / "validate-docs-qwen3-8m"
    again = "ggufrq validate docs-qwen3-8m --kv 'iso3; 0,-1:q8_0, f16' --kv-profile none --ctx '512, 1024'"
    assert json.loads((folder / "report.json").read_text())["again"] == f"{again} --quick"
    assert (folder / "report.html").read_text() == "<!doctype html>"


def test_the_profile_is_on_unless_told_otherwise(
    done: list[tuple[ValidationPlan, dict[str, Any]]], tmp_path: Path
) -> None:
    file = tmp_path / "m-kv.gguf"
    file.touch()
    for number, (options, names) in enumerate(
        (
            ([], ["f16", "iso3 +profile +first1 +recent32", "iso3", "q8_0/iso3 +first1 +recent32"]),
            (
                ["--kv-profile", "weights", "--kv-first", "2", "--kv-recent", "0"],
                ["f16", "iso3 +profile +first2", "iso3", "q8_0/iso3 +first2"],
            ),
            (
                ["--kv-profile", "none", "--kv-recent", "8"],
                ["f16", "iso3 +first1 +recent8", "iso3", "q8_0/iso3 +first1 +recent8"],
            ),
            (
                ["--kv-profile", str(file), "--kv-recent", "0", "--kv-first", "0"],
                ["f16", "iso3 +profile", "iso3", "q8_0/iso3"],
            ),
        )
    ):
        given = ["--kv", "iso3,iso3+plain,q8_0/iso3", *options]
        assert invoke("docs-qwen3-8m", "-o", str(tmp_path / str(number)), *given).exit_code == 0
        plan, _ = done[-1]
        assert [case.name for case in plan.cases] == names
        assert sorted(plan.again.split()[-len(options) :]) == sorted(options) or not options
    assert done[0][0].cases[1].plan.profile is Sought.AUTO
    assert done[1][0].cases[1].plan.profile is Sought.WEIGHTS
    assert done[3][0].cases[1].plan.profile == file


def test_failed_check_is_an_error_and_the_report_is_written(
    done: list[tuple[ValidationPlan, dict[str, Any]]], tmp_path: Path
) -> None:
    CHECKS.append(unmeasured("speed", "llama-bench measured nothing"))
    found = invoke("docs-qwen3-8m", "-o", str(tmp_path / "out"), "--json", str(tmp_path / "x.json"))
    assert isinstance(found.exception, ToolError)
    assert "1 of the checks and cases failed" in found.exception.message
    assert "llama-bench measured nothing" in found.exception.message
    assert (tmp_path / "out" / "report.json").read_text() == (tmp_path / "x.json").read_text()


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["docs-qwen3-8m", "--kv", "iso3:sideways"], UsageError),
        (["docs-qwen3-8m", "--sections", "looks"], UsageError),
        (["docs-qwen3-8m", "--kv", "iso3+means"], UsageError),
        (["docs-qwen3-8m", "--kv-profile", "not-there.gguf"], SystemExit),
        (["docs-qwen3-8m", "--ctx", "many"], SystemExit),
        (["docs-qwen3-8m", "--depths", "-1"], SystemExit),
        (["docs-qwen3-8m", "--json", "not/there.json"], UsageError),
        (["docs-qwen3-8m", "--text", "not-there.txt"], SystemExit),
        (["no-such-model"], GgufrqError),
    ],
)
def test_nonsense_leaves_nothing_behind(
    arguments: list[str], error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = invoke(*arguments)
    assert isinstance(found.exception, error) and found.exit_code != 0
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]

"""The workflow files: what they run is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from snippets import commands, options_of

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_is_there(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", True, "jobs"} <= set(workflow)  # YAML reads the key `on` as true
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step["uses"]
            continue
        for line in step["run"].splitlines():
            for words in commands(line):
                if words[0] == "make":
                    assert set(words[1:]) <= set(targets), line
                else:
                    options_of(words[1:])


def test_what_programs_are_made_and_served_by_is_there() -> None:
    """Calls by the path of an environment, in the workflow for releases and in the Containerfile."""
    found = []
    for name in (".github/workflows/release.yml", "Containerfile"):
        text = (REPOSITORY / name).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            line = re.sub(r"\$\{\{.*?\}\}", "X", line.strip().removeprefix("- run: ").removeprefix("RUN "))
            line = re.sub(
                r"\S*(?:bin|Scripts)/ggufrq ", "ggufrq ", re.sub(r"\$\{.*?\}|\$(?=[A-Z])", "", line)
            )
            if not line.startswith("#"):
                found += [words for words in commands(line) if words[0] == "ggufrq"]
    for words in found:
        options_of(words[1:])
    assert [words[1] for words in found] == [*2 * ["bundle"], *3 * ["doctor", "run"], "bundle"]
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", (REPOSITORY / "Containerfile").read_text(), re.MULTILINE)
    assert entry is not None
    assert options_of([*json.loads(entry[1])[1:], "model.gguf"])["host"] == "0.0.0.0"


def test_all_three_systems_are_there() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert all(f"{name}-latest" in text for name in ("ubuntu", "macos", "windows"))

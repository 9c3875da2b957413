"""From an embedded model to a card and an upload, in one go; quickstarts that do not work are not printed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import hubs
import loopback
import pytest
from huggingface_hub import constants

from ggufrq import cli
from ggufrq.advise import ladder
from ggufrq.base import paths
from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.card import compose, measured, quickstart
from ggufrq.card.compose import Wishes, make
from ggufrq.card.facts import Facts
from ggufrq.make.plan import Family
from ggufrq.measure.validate import plan
from ggufrq.measure.weight_quality import WeightSettings

NAME, REPO = "docs-qwen3-8m", "user/docs-qwen3-8m-GGUF"


@pytest.fixture
def folder(families: dict[str, Family], tmp_path: Path) -> Path:
    """Two files of the dense model, the one in 16 bits and the profile, that a test may write into."""
    made = tmp_path / "docs-qwen3-8m-GGUF"
    made.mkdir()
    family = families[NAME].folder
    record = json.loads((family / f"{NAME}.ggufrq.json").read_text())
    chosen = [f"{NAME}-{kind}.gguf" for kind in ("BF16", "Q4_K_M", "Q8_0", "kv")]
    record["files"] = {name: entry for name, entry in record["files"].items() if name in chosen}
    (made / f"{NAME}.ggufrq.json").write_text(json.dumps(record))
    for name in chosen:
        shutil.copy2(family / name, made / name)
    return made


@pytest.fixture(autouse=True)
def build_for_processes(llama_build: Build) -> None:
    """A ggufrq in a process of its own finds the build, too."""
    builds = paths.cache_dir() / "builds"
    if not builds.exists():
        builds.symlink_to(llama_build.root.parent, target_is_directory=True)


@pytest.fixture
def hub(fake_hub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fake_hub.fake_hub({}, tokens={hubs.TOKEN: "user"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
        yield server


@pytest.mark.slow
def test_card_and_upload(
    folder: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = replace(
        plan.QUICK,
        ctx=(512,),
        speed_depths=(0,),
        speed_prompt=64,
        speed_generate=8,
        speed_rounds=2,
        threads=1,
    )
    monkeypatch.setattr(plan, "QUICK", quick)
    monkeypatch.setattr(measured, "_SECTIONS", ("quality", "speed"))
    monkeypatch.setattr(measured, "CASES", ("q8_0", "iso3"))
    monkeypatch.setattr(measured, "_QUICK", WeightSettings(n_ctx=256, chunks=2))
    monkeypatch.setattr(ladder, "DEFAULT_KV", "iso3")
    wishes = ["--repo", REPO, "--license", "mit", "--measure", "--quick", "--exclude", "*-BF16.gguf"]
    assert cli.invoke(["card", str(folder), *wishes, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["not_measured"] == 0 and all(start["ran"] for start in told["quickstarts"])
    assert [start["title"].partition(",")[0] for start in told["quickstarts"]] == [
        "ggufrq",
        "llama-cli",
        "llama-server",
        "upstream llama.cpp",
    ]
    text = (folder / "README.md").read_text()
    assert re.search(r"\| `docs-qwen3-8m-Q4_K_M\.gguf` \| 5\.04 \| [\d.]+ \| 0\.\d+ ± 0\.\d+ \|", text)
    assert re.search(
        r"\| iso3 \+profile \+first1 \+recent32 \| 4\.1875 \| 512 \| [\d.]+ \| 0\.\d+ ± 0\.\d+ \|", text
    )
    assert "and from commands that were run; where" in text
    assert re.search(r"\| 1 GB \| 8,192 \| `f16` \| `f16` \|", text), "the ladder, as it was measured"
    assert re.search(r"\| `iso3` \| 3\.\d+ \| 0\.\d+ ± 0\.\d+ \| [a-z ]+ \|", text)
    assert str(folder) not in text and str(Path.home()) not in text
    # the report lies in a folder of its own, and is not published
    assert (folder / f"validate-{NAME}-Q4_K_M" / "report.json").is_file()
    loopback.no_proxies(monkeypatch)
    publish = ["publish", str(folder), REPO, "--exclude", "*-BF16.gguf", "--collection", "Docs"]
    assert cli.invoke([*publish, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert sorted(done["verified"]) == [
        "README.md",
        f"{NAME}-Q4_K_M.gguf",
        f"{NAME}-Q8_0.gguf",
        f"{NAME}-kv.gguf",
        f"{NAME}.ggufrq.json",
    ]
    assert hub.repos[REPO]["README.md"].decode() == text
    before = len(hub.puts), len(hub.commits)
    assert cli.invoke(publish) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (len(hub.puts), len(hub.commits)) == before == (3, 1)


def test_thinking_is_run_both_ways(folder: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "thinks", True)
    monkeypatch.setattr(quickstart._Starts, "ggufrq", lambda *_: quickstart.Quickstart("", (), True))
    monkeypatch.setattr(quickstart._Starts, "server", lambda *_: quickstart.Quickstart("", (), True))
    made = make(folder, llama_build, Wishes(exclude=("*-BF16.gguf", "*-Q8_0.gguf")))
    (on, off) = made.quickstarts[3:5]
    assert "--reasoning on" in on.lines[0] and "--reasoning off" in off.lines[0] and on.ran and off.ran


@pytest.mark.parametrize("program", ["cli", "server"])
def test_a_quickstart_that_does_not_do_what_it_says(
    folder: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(quickstart, "_cache", lambda _: ["-fa", "on", "--cache-type-k", "f16"])
    starts = quickstart._Starts(compose.collect(folder), llama_build, True)
    with pytest.raises(ToolError, match=r"does not work with .*-Q4_K_M\.gguf: the cache was not kept"):
        starts.cli("", "iso3") if program == "cli" else starts.server("iso3")


def test_a_quickstart_that_fails(folder: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_cache", lambda _: ["--no-such-option"])
    starts = quickstart._Starts(compose.collect(folder), llama_build, True)
    for start in (lambda: starts.cli("", "iso3"), lambda: starts.server("iso3")):
        with pytest.raises(ToolError):
            start()

"""The instrument on a real model: figures, what is kept, and faults of a build that it must not miss."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.cli.validate import validate as command
from ggufrq.codec.tables import code
from ggufrq.make.plan import Family
from ggufrq.measure.divergence import Divergences
from ggufrq.measure.validate import check, plan, validation
from ggufrq.measure.validate.assemble import failed
from ggufrq.measure.validate.plan import ValidationSettings, make_plan

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"
SETTINGS = ValidationSettings(
    ctx=(512,), chunks=2, greedy_prompts=2, greedy_prompt_tokens=48, greedy_tokens=24, needle_ctx=(256, 384),
    needle_depths=(0.2, 0.8), retrieval_ctx=384, retrieval_keys=2, sanity_prompts=2, sanity_tokens=24,
    speed_depths=(0,), speed_prompt=32, speed_generate=4, speed_rounds=2, check_chunks=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "QUICK", SETTINGS)


def run(family: Family, build: Build, out: Path, kv: str, *sections: str, **options: Any) -> dict[str, Any]:
    todo = make_plan(str(family.file("Q8_0")), kv=kv, sections=sections or None, quick=True, threads=1)
    return validation.validate(todo, build, out=out, **options)


@pytest.mark.parametrize("name", [DENSE, HYBRID])
def test_figures(families: dict[str, Family], llama_build: Build, tmp_path: Path, name: str) -> None:
    sections = ("check", "quality", "greedy", "needle", "retrieval", "sanity")
    result = run(families[name], llama_build, tmp_path, "iso3,iso4/iso3:block", *sections)
    assert not failed(result)
    base, iso3, mixed = result["cases"]
    assert (base["name"], base["is_base"], iso3["name"]) == ("f16", True, "iso3")
    assert (base["mode"], iso3["mode"], mixed["mode"]) == ("none", "full", "block")
    assert (base["bits_per_value"], iso3["bits_per_value"], mixed["bits_per_value"]) == (16, 3.125, 3.625)
    assert iso3["memory"]["cache_bytes"] * 16 == base["memory"]["cache_bytes"] * 3.125
    assert (base["memory"]["recurrent_mib"] > 0) == (name == HYBRID)

    quality = {case["name"]: case["quality"][0] for case in result["cases"]}
    assert all((row["ctx"], row["chunks"], row["scored"]) == (512, 2, 510) for row in quality.values())
    assert abs(quality["f16"]["kld_mean"]) < 1e-4 and quality["f16"]["verdict_kld"] is None
    assert 0 < quality["iso3"]["kld_mean_err"] < quality["iso3"]["kld_mean"] < quality["iso3"]["kld_p999"]
    assert quality["iso3"]["verdict_kld"] == "worse"
    (comparison,) = result["comparisons"]
    assert (comparison["a"], comparison["b"]) == ("iso3", "iso4/iso3 block")

    for case in result["cases"]:
        assert len(case["greedy"]["first_difference"]) == 2
        assert [cell["ctx"] for cell in case["needle"]["cells"]] == [256, 256, 384, 384]
        assert all(cell["logprob"] < 0 for cell in case["needle"]["cells"])
        assert len(case["retrieval"]["keys"]) == 2
        assert 0 <= case["sanity"]["repeated"] <= 1 and case["sanity"]["garbage"] <= 1
    assert base["greedy"]["agree"] == 2 and base["greedy"]["share_same"] == 1
    assert all(cell["difference"] == 0 for cell in base["needle"]["cells"])
    assert any(cell["difference"] != 0 for cell in iso3["needle"]["cells"])

    assert {found["check"] for found in result["checks"]} == {
        "code", "attention", "reference", "k_alone", "v_alone", "loss", "cache",
    }  # fmt: skip
    assert result["logs"] and all((tmp_path / log).stat().st_size for log in result["logs"])
    assert any(line.startswith("LLAMA_RQ_MODE=block llama-perplexity ") for line in result["commands"])
    json.dumps(result, allow_nan=False)


def test_what_is_known_is_not_measured_again(
    families: dict[str, Family], llama_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / "cache"))
    taken: list[str] = []
    take = Divergences.take

    def counted(self: Divergences, case: Any, **options: Any) -> Any:
        if case.name == "rotor4" and len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(case.name)
        return take(self, case, **options)

    monkeypatch.setattr(Divergences, "take", counted)
    family = families[HYBRID]
    with pytest.raises(KeyboardInterrupt):
        run(family, llama_build, tmp_path / "a", "planar3,rotor4", "quality")
    assert taken == ["f16", "planar3"]
    taken.append("stopped")
    first = run(family, llama_build, tmp_path / "a", "planar3,rotor4", "quality")
    assert taken == ["f16", "planar3", "stopped", "rotor4"]
    again = run(family, llama_build, tmp_path / "b", "planar3,rotor4", "quality")
    assert taken[-1] == "rotor4" and len(taken) == 4
    assert again["cases"] == first["cases"]
    assert again["logs"] == first["logs"], "logs of earlier runs lie beside the report"
    run(family, llama_build, tmp_path / "b", "planar3", "quality", fresh=True)
    assert taken[-2:] == ["f16", "planar3"]


def test_command(tmp_path: Path, families: dict[str, Family]) -> None:
    out, file = tmp_path / "out", tmp_path / "result.json"
    model = str(families[DENSE].file("Q8_0"))
    sections = "check,quality,speed"
    arguments = [model, "--kv", "iso3", "--quick", "--sections", sections, "-t", "1", "-o", str(out)]
    found = CliRunner().invoke(command, [*arguments, "--json", str(file)])
    assert found.exit_code == 0, found.output
    result = json.loads(file.read_text())
    assert result == json.loads((out / "report.json").read_text())
    again = f"ggufrq validate {model} --kv iso3 --sections {sections} --threads 1 --quick"
    assert result["again"] == again
    assert result["cases"][1]["speed"]["points"][0]["decode_tps"] > 0
    page = (out / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "iso3" in page
    assert "iso3" in found.stdout


def faulty(build: Build, folder: Path, key: str) -> Build:
    """A copy of a build, to be spoiled."""
    shutil.copytree(build.bin, folder / "bin", symlinks=True)
    return dataclasses.replace(build, key=key, bin=folder / "bin")


@pytest.mark.skipif(os.name != "posix", reason="puts a shell script in place of a program")
def test_k_that_stays_in_f16_is_reported(
    families: dict[str, Family], llama_build: Build, tmp_path: Path
) -> None:
    spoiled = faulty(llama_build, tmp_path, "k-in-f16")
    tool = spoiled.bin / "llama-perplexity"
    tool.rename(spoiled.bin / "right")
    tool.write_text('#!/bin/sh\nexec "$(dirname "$0")/right" $(echo "$@" | sed "s/-ctk iso3/-ctk f16/")\n')
    tool.chmod(0o755)
    result = run(families[HYBRID], spoiled, tmp_path / "out", "iso3,q8_0", "quality")
    (told,) = failed(result)
    assert told.startswith("iso3: cache: ") and "K in f16 and V in iso3" in told
    assert result["cases"][1]["quality"] is None
    assert result["cases"][2]["quality"], "the others are measured all the same"
    assert result["notes"][-1].startswith("a self-check failed")


def test_wrong_centroid_is_reported(llama_build: Build, tmp_path: Path) -> None:
    spoiled = faulty(llama_build, tmp_path, "centroid")
    table = bytes(c & 255 for c in code(3).centroids)
    (library,) = [path for path in spoiled.bin.glob("libggml-cpu*") if not path.is_symlink()]
    data = library.read_bytes()
    assert table in data, "the kernels keep the centroids of three bits as eight int8"
    wrong = bytearray(table)
    wrong[5] += 1
    library.write_bytes(data.replace(table, bytes(wrong)))
    bad = [found for found in check.probe(spoiled, ["iso3", "iso4"]) if not found["ok"]]
    assert bad and {found["case"] for found in bad} == {"iso3"}
    assert {found["check"] for found in bad} == {"attention"}


def test_libraries_that_do_not_load(llama_build: Build, tmp_path: Path) -> None:
    spoiled = faulty(llama_build, tmp_path, "broken")
    for path in spoiled.bin.glob("libggml-base*"):
        path.unlink()
    with pytest.raises(ToolError, match="has no library ggml-base"):
        check.probe(spoiled, ["iso3"])

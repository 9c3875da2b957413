"""The claims run again with the real build on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ggufrq.build.project import Build
from ggufrq.cli import claims as module
from ggufrq.make.plan import Family
from ggufrq.measure import claims as core
from ggufrq.measure.claims import FAILS, HOLDS, OPEN

HYBRID = "docs-qwen3.5-8m"


def test_claims(
    families: dict[str, Family], llama_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "require_build", lambda: llama_build)
    monkeypatch.setattr(core, "OURS", ("iso3", "iso3+profile"))
    monkeypatch.setattr(core.ClaimSettings, "__init__", short(core.ClaimSettings.__init__))
    file = tmp_path / "claims.json"
    options = ["--ctx", "256", "--chunks", "2", "--rounds", "2", "-t", "1"]
    arguments = [str(families[HYBRID].file("Q8_0")), *options, "--json", str(file)]
    first = CliRunner().invoke(module.claims, arguments)
    assert first.exit_code == 0, first.output
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = {case["spec"]: case for case in result["cases"]}
    assert [case["error"] for case in result["cases"]] == [None] * len(rows)
    assert rows["iso3"]["bits_per_value"] == rows["iso3:block:norm"]["bits_per_value"] == 3.125
    assert rows["iso3:block:norm"]["mode"] == "block" and rows["iso3"]["mode"] == "full"
    assert rows["iso3:hadamard:norm"]["mode"] == "hadamard"
    assert rows["iso3+profile"]["name"] == "iso3 +profile"
    assert rows["iso3+profile"]["kld_mean"] != rows["iso3"]["kld_mean"]
    # another rotation and another scale are another cache; K in f16 loses less than K and V in three bits
    losses = [
        rows[spec]["kld_mean"] for spec in ("iso3", "iso3:block:norm", "iso3:hadamard:norm", core.DEFERRED)
    ]
    assert len(set(losses)) == 4 and rows[core.DEFERRED]["kld_mean"] < rows["iso3:block:norm"]["kld_mean"]
    found = {claim["claim"]: claim for claim in result["claims"]}
    three = found["compression at 3 bits, times"]
    assert (three["measured"], three["verdict"]) == (5.12, FAILS) and "from the logs" in three["how"]
    for claim in result["claims"]:
        assert claim["verdict"] in (HOLDS, FAILS, OPEN)
    for case in result["cases"][1:]:
        assert case["speed"]["points"][0]["decode_tps"] > 0
    assert max(map(len, first.stdout.splitlines())) <= 80
    second = CliRunner().invoke(module.claims, arguments)
    assert second.exit_code == 0, second.output
    again = json.loads(file.read_text(encoding="utf-8"))
    assert again["cases"] == result["cases"] and again["claims"] == result["claims"]  # nothing was run again


def short(usual: object) -> object:
    """Speeds of a few tokens: whether they are measured, not how fast it is."""

    def init(self: core.ClaimSettings, ctx: int, chunks: int, **options: object) -> None:
        usual(self, ctx, chunks, prompt=16, generate=4, **options)  # type: ignore[operator]

    return init

"""The demo's table: measured figures, exact sizes, kept rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ggufrq.base.errors import ToolError
from ggufrq.base.paths import data_dir
from ggufrq.base.progress import Listener
from ggufrq.build.project import Build
from ggufrq.cache.cases import parse_case
from ggufrq.cache.kv import parse_kv
from ggufrq.cli.demo import demo as command
from ggufrq.flows import demo
from ggufrq.make.plan import Family
from ggufrq.measure import cost
from ggufrq.measure.kept import Row

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"
SETTINGS = cost.CostSettings(n_ctx=512, chunks=4, prompt=32, generate=4, depth=0, repetitions=1)


def rows_of(family: Family, build: Build, cases: list[str], **options: Any) -> dict[str, Row]:
    subject = cost.subject(family.base, family.file("Q8_0"), "Q8_0")
    found = cost.measure(
        subject,
        [parse_case(case) for case in cases],
        build,
        data_dir("texts") / "heldout.txt",
        SETTINGS,
        **options,
    )
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", [DENSE, HYBRID])
def test_rows(families: dict[str, Family], llama_build: Build, name: str) -> None:
    rows = rows_of(
        families[name], llama_build, ["f16", "q8_0", "iso2", "iso3", "iso3:block", "iso4", "iso3/planar4"]
    )
    layers, head = (8, 128) if name == DENSE else (2, 256)
    values = 2 * layers * 2 * head * 2048  # K and V, two heads, four chunks of 512
    for case, bits in [("f16", 16), ("q8_0", 8.5), ("iso2", 2.125), ("iso3", 3.125), ("iso4", 4.125)]:
        assert rows[case]["bits_per_value"] == bits
        assert rows[case]["cache_bytes"] * 8 == bits * values
    assert rows["iso3/planar4"]["bits_per_value"] == 3.625
    assert [row["mode"] for row in rows.values()] == [
        "none",
        "hadamard",
        "full",
        "full",
        "block",
        "full",
        "full",
    ]
    for row in rows.values():
        assert row["prefill_tps"] > 0 and row["decode_tps"] > 0
        assert math.isfinite(row["ppl"]) and 1 < row["ppl"] < 400, "the models have learned their language"
        assert 0 < row["ppl_err"] < row["ppl"]
        assert -1e-5 < row["kld_mean"] <= row["kld_p999"] + 1e-5
        assert 0 <= row["same_top"] <= 1
        assert row["meta"]["threads"] > 0 and row["meta"]["model_sha256"] and row["meta"]["date"]
    # more bits, less loss; f16 against itself none, and three bits of ours not far
    loss = {case: row["kld_mean"] for case, row in rows.items()}
    assert abs(loss["f16"]) < 1e-4 and rows["f16"]["same_top"] > 0.999
    assert loss["q8_0"] < loss["iso4"] < loss["iso3"] < loss["iso2"]
    assert 1e-6 < loss["iso3"] < 0.2, "K and V really lose something, and not much"


def test_rows_are_kept_and_a_stopped_run_goes_on(families: dict[str, Family], llama_build: Build) -> None:
    class Stopped(Exception):
        pass

    seen: list[tuple[str, bool]] = []

    class Seen(Listener):
        def result(self, row: Row, kept: bool) -> None:
            seen.append((row["type_k"], kept))
            if len(seen) == 2 and not kept:
                raise Stopped

    cases = ["rotor3", "planar2", "rotor4"]
    with pytest.raises(Stopped):
        rows_of(families[HYBRID], llama_build, cases, listener=Seen())
    first = rows_of(families[HYBRID], llama_build, cases, listener=Seen())
    assert seen == [
        ("rotor3", False),
        ("planar2", False),
        ("rotor3", True),
        ("planar2", True),
        ("rotor4", False),
    ]
    seen.clear()
    again = rows_of(families[HYBRID], llama_build, cases, listener=Seen())
    assert again == first and all(kept for _, kept in seen)
    seen.clear()
    rows_of(
        families[HYBRID],
        llama_build,
        ["rotor3"],
        fresh=True,
        listener=Seen(),
    )
    assert seen == [("rotor3", False)]


def test_another_mode_than_the_one_asked_for_is_an_error(
    families: dict[str, Family], llama_build: Build
) -> None:
    with pytest.raises(ToolError):
        rows_of(families[HYBRID], llama_build, ["iso3:nonsense"])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", SETTINGS)
    file = tmp_path / "table.json"
    arguments = ["--quick", "--models", HYBRID, "--kv", "f16,iso3,iso3:block", "--json", str(file)]
    first = CliRunner().invoke(command, arguments)
    assert first.exit_code == 0, first.output
    rows = json.loads(file.read_text())
    assert [(row["model"], row["type_k"], row["type_v"], row["mode"]) for row in rows] == [
        (HYBRID, "f16", "f16", "none"),
        (HYBRID, "iso3", "iso3", "full"),
        (HYBRID, "iso3", "iso3", "block"),
    ]
    assert {
        "bits_per_value", "cache_bytes", "prefill_tps", "decode_tps", "ppl", "ppl_err",
        "kld_mean", "kld_mean_err", "kld_p999", "same_top", "meta",
    } <= set(rows[0])  # fmt: skip
    assert rows[1]["kld_mean"] != rows[2]["kld_mean"]
    text = first.stdout
    assert all(f"{HYBRID}-{kind}.gguf" in text for kind in ("IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"))
    assert demo.PROMPT[:20] in text
    assert max(map(len, demo.render(rows).splitlines())) <= 80
    assert "iso3 block" in text and "K is quantized from" in " ".join(text.split())
    second = CliRunner().invoke(command, arguments)
    assert second.exit_code == 0, second.output
    assert json.loads(file.read_text()) == rows  # dates and all: nothing was measured again


def test_usual_table_has_all_types_of_few_bits() -> None:
    names = [case.name for case in cost.default_cases()]
    assert names[:3] == ["f16", "q8_0", "q4_0"]
    assert names[-1] == "iso3 block"
    assert sorted(names[3:-1]) == sorted(
        f"{family}{bits}" for family in ("planar", "iso", "rotor") for bits in (2, 3, 4)
    )
    assert all(parse_kv(name.split()[0]).name == name.split()[0] for name in names)

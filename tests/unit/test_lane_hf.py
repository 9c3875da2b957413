"""``ggufrq validate --lane hf``: what its cases mean, what it refuses, and a short run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ggufrq import cli
from ggufrq.base.errors import UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ggufrq.hf import RotorQuantCache  # noqa: E402
from ggufrq.measure import lane_hf  # noqa: E402
from ggufrq.models.resolve import embedded_models  # noqa: E402


def test_cases_have_names_for_all_that_tells_them_apart() -> None:
    options = lane_hf.Options(profile="weights")
    words = "iso3,iso3/iso4+recent0,rotor2+recent8+first0+plain,hqq3,quanto4+recent128,fp8,fp8"
    cases = lane_hf.parse_cases(words, options)
    assert [case.name for case in cases] == [
        "iso3 +recent32 +first1 +profile",
        "iso3/iso4 +first1 +profile",
        "rotor2 +recent8",
        "hqq3 +recent32",
        "quanto4 +recent128",
        "fp8",
    ]
    assert [case.bits(128) for case in cases] == [3.125, 3.625, 2.125, 3.5, 4.5, 8]
    assert cases[0].bits(64) == 3.25
    config = transformers.LlamaConfig(num_hidden_layers=1, head_dim=64)
    made = cases[2].make(config)
    assert isinstance(made, RotorQuantCache)
    assert (made.settings.bits, made.settings.recent, made.settings.first) == (2, 8, 0)


@pytest.mark.parametrize(
    "word", ["q8_0", "iso6", "iso3/planar3", "hqq5", "quanto3", "iso3+newest4", "fp8/iso3", ""]
)
def test_a_case_that_is_none(word: str) -> None:
    with pytest.raises(UsageError, match="no cache"):
        lane_hf.parse_cases(word, lane_hf.Options())
    with pytest.raises(UsageError, match="takes a profile"):
        lane_hf.parse_cases("iso3+profile", lane_hf.Options())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sections", "speed"], "--sections is for GGUF files, not for --lane hf"),
        (["--against", "q8_0"], "--against is for GGUF files"),
        (["-o", "there"], "--out is for GGUF files"),
        (["--ctx", "100,200"], "takes one --ctx"),
        (["--ctx", "64"], "the first 64 tokens are not scored"),
        (["--kv", "iso7"], "'iso7' is no cache of transformers"),
    ],
)
def test_what_is_not_for_this_lane(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.invoke(["validate", "docs-qwen3-8m", "--lane", "hf", *arguments]) == UsageError.exit_code
    assert says in capsys.readouterr().err


def test_a_package_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.invoke(["validate", "x", "--lane", "hf", "--kv", "quanto4"]) == UsageError.exit_code
    assert "try: pip install optimum-quanto" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["docs-qwen3-8m", "docs-qwen3.5-8m"])
def test_a_short_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More bits lose less; of a hybrid model transformers' own caches are refused, by name."""
    out = tmp_path / "out.json"
    text = tmp_path / "text.txt"
    text.write_text("The CREATE TABLE statement creates a new table in a database. " * 40, encoding="utf-8")
    command = ["validate", str(embedded_models()[name]), "--lane", "hf", "--kv", "iso4,iso2,fp8"]
    assert cli.invoke([*command, "--ctx", "128", "--text", str(text), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    data = json.loads(out.read_text(encoding="utf-8"))
    four, two, theirs = data["rows"]
    assert 0 < 4 * four["kld"] < two["kld"] and two["held"] < four["held"] < 16
    assert data["scored"] == 64 and data["versions"]["torch"] == torch.__version__
    assert "iso2 +recent32 +first1" in said
    if name == "docs-qwen3-8m":
        assert (theirs["bits"], theirs["refused"]) == (8, None) and 7.9 < theirs["held"] < 8.3
    else:
        assert theirs["kld"] is None and "fp8: " in said and "full attention" in said

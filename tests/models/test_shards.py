"""A model of several files: any of them means the model, in every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from ggufrq import cli
from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.card.compose import Wishes, make
from ggufrq.ggufs.header import read_header
from ggufrq.make.family import make_family
from ggufrq.make.plan import Family, Request, Want


@pytest.fixture(scope="module")
def folder(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of one file in three parts."""
    made = tmp_path_factory.mktemp("split") / "it-GGUF"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUFRQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        make_family(Request("docs-qwen3-8m", (Want("Q4_K_M"),), out=made, split_size=2_000_000), llama_build)
    return made


@pytest.fixture
def last(folder: Path) -> Path:
    """Its last part, which has no metadata of the model."""
    return sorted(folder.glob("*Q4_K_M-*-of-*.gguf"))[-1]


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli.cli, [str(word) for word in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_last_shard_is_the_model(
    folder: Path, last: Path, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = families["docs-qwen3-8m"].file("Q4_K_M")
    options = ("-p", "CREATE TABLE", "--raw", "-n", "8", "--temp", "0", "-t", "1", "--json")
    want, got = (json.loads(invoke("run", path, *options)) for path in (whole, last))
    assert (got["text"], got["kv_bytes"]) == (want["text"], want["kv_bytes"])

    memory = ("--ctx", "8K", "--kv", "iso3", "--json")
    want, got = (json.loads(invoke("memory", path, *memory)) for path in (whole, last))
    assert {**got, "model": ""} == {**want, "model": ""}

    want, got = (json.loads(invoke("fallback", "llama.cpp", path, "--json")) for path in (whole, last))
    assert got["times"] == want["times"] and got["holds"]
    assert Path(got["model"]).name.endswith("-00001-of-00003.gguf")
    ollama = invoke("fallback", "ollama", last)
    assert "llama-gguf-split --merge" in ollama
    assert f"FROM {folder.absolute()}/docs-qwen3-8m-Q4_K_M.gguf" in ollama

    invoke("validate", last, "--kv", "q8_0", "--quick", "--sections", "quality", "-o", "report", "-t", "1")
    report = json.loads(Path("report/report.json").read_text())
    told = report["subject"]
    assert told["parameters"] == sum(tensor.values for tensor in read_header(whole).tensors)
    assert told["file_bytes"] == sum(path.stat().st_size for path in last.parent.glob("*Q4_K_M-*.gguf"))


def test_a_card_that_names_all_parts(folder: Path, llama_build: Build) -> None:
    card = make(folder, llama_build, Wishes(repo="me/it-GGUF", run=False))
    parts = sorted(path.name for path in folder.glob("*Q4_K_M-*.gguf"))
    names = " ".join([*parts, "docs-qwen3-8m-kv.gguf"])
    assert f"hf download me/it-GGUF {names} --local-dir ." in card.text


def test_parts_of_different_models(folder: Path, last: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.gguf"):
        shutil.copy(path, tmp_path)
    mixed = tmp_path / last.name
    shutil.copy(tmp_path / last.name.replace("00003-of", "00002-of"), mixed)
    for arguments in (["memory", str(mixed)], ["fallback", "ollama", str(mixed)]):
        result = CliRunner().invoke(cli.cli, arguments)
        assert isinstance(result.exception, ModelError), result.exception
        assert "of different models" in str(result.exception.remedy)

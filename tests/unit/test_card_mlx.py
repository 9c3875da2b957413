"""Cards and uploads of models for mlx-lm, made by hand here: neither takes mlx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hubs
import loopback
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import constants

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.card.compose import Wishes
from ggufrq.card.mlx import is_mlx, make
from ggufrq.cli.card import card
from ggufrq.cli.publish import publish
from ggufrq.make.record import Record
from ggufrq.publish.local import local_files

DRY = Wishes(run=False)


def model(folder: Path, bits: int, **more: Any) -> Path:
    """A folder as ``ggufrq quantize --to mlx`` leaves it."""
    folder.mkdir()
    name = f"Small-1B-mlx-{bits}bit"
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 65536,
    }
    config["quantization"] = {"group_size": 64, "bits": bits, "lm_head": {"group_size": 64, "bits": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(100_000 * bits))
    record = Record(folder, name)
    record.data |= {"format": "mlx", "source": {"repo": "org/Small-1B", "revision": "c" * 40}}
    plan = {"modules": {str(bits): 14, "8": 1, "16": 5}, "weights": 1_000_000}
    facts = {
        **{"type": "mlx", "recipe": f"{bits} bits", "bits": bits + 0.51, "fold": "", "arch": "qwen3"},
        **{"kld": 0.1 / bits, "text": "It | is blue.", "plan": plan, "made_by": {"ggufrq": "1", "mlx": "2"}},
    }
    files = [(folder / part, part) for part in ("config.json", "model.safetensors")]
    record.finish(name, files, {}, {**facts, **more})
    return folder


def test_what_a_card_says(tmp_path: Path) -> None:
    four, three, eight = (model(tmp_path / str(bits), bits) for bits in (4, 3, 8))
    siblings = ((eight, "me/Small-8bit"), (three, "me/Small-3bit"))
    made = make(four, Wishes(repo="me/Small-4bit", license="mit", siblings=siblings, run=False))
    assert yaml.safe_load(made.text.split("---\n")[1]) == {
        "base_model": "org/Small-1B",
        "base_model_relation": "quantized",
        "quantized_by": "me",
        "license": "mit",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "quantized"],
    }
    rows = [line for line in made.text.splitlines() if "me/Small" in line and line.startswith("|")]
    assert [row.split("|")[3].strip() for row in rows] == ["3.51", "4.51", "8.51"]
    assert rows[1] == "| **me/Small-4bit** | 4 bits | 4.51 | 0.4 MB | 0.02500 |"
    for said in (
        'load("me/Small-4bit")',
        "make_cache(model, bits=3)",
        "(not run)",
        "65,536 tokens",
        "of 1 modules",
    ):
        assert said in made.text
    assert "It | is blue." in made.text and made.ran == dict.fromkeys(made.ran, False)


def test_a_family_goes_to_repositories_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each member's card names all others, and each is uploaded as a whole."""
    for bits in (3, 8):
        model(tmp_path / f"Small-1B-mlx-{bits}bit", bits)
    (tmp_path / "notes").mkdir()
    done = CliRunner().invoke(card, [str(tmp_path), "--repo", "user/Small-mlx", "--no-run"])
    assert done.exit_code == 0, done.output
    with hubs.fake().fake_hub({}, tokens={hubs.TOKEN: "user"}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
        loopback.no_proxies(monkeypatch)
        sent = CliRunner().invoke(publish, [str(tmp_path), "user/Small-mlx", "--json"])
        assert sent.exit_code == 0, sent.output
        assert set(hub.repos) == {"user/Small-mlx-3bit", "user/Small-mlx-8bit"}
        text = hub.repos["user/Small-mlx-3bit"]["README.md"].decode()
    assert [one["repo"] for one in json.loads(sent.stdout)] == ["user/Small-mlx-3bit", "user/Small-mlx-8bit"]
    assert "| **user/Small-mlx-3bit** | 3 bits | 3.51 |" in text
    other = "[user/Small-mlx-8bit](https://huggingface.co/user/Small-mlx-8bit)"
    assert f"| {other} | 8 bits | 8.51 |" in text


def test_the_command_writes_it_and_keeps_what_was_added(tmp_path: Path) -> None:
    folder = model(tmp_path / "f", 4)
    arguments = [str(folder), "--repo", "me/Small", "--no-run"]
    assert CliRunner().invoke(card, arguments).exit_code == 0
    path = folder / "README.md"
    path.write_text(path.read_text().replace("<!-- end of own", "Mine.\n\n<!-- end of own"))
    assert CliRunner().invoke(card, arguments).exit_code == 0
    assert "Mine." in path.read_text()
    assert [file.name for file in local_files(folder)] == [
        *("README.md", "Small-1B-mlx-4bit.ggufrq.json", "config.json", "model.safetensors"),
    ]


def test_a_model_goes_as_a_whole(tmp_path: Path) -> None:
    folder = model(tmp_path / "f", 4)
    with pytest.raises(UsageError, match="without which the other parts are no model"):
        local_files(folder, ["config.json"])


@pytest.mark.parametrize(
    "change, wishes, error, said",
    [
        (lambda f: (f / "README.md").write_text("mine"), DRY, UsageError, "not written by ggufrq"),
        (lambda f: (f / "model.safetensors").unlink(), DRY, ModelError, "model.safetensors is missing"),
        (lambda f: (f / "config.json").write_text("{}"), DRY, ModelError, "config.json is missing"),
        (lambda f: None, Wishes(measure=True), UsageError, "--measure is for families of GGUF files"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: Any, wishes: Wishes, error: Any, said: str) -> None:
    folder = model(tmp_path / "f", 4)
    change(folder)
    assert is_mlx(folder)
    with pytest.raises(error, match=said):
        make(folder, wishes)


def test_a_sibling_of_another_kind(tmp_path: Path) -> None:
    folder = model(tmp_path / "f", 4)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="no manifests of models for mlx"):
        make(folder, Wishes(siblings=((tmp_path / "other", "me/Other"),), run=False))

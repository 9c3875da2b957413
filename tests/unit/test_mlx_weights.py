"""``ggufrq quantize --to mlx``: sizes beforehand, what plain mlx-lm reads, and what is refused."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import hubs
import loopback
import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from ggufrq.base import proc
from ggufrq.base.errors import UsageError
from ggufrq.cli.card import card
from ggufrq.cli.publish import publish
from ggufrq.cli.quantize import quantize
from ggufrq.make.recipe import load
from ggufrq.models.resolve import embedded_models
from ggufrq.search.sensitivity.solve import Budget

mx = pytest.importorskip("mlx.core", reason="needs mlx: pip install 'ggufrq[mlx]'")
mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'ggufrq[mlx]'")

from mlx_lm.models import qwen3_moe  # noqa: E402

from ggufrq.mlx import files, fold, sensitivity  # noqa: E402
from ggufrq.mlx import load as mlx_load  # noqa: E402
from ggufrq.mlx.bits import choose, of_recipe  # noqa: E402
from ggufrq.mlx.names import gguf_name  # noqa: E402


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(quantize, [*arguments, "--to", "mlx", "--json"])
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files in a folder but its manifest."""
    files = [path for path in folder.iterdir() if not path.name.endswith(".ggufrq.json")]
    return {path.name: path.stat().st_size for path in files}


@pytest.mark.slow
def test_a_model_is_as_it_was_told_beforehand(tmp_path: Path) -> None:
    """By a recipe: each module has its bits in the configuration, and plain mlx-lm reads it."""
    folder = tmp_path / "made"
    what = ["docs-qwen3.5-8m", "--recipe", "proposal-c", "-o", str(folder)]
    told = run(*what, "--dry-run")
    assert not folder.exists()
    made = run(*what)
    assert made["fresh"] and told["files"] == sizes(folder) and told["bytes"] == sum(sizes(folder).values())
    assert 0 < made["kld"] < 0.02
    chosen = json.loads((folder / "config.json").read_text())["quantization"]
    of = {
        path.rpartition("layers.0.")[2]: rule["bits"] for path, rule in chosen.items() if "layers.0." in path
    }
    assert of["linear_attn.in_proj_qkv"] == 6 and of["mlp.down_proj"] == 5
    assert chosen["language_model.model.layers.3.self_attn.q_proj"]["bits"] == 8
    loaded, tokenizer = mlx_lm.load(str(folder))
    assert mlx_lm.generate(loaded, tokenizer, "The function", max_tokens=4)
    assert not run(*what)["fresh"]


@pytest.mark.slow
def test_a_family_in_one_command(tmp_path: Path) -> None:
    """Each in a folder of its own, of the size that was told; the same command again goes on."""
    folder = tmp_path / "family"
    what = ["docs-qwen3-8m", "--bits", "4,8", "--recipe", "proposal-c", "-o", str(folder)]
    names = [f"docs-qwen3-8m-mlx-{called}" for called in ("4bit", "8bit", "proposal-c")]
    told = run(*what, "--dry-run")
    assert [one["name"] for one in told["models"]] == names and not folder.exists()
    made = run("docs-qwen3-8m", "--bits", "4", "-o", str(folder / names[0]))
    first = made["files"]
    made = run(*what)
    assert [one["fresh"] for one in made["models"]] == [False, True, True]
    for one, before in zip(made["models"], told["models"], strict=True):
        assert one["files"] == before["files"] == sizes(Path(one["folder"]))
    assert made["models"][0]["files"] == first
    klds = [one["kld"] for one in made["models"]]
    assert klds[0] > klds[2] > klds[1]
    shown = CliRunner().invoke(quantize, [*what, "--to", "mlx"])
    assert shown.exit_code == 0 and shown.stdout.count("kept") == 3


def test_what_a_family_is_unless_it_is_said() -> None:
    """Two to eight bits and a recipe, told before anything is made."""
    data = run("docs-qwen3-8m", "--dry-run")
    assert data["folder"] == "docs-qwen3-8m-mlx"
    called = [one["name"].rpartition("-mlx-")[2] for one in data["models"]]
    assert called == [*(f"{bits}bit" for bits in (2, 3, 4, 5, 6, 8)), "proposal-c"]
    assert [one["bits"] for one in data["models"]][:6] == sorted(one["bits"] for one in data["models"][:6])


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_the_model_goes_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    what = ["docs-qwen3-8m", "--bits", "4", "--split-size", "2M", "-o", str(folder)]
    written: list[str] = []
    write = files.write

    def stopped(shard: files.Shard, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(shard.name)
        write(shard, *rest)

    monkeypatch.setattr(files, "write", stopped)
    with pytest.raises(click.Abort):
        CliRunner().invoke(quantize, [*what, "--to", "mlx"], standalone_mode=False, catch_exceptions=False)
    assert not folder.exists()

    def rest(shard: files.Shard, *arguments: Any) -> None:
        written.append(shard.name)
        write(shard, *arguments)

    monkeypatch.setattr(files, "write", rest)
    made = run(*what)
    assert written == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert made["files"] == sizes(folder) and made["bits"] == pytest.approx(4.51, abs=0.01)
    assert 0 < made["kld"] < 0.1 and not list(tmp_path.glob(".made*"))

    written_card = CliRunner().invoke(card, [str(folder), "--repo", "user/made"])
    assert written_card.exit_code == 0, written_card.output
    assert (folder / "README.md").read_text().count("on this folder, for 4 tokens") == 2
    with hubs.fake().fake_hub({}, tokens={hubs.TOKEN: "user"}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
        loopback.no_proxies(monkeypatch)
        sent = CliRunner().invoke(publish, [str(folder), "user/made"])
        assert sent.exit_code == 0, sent.output
        arrived = hub.repos["user/made"]
    assert {path.name for path in folder.iterdir()} <= arrived.keys()


@pytest.mark.slow
def test_a_model_of_the_hub(tmp_path: Path) -> None:
    """A dry run fetches headers alone; what is made is from there, and says so."""
    source = embedded_models()["docs-qwen3-8m"]
    repo = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    weights = sum(len(data) for name, data in repo.items() if name.endswith(".safetensors"))
    with hubs.fake().fake_hub({"org/Small": repo}) as hub:
        variables = hubs.environment(hub.url, tmp_path / "home", None)

        def made(*arguments: str) -> dict[str, Any]:
            command = [sys.executable, "-m", "ggufrq", "quantize", "org/Small", "--to", "mlx", "--bits", "8"]
            done = proc.run([*command, "--json", *arguments], env=variables, cwd=tmp_path)
            data: dict[str, Any] = json.loads(done.stdout)
            return data

        told = made("--dry-run")
        assert hub.sent < weights / 2 and not (tmp_path / "Small-mlx-8bit").exists()
        found = made()
    assert told["files"] == found["files"] == sizes(tmp_path / "Small-mlx-8bit")
    manifest = json.loads((tmp_path / "Small-mlx-8bit" / "Small-mlx-8bit.ggufrq.json").read_text())
    assert manifest["source"]["repo"] == "org/Small" and manifest["source"]["revision"] == hubs.fake().SHA


@pytest.mark.slow
@pytest.mark.parametrize("name", ["docs-qwen3-8m", "docs-qwen3.5-8m"])
def test_scales_are_folded_without_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In 32 bits predictions stay the same; a run that goes on has the same factors."""
    monkeypatch.setattr(fold, "PIECES", 1)
    ids = mx.array([[5, 9, 200, 7, 41, 8]])
    found = []
    for _ in range(2):
        model, tokenizer = mlx_load(name)
        model.set_dtype(mx.float32)
        before = model(ids)
        fold.fold(model, tokenizer, choose(model, 3), tmp_path / "fold.safetensors")
        after = model(ids)
        found.append(np.array(after))
        assert np.abs(found[-1] - np.array(before)).max() < 1e-3 * np.abs(found[-1]).max()
    np.testing.assert_array_equal(*found)
    factors = mx.load(str(tmp_path / "fold.safetensors"))
    assert any("attn_norm" in source for source in factors) and all(
        0.05 < x.min().item() < 1 < x.max().item() < 20 for x in factors.values()
    )


def test_experts_have_their_classes_and_are_folded(tmp_path: Path) -> None:
    """A model with some large channels; what chooses experts stays whole."""
    args = qwen3_moe.ModelArgs(
        "qwen3_moe", 128, 2, 128, 4, 4, 2, 1, [], 64, 1e-6, 100, 2, 64, 1e4, False, 512, True
    )
    mx.random.seed(3)
    model = qwen3_moe.Model(args)
    for layer in model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = mx.exp(2 * mx.random.normal(norm.weight.shape))
    choices = choose(model, load("unsloth-dynamic"))
    first = {path.partition("layers.0.")[2]: choice for path, choice in choices.items() if ".0." in path}
    assert first["mlp.switch_mlp.up_proj"]["bits"] == 3 and first["mlp.switch_mlp.down_proj"]["bits"] == 4
    assert not first["self_attn.o_proj"] and "mlp.gate" not in first
    before = model(mx.arange(20)[None])
    fold.fold(model, SimpleNamespace(encode=lambda _: list(range(64)) * 4), choices, tmp_path / "kept")
    factors = mx.load(str(tmp_path / "kept"), format="safetensors")
    assert {"blk.0.ffn_norm.weight", "blk.1.attn_norm.weight"} <= factors.keys()
    assert mx.abs(model(mx.arange(20)[None]) - before).max() < 1e-3 * mx.abs(before).max()


@pytest.mark.slow
def test_bits_are_chosen_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget, better than all weights alike; measured once."""
    monkeypatch.setattr(sensitivity, "TOKENS", 16)
    monkeypatch.setattr(sensitivity, "_OPTIONS", (3, 4, 8, 16))
    monkeypatch.setattr(sensitivity, "PIECES", 1)
    model, tokenizer = mlx_load("docs-qwen3-8m")
    measured = []
    divergence = sensitivity._Search._divergence

    def counted(self: Any, bits: Any) -> Any:
        measured.append(bits)
        return divergence(self, bits)

    monkeypatch.setattr(sensitivity._Search, "_divergence", counted)
    recipe = sensitivity.solved(model, tokenizer, Budget(bpw=Fraction(9, 2)), "some", 0)
    assert recipe.name == "sensitivity-4.5bpw" and len(set(recipe.classes.values())) > 1
    count = len(measured)
    assert sensitivity.solved(model, tokenizer, Budget(bpw=Fraction(9, 2)), "some", 0) == recipe
    assert len(measured) == count
    bits = of_recipe(model, recipe)
    whole = sum(model_bytes(model, path, n) for path, n in bits.items())
    weights = sum(dict(model.named_modules())[path].weight.size for path in bits)
    assert whole <= 4.5 * weights / 8
    with pytest.raises(UsageError, match="are too few"):
        sensitivity.solved(model, tokenizer, Budget(bpw=Fraction(2)), "some", 0)


def model_bytes(model: Any, path: str, bits: int) -> float:
    """What a module takes in so many bits, with a scale and a bias of 16 for 64 weights."""
    size = dict(model.named_modules())[path].weight.size
    return float(size * (bits + (0.5 if bits < 16 else 0)) / 8)


@pytest.mark.parametrize(
    "name, path, called",
    [
        ("qwen3", "model.layers.3.self_attn.q_proj", "blk.3.attn_q.weight"),
        ("qwen3", "model.layers.0.post_attention_layernorm", "blk.0.ffn_norm.weight"),
        (
            "qwen35",
            "language_model.model.layers.0.post_attention_layernorm",
            "blk.0.post_attention_norm.weight",
        ),
        ("gemma3", "model.layers.0.pre_feedforward_layernorm", "blk.0.ffn_norm.weight"),
        ("qwen3moe", "model.layers.1.mlp.switch_mlp.down_proj", "blk.1.ffn_down_exps.weight"),
        ("qwen3", "model.embed_tokens", "token_embd.weight"),
        ("qwen3", "vision_tower.layers.0.self_attn.q_proj", "vision_tower.layers.0.self_attn.q_proj.weight"),
        ("other", "model.layers.0.mixer.in_proj", "model.layers.0.mixer.in_proj.weight"),
    ],
)
def test_names_in_gguf(name: str, path: str, called: str) -> None:
    assert gguf_name(path, name) == called


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--bits", "7"], "no code of 7 bits"),
        (["--bits", "4", "--types", "Q4_K_M"], "--types is for GGUF files"),
        (["--bits", "4,four"], "--bits 4,four: numbers are wanted"),
        (["--bits", "4,7"], "no code of 7 bits"),
        (["--bits", "4", "--fold", "kv"], "--fold kv is for GGUF files"),
        (["--recipe", "sensitivity"], "made for a budget"),
        (["--recipe", "sensitivity", "--bpw", "5"], "there is no dry run of it"),
        (["--bits", "4", "--bpw", "5"], "the budget of --recipe sensitivity"),
        (["--bits", "4", "--recipe", "sensitivity"], "sensitivity is made for a budget"),
    ],
    ids=str,
)
def test_what_is_refused(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(quantize, ["docs-qwen3-8m", "--to", "mlx", *arguments, "--dry-run"])
    assert isinstance(result.exception, UsageError) and said in str(result.exception)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    result = CliRunner().invoke(
        quantize, ["docs-qwen3-8m", "--to", "mlx", "--bits", "4", "-o", str(tmp_path)]
    )
    assert isinstance(result.exception, UsageError) and "holds something else" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

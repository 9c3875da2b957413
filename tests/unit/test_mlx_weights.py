"""``ggufrq quantize --to mlx``: sizes beforehand, what plain mlx-lm reads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ggufrq.base.errors import UsageError
from ggufrq.cli.quantize import quantize

pytest.importorskip("mlx.core", reason="needs mlx: pip install 'ggufrq[mlx]'")
mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'ggufrq[mlx]'")


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(quantize, [*arguments, "--to", "mlx", "--json"])
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def tensors(folder: Path) -> int:
    """Bytes of the tensors in a file of safetensors."""
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, what, bits, most",
    [
        ("docs-qwen3-8m", ["--bits", "4"], 4.51, 0.1),
        ("docs-qwen3.5-8m", ["--recipe", "proposal-c"], None, 0.02),
    ],
)
def test_a_model_is_as_it_was_told_beforehand(
    tmp_path: Path, model: str, what: list[str], bits: float | None, most: float
) -> None:
    folder = tmp_path / "made"
    told = run(model, *what, "--dry-run")
    assert not folder.exists()
    made = run(model, *what, "-o", str(folder))
    assert made["fresh"] and made["bytes"] == told["bytes"] == tensors(folder)
    assert 0 < made["kld"] < most
    if bits is not None:
        assert made["bits"] == pytest.approx(bits, abs=0.01)
    else:
        chosen = json.loads((folder / "config.json").read_text())["quantization"]
        of = {
            path.rpartition("layers.0.")[2]: rule["bits"]
            for path, rule in chosen.items()
            if "layers.0." in path
        }
        assert of["linear_attn.in_proj_qkv"] == 6 and of["mlp.down_proj"] == 5
        assert chosen["language_model.model.layers.3.self_attn.q_proj"]["bits"] == 8
    loaded, tokenizer = mlx_lm.load(str(folder))
    assert mlx_lm.generate(loaded, tokenizer, "The function", max_tokens=4)
    assert not run(model, *what, "-o", str(folder))["fresh"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--bits", "7"], "no code of 7 bits"),
        (["--bits", "4", "--types", "Q4_K_M"], "--types is for GGUF files"),
        ([], "either --bits or one --recipe"),
        (["--bits", "4", "--recipe", "proposal-c"], "either --bits or one --recipe"),
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

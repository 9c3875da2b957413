"""The caches for transformers with a build: its codes, and profiles by its converter."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hard_rows import hard

from ggufrq.build.project import Build
from ggufrq.codec import dequantize, quantize
from ggufrq.codec.tables import code
from ggufrq.models.resolve import embedded_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import ggufrq.hf.codec as hf_codec  # noqa: E402
from ggufrq.hf import IsoQuantCache  # noqa: E402
from ggufrq.models import profiles  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.build

NAME = "cache" if transformers.__version__ >= "5.24" else "past_key_values"


@pytest.fixture
def native(llama_build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_codec, "usable_build", lambda: llama_build)
    hf_codec._libraries.cache_clear()
    hf_codec.codec.cache_clear()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [128, 64])
def test_byte_for_byte(native: None, bits: int, block: int) -> None:
    x = hard(block)
    blocks, codec = quantize(x, bits, block=block), hf_codec.codec(bits, block, torch.device("cpu"))
    assert isinstance(codec, hf_codec.NativeCodec) and codec.code == code(bits, block)
    assert np.array_equal(codec.encode(torch.from_numpy(x)).numpy(), blocks)
    decoded = codec.decode(torch.from_numpy(blocks)).numpy()
    assert np.array_equal(decoded.view(np.uint32), dequantize(blocks, bits, block=block).view(np.uint32))


def saved_llama(folder: Path) -> Any:
    """A small Llama whose channels of K differ, with the tokenizer of an embedded model."""
    for path in embedded_models()["docs-qwen3-8m"].glob("*token*.json"):
        shutil.copy(path, folder)
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    torch.manual_seed(2)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=128)
    config = transformers.LlamaConfig(
        vocab_size=len(words) + 64, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            scale = torch.exp(1.5 * torch.randn(256, 1))
            layer.self_attn.k_proj.weight.mul_(3 * scale)
            layer.self_attn.q_proj.weight.mul_(3)
            layer.self_attn.v_proj.weight.mul_(20)
    model.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_profile_is_put_into_the_order_of_channels(
    llama_build: Build, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter writes rows of Q and K of a Llama in another order. In the right one a profile makes the
    loss smaller, in the other it does harm; made once it is kept."""
    monkeypatch.setattr(profiles, "require_build", lambda: llama_build)
    model = saved_llama(tmp_path)
    ids = torch.randint(0, 500, (2, 200))

    def lost(profile: str | None) -> float:
        kept = IsoQuantCache(2, 4, recent=0, first=0, profile=profile, config=model.config)
        with torch.no_grad():
            dense, got = model(ids).logits, model(ids, use_cache=True, **{NAME: kept}).logits
        return float((got - dense).square().mean())

    plain, right = lost(None), lost("weights")
    monkeypatch.setattr(profiles, "require_build", lambda: pytest.fail("it was made again"))
    assert lost("weights") == right < 0.7 * plain
    monkeypatch.setattr(profiles, "REORDERED", frozenset())
    monkeypatch.setattr(profiles, "AS_THEY_ARE", frozenset({"llama"}))
    assert lost("weights") > 1.3 * right


def test_the_page(
    llama_build: Build,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its examples run, and print what it says that they do."""
    monkeypatch.setattr(profiles, "require_build", lambda: llama_build)
    transformers.logging.set_verbosity_error()
    monkeypatch.chdir(tmp_path)
    Path("MODEL").symlink_to(embedded_models()["docs-qwen3-8m"])
    text = (REPOSITORY / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exec("\n".join(blocks), {})
    said = capsys.readouterr().out
    for line in re.findall(r"print\(.*\)  # (.*)", text):
        assert line in said.splitlines()
    sizes = re.findall(r"^[234] (\d+)$", said, re.MULTILINE)
    assert "{}, {} and {} bytes".format(*(f"{int(size):,}" for size in sizes)) in text

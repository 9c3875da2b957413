"""Profiles against the real build: the K that llama.cpp keeps is the K whose moments are foretold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
from kv_capture import captured

from ggufrq.base import paths
from ggufrq.build.project import Build
from ggufrq.cache.kv import parse_plan
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.memory_shape import _rules, memory_shape
from ggufrq.models.convert import convert
from ggufrq.profile import facts
from ggufrq.profile.angles import layer_rope
from ggufrq.profile.facts import Facts
from ggufrq.profile.layers import layer_input, sides
from ggufrq.profile.tensors import Tensors

pytestmark = pytest.mark.build

TEXT = paths.data_dir("texts") / "calibration.txt"
TOKENS = 256
HALF = random_models.DIM // 2

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 100}
LONGROPE = {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.2}
FACTORS = {"rope_freqs.weight": np.linspace(1, 9, HALF, dtype=np.float32)}
LONG = {
    "rope_factors_long.weight": np.linspace(1, 9, HALF, dtype=np.float32),
    "rope_factors_short.weight": np.linspace(1, 2, HALF, dtype=np.float32),
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]] = {
    "llama": ("llama", {}, {}),
    "llama, linear": ("llama", {"rope.scaling.factor": 8.0}, {}),
    "llama, yarn": ("llama", YARN, {}),
    "llama, factors": ("llama", {}, FACTORS),
    "llama, factors and yarn": ("llama", YARN, FACTORS),
    "llama, long": ("llama", {**LONGROPE, "rope.scaling.original_context_length": 100}, LONG),
    "llama, short": ("llama", {**LONGROPE, "rope.scaling.original_context_length": 600}, LONG),
    "llama, another base": ("llama", {"rope.freq_base": 500000.0, "rope.scaling.attn_factor": 1.3}, {}),
    "mistral3, yarn's limits": ("mistral3", {**YARN, "rope.scaling.yarn_beta_fast": 4.0}, {}),
    "mistral3, yarn's magnitude": ("mistral3", {**YARN, "rope.scaling.yarn_log_multiplier": 0.7}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, yarn": ("qwen2", YARN, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3moe": ("qwen3moe", {}, {}),
    "smollm3": ("smollm3", {}, {}),
    "granite": ("granite", {}, {}),
    "gemma": ("gemma", {}, {}),
}


@pytest.fixture(scope="session")
def tokenizer(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The metadata of an embedded model."""
    out = tmp_path_factory.mktemp("tokenizer") / "model.gguf"
    return read_header(convert(paths.data_dir("models") / "docs-qwen3-8m", out, llama_build.source)).values


@pytest.mark.parametrize("name", CASES)
def test_k_of_the_first_layer_is_what_the_parts_say(
    name: str, tokenizer: dict[str, Any], llama_build: Build, tmp_path: Path
) -> None:
    """Norm, rows, bias, QK-norm and RoPE as the profile reads them give the K of llama.cpp."""
    architecture, more, extra = CASES[name]
    model = random_models.write(architecture, tmp_path / "model.gguf", tokenizer, more=more, extra=extra)
    states = captured(model, TEXT, llama_build, n_ctx=TOKENS, chunks=1, threads=1, kv=parse_plan("f32"))
    state = next(states)
    kept = np.asarray(state.layers[0].k, np.float64)
    states.close()

    tensors = Tensors(model)
    known = Facts(tensors.headers[0].values)
    shape = memory_shape(tensors.headers)
    _, k = sides(tensors, known, shape, 0, 0)
    rope = layer_rope(tensors, known, 0, dim=k.dim, window=False, windows=False, n_ctx=TOKENS + 16)
    source = layer_input(tensors, known, 0)
    assert rope is not None and source.weight is not None
    x = tensors.rows("token_embd.weight").astype(np.float64)[list(state.tokens)]
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True)) * source.weight
    found = x @ tensors.rows(f"{k.tensor}.weight", k.first, k.heads * k.stride).T
    bias = tensors.vector(f"{k.tensor}.bias")
    found = (found if bias is None else found + bias).reshape(-1, k.heads, k.dim)
    weight = tensors.vector("blk.0.attn_k_norm.weight")
    if weight is not None:
        found = found / np.sqrt((found**2).mean(axis=2, keepdims=True)) * weight
    turned = np.stack([row @ rope.matrix(p).T for p, row in enumerate(found)])
    assert kept.shape == turned.shape
    assert np.abs(kept - turned).max() < 2e-3 * np.abs(turned).max()
    # and without RoPE, or with its pairs the other way round, it is another one
    assert np.abs(kept - found).max() > 0.1 * np.abs(turned).max()


#: Architectures without an entry: MLA, encoders, drafts, no attention, or layers in an order of their own.
WITHOUT = {
    "arwkv7", "bailingmoe3", "clip", "deepseek2", "deepseek2-ocr", "deepseek32", "dots3note", "dream",
    "eagle3", "glm-dsa", "glm5-next", "hrm_text", "hy_v4", "jina-bert-v2", "kimi-k3", "kimi-linear", "llada",
    "llada-moe", "llama-embed", "mamba", "mamba2", "minicpm3", "mistral4", "plm", "qwen4exp", "rnd1", "rwkv6",
    "rwkv6qwen2", "rwkv7", "t5", "t5encoder", "wavtokenizer-dec",
}  # fmt: skip


def test_every_architecture_pairs_as_llama_cpp_does(llama_build: Build) -> None:
    source = llama_build.source / "src"
    names = dict(re.findall(r'\{ *(LLM_ARCH_\w+), *"([^"]+)"', (source / "llama-arch.cpp").read_text()))
    code = (source / "llama-model.cpp").read_text()
    code = code[code.index("llama_rope_type llama_model_rope_type(") :]
    code = code[: code.index("\n}")]
    kinds: dict[str, str] = {}
    for block in re.findall(r"((?:\s*case LLM_ARCH_\w+:(?:\s*//[^\n]*)*)+)([^;]*;)", code):
        kind = block[1].strip()
        kinds |= dict.fromkeys((names[case] for case in re.findall(r"LLM_ARCH_\w+", block[0])), kind)
    assert len(kinds) > 120
    tables = facts._tables()["rope"]
    ours = {name: kind for kind in ("none", "norm", "neox") for name in tables[kind]}
    for name, kind in ours.items():
        told = kinds[name]
        if name in tables["sections"]:
            assert "use_mrope()" in told and told.endswith(f"LLAMA_ROPE_TYPE_{kind.upper()};"), name
        elif kind == "none":  # StarCoder has a type of RoPE there, but no RoPE
            assert told.endswith("TYPE_NONE;") or name == "starcoder", name
        else:
            allowed = ("NORM",) if kind == "norm" else ("NEOX", "MROPE", "IMROPE")
            assert told.endswith(tuple(f"LLAMA_ROPE_TYPE_{one};" for one in allowed)), (name, told)
    rules = _rules()
    covered = ours.keys() | set(rules["none"]["names"]) | rules["refused"].keys() | WITHOUT
    assert kinds.keys() - covered - {"(unknown)"} == set()

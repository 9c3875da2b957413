"""Recipes on the embedded models and on a small mixture of experts: every tensor gets what was planned."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from families import family_of

from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.cli.quantize import quantize as command
from ggufrq.ggufs import tensors
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import read_header
from ggufrq.make import matrix, recipe
from ggufrq.make.family import parse_wants, plan_family
from ggufrq.make.inventory import inventory
from ggufrq.make.plan import Family, Request
from ggufrq.make.quantizer import quantize_file
from ggufrq.make.recipe import Recipe

MODELS = ("docs-qwen3-8m", "docs-qwen3.5-8m")
EMBD, FF, EXPERTS, VOCAB = 256, 96, 4, 4096


def source(families: dict[str, Family], name: str) -> Path:
    return families[name].folder / f"{name}-BF16.gguf"


@pytest.fixture(scope="module")
def experts(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with random weights, whose experts have rows of 96, and a tokenizer."""
    path = tmp_path_factory.mktemp("experts") / "Experts-1M-BF16.gguf"
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in read_header(source(families, MODELS[0])).values.items():
        if key.startswith("tokenizer.") and isinstance(value, tuple):
            writer.add_array(key, list(value))
        elif key.startswith("tokenizer.ggml.") and isinstance(value, str):
            writer.add_string(key, value)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(EMBD)
    writer.add_feed_forward_length(FF)
    writer.add_expert_feed_forward_length(FF)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) / 16).astype(np.float16))

    def norm(name: str, length: int) -> None:
        writer.add_tensor(name, np.ones(length, np.float32))

    add("token_embd.weight", VOCAB, EMBD)
    add("output.weight", VOCAB, EMBD)
    norm("output_norm.weight", EMBD)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{part}.weight", EMBD, EMBD)
    for part, length in (("attn_norm", EMBD), ("ffn_norm", EMBD), ("attn_q_norm", 128), ("attn_k_norm", 128)):
        norm(f"blk.0.{part}.weight", length)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", rng.standard_normal((EXPERTS, EMBD)).astype(np.float32))
    add("blk.0.ffn_gate_exps.weight", EXPERTS, FF, EMBD)
    add("blk.0.ffn_up_exps.weight", EXPERTS, FF, EMBD)
    add("blk.0.ffn_down_exps.weight", EXPERTS, EMBD, FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small_matrix(
    families: dict[str, Family], llama_build: Build, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A matrix of the dense model with all entries that it can have, without running it."""
    path = tmp_path_factory.mktemp("matrix") / "given-imatrix.gguf"
    return matrix.stand_in(path, [Path("some text.txt")], inventory(source(families, MODELS[0]), llama_build))


@pytest.mark.parametrize("name", MODELS)
def test_shipped_recipes(families: dict[str, Family], llama_build: Build, tmp_path: Path, name: str) -> None:
    wants = parse_wants(["proposal-c"], llama_build)
    request = Request(str(source(families, name)), wants, tmp_path, run=True)
    (planned,) = plan_family(request, llama_build).outputs
    assert not list(tmp_path.iterdir())
    (made,) = family_of(request.model, ["proposal-c"], llama_build, out=tmp_path).files
    facts = read_gguf(made.path)
    assert facts.tensor_types == planned.forecast.types
    assert facts.file_bytes == planned.forecast.file_bytes == made.bytes
    assert made.name == f"{name}-proposal-c-{made.type}.gguf" and made.recipe == "proposal-c"
    classes = {
        recipe.class_of(tensor, facts.architecture): kind for tensor, kind in facts.tensor_types.items()
    }
    assert classes["ffn_up"] == "q5_k" and classes["attn_v"] == classes["attn_output"] == "q8_0"
    assert classes.get("linear_qkv", "q6_k") == classes.get("linear_alpha_beta", "q6_k") == "q6_k"
    values = read_header(made.path).values
    assert values["ggufrq.recipe"] == "proposal-c" and values["ggufrq.source.name"] == f"{name}-BF16.gguf"
    assert str(tmp_path) not in str(values)


def test_mixture_of_experts(experts: Path, llama_build: Build, tmp_path: Path) -> None:
    made = family_of(str(experts), ["proposal-c", "Q4_K_M"], llama_build, out=tmp_path)
    types = read_gguf(made.file("proposal-c")).tensor_types
    assert types["blk.0.ffn_up_exps.weight"] == types["blk.0.ffn_gate_exps.weight"] == "q5_k"
    assert types["blk.0.ffn_down_exps.weight"] == "q5_1"  # rows of 96
    assert types["blk.0.ffn_gate_inp.weight"] == "f32"
    assert [file.fallbacks for file in made.files] == [1, 1]
    plan = plan_family(
        Request(str(experts), parse_wants(["unsloth-dynamic"], llama_build), tmp_path), llama_build
    )
    assert plan.outputs[0].fallbacks == {"blk.0.ffn_down_exps.weight": ("q4_k", "q5_0")}
    assert plan.outputs[0].forecast.types["blk.0.attn_output.weight"] == "bf16"


def test_what_is_quantized_is_the_tools_own_answer(experts: Path, llama_build: Build) -> None:
    model = inventory(experts, llama_build)
    assert model.architecture == "qwen3moe"
    left = {tensor.name for tensor in model if not tensor.quantizable}
    assert "blk.0.ffn_gate_inp.weight" in left and all("norm" in name or "inp" in name for name in left)
    assert {t.name: t.shape for t in model}["blk.0.ffn_up_exps.weight"] == (EMBD, FF, EXPERTS)


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_XS", "Q8_0", "F16"])
@pytest.mark.parametrize("matrix_given", [False, True])
def test_sizes_are_told_to_the_byte(
    families: dict[str, Family],
    llama_build: Build,
    small_matrix: Path,
    tmp_path: Path,
    kind: str,
    matrix_given: bool,
) -> None:
    model = str(source(families, MODELS[0]))
    given = (small_matrix,) if matrix_given else ()
    request = Request(model, parse_wants([kind], llama_build), tmp_path, given)
    (planned,) = plan_family(request, llama_build).outputs
    (made,) = family_of(model, [kind], llama_build, out=tmp_path, imatrix=given, run=False).files
    assert made.path.stat().st_size == planned.forecast.file_bytes
    assert made.bits == pytest.approx(planned.forecast.bits)
    values = read_header(made.path).values
    assert values.get("quantize.imatrix.file") == (f"{MODELS[0]}-imatrix.gguf" if given else None)


def test_a_recipe_of_ones_own(families: dict[str, Family], llama_build: Build, tmp_path: Path) -> None:
    """Every tensor by name, as a solver writes it, and quantized without a family around it."""
    path = source(families, MODELS[1])
    model = inventory(path, llama_build)
    kinds = ("q4_k", "q5_k", "q6_k", "q8_0", "bf16", "iq4_xs", "q4_0")
    rules = {tensor.name: kinds[i % len(kinds)] for i, tensor in enumerate(model.quantizable)}
    types = Recipe("solved", tensors=rules).plan(model)
    out = quantize_file(path, tmp_path / "solved.gguf", types, llama_build)
    assert read_gguf(out).tensor_types == types
    assert not list(tmp_path.glob(".*"))


def test_plan_of_a_model_that_is_not_converted(llama_build: Build, tmp_path: Path) -> None:
    """Sizes come from headers alone, and are those of the converted model."""
    wants = parse_wants(["Q5_K_M", "proposal-c"], llama_build)
    plan = plan_family(Request(MODELS[1], wants, tmp_path / "new"), llama_build)
    assert not (tmp_path / "new").exists()
    made = family_of(MODELS[1], ["Q5_K_M", "proposal-c"], llama_build, out=tmp_path / "new", run=False)
    assert [out.forecast.file_bytes for out in plan.outputs] == [file.bytes for file in made.files]
    converted = made.folder / f"{MODELS[1]}-BF16.gguf"
    assert plan.conversions[0].bytes == converted.stat().st_size
    assert plan.disk_needed == converted.stat().st_size + sum(file.bytes for file in made.files)


def test_matrix_of_another_model(families: dict[str, Family], llama_build: Build, tmp_path: Path) -> None:
    model = str(source(families, MODELS[1]))
    other = matrix.stand_in(
        tmp_path / "other.gguf",
        [Path("t")],
        tensors.Inventory("x", (tensors.Tensor("a.weight", (8, 8), "f16", True),)),
    )
    with pytest.raises(ModelError, match="was made for another model"):
        family_of(model, ["Q8_0"], llama_build, out=tmp_path / "out", imatrix=other)
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_commands_that_only_look(families: dict[str, Family], tmp_path: Path) -> None:
    model = str(source(families, MODELS[0]))
    out = ["-o", str(tmp_path / "none")]
    done = CliRunner().invoke(command, [model, "--recipe", "proposal-c", "--dry-run", *out])
    assert done.exit_code == 0, done.output
    assert "docs-qwen3-8m-proposal-c-Q8_0.gguf" in done.stdout and "disk " in done.stdout
    done = CliRunner().invoke(command, [model, "--types", "Q4_K_M", "--list-tensors", *out])
    assert "blk.7.ffn_down.weight" in done.stdout and "q6_k" in done.stdout
    done = CliRunner().invoke(command, [model, "--family", "default", "--dry-run", "--json", *out])
    files = json.loads(done.stdout)["files"]
    assert [file["type"] for file in files] == ["IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    assert not (tmp_path / "none").exists()

"""Recipes against the tensor names of real architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.base.errors import UsageError
from ggufrq.ggufs.tensors import Inventory, Tensor, fallback, type_bits
from ggufrq.make import recipe
from ggufrq.make.recipe import Recipe

ROW = 512


def model(architecture: str, *names: str, row: int = ROW) -> Inventory:
    """Quantizable tensors of these names, and one norm that is not quantized."""
    tensors = [Tensor("output_norm.weight", (row,), "f32", quantizable=False)]
    return Inventory(architecture, (*tensors, *(Tensor(name, (row, 256), "bf16", True) for name in names)))


def block(*names: str) -> list[str]:
    return [f"blk.{i}.{name}.weight" for i in range(2) for name in names]


ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
LINEAR = ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out")
DENSE = model(
    "qwen3", "token_embd.weight", "output.weight", *block(*ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
)
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
MOE = model("qwen3moe", "token_embd.weight", "output.weight", *block(*ATTENTION, *EXPERTS))
HYBRID = model(
    "qwen35",
    "token_embd.weight",
    "output.weight",
    *block(*LINEAR, *ATTENTION, "ffn_gate", "ffn_up", "ffn_down"),
)
HYBRID_MOE = model(
    "qwen35moe",
    "token_embd.weight",
    "output.weight",
    *block(*LINEAR, *ATTENTION, *EXPERTS, *SHARED),
    "blk.2.nextn.eh_proj.weight",
)
MLA = model(
    "deepseek2",
    "token_embd.weight",
    "output.weight",
    *block("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_output", *EXPERTS, *SHARED),
)

# The published tables, by the name of the tensor in a block.
PUBLISHED = {
    "proposal-c": {
        "token_embd": "q8_0",
        "output": "q8_0",
        **dict.fromkeys(ATTENTION, "q8_0"),
        **dict.fromkeys(("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta"), "q6_k"),
        "ssm_out": "q8_0",
        **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down", *EXPERTS, *SHARED), "q5_k"),
    },
    "unsloth-dynamic": {
        "token_embd": "q5_k",
        "output": "q6_k",
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate"), "q5_k"),
        **dict.fromkeys(("attn_output", "ssm_alpha", "ssm_beta", "ssm_out"), "bf16"),
        **dict.fromkeys(("ffn_gate", "ffn_up", *EXPERTS[:2], *SHARED[:2]), "q3_k"),
        **dict.fromkeys(("ffn_down", EXPERTS[2], SHARED[2]), "q4_k"),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("of", [DENSE, MOE, HYBRID, HYBRID_MOE], ids=lambda of: of.architecture)
def test_shipped_recipes_are_the_published_tables(name: str, of: Inventory) -> None:
    types = recipe.load(name).plan(of)
    assert types.keys() == {tensor.name for tensor in of}
    assert types.pop("output_norm.weight") == "f32"
    for tensor, kind in types.items():
        short = tensor.removesuffix(".weight").split(".", 2)[-1]
        if short != "nextn.eh_proj":
            assert kind == PUBLISHED[name][short], tensor


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_are_complete(name: str) -> None:
    """A rule for every class that there is, so that no architecture with known classes is refused."""
    found = recipe.load(name)
    assert {*found.classes, *found.where_present} == set(recipe.known_classes())
    assert found.plan(MLA)["blk.1.attn_kv_a_mqa.weight"] == found.plan(MLA)["blk.1.attn_q_b.weight"]


def test_attn_qkv_means_another_thing_in_a_delta_net() -> None:
    assert recipe.class_of("blk.7.attn_qkv.weight", "qwen35") == "linear_qkv"
    assert recipe.class_of("blk.7.attn_qkv.weight", "phi3") == "attn_qkv"
    assert recipe.class_of("blk.7.ffn_up.weight", "qwen35") == "ffn_up"
    assert recipe.class_of("v.blk.0.attn_q.weight", "clip") is None
    assert recipe.class_of("blk.0.attn_norm.bias", "qwen3") is None


def test_without_output_the_embedding_follows_its_rule() -> None:
    tied = model("qwen3", "token_embd.weight", *block(*ATTENTION, "ffn_gate", "ffn_up", "ffn_down"))
    assert recipe.load("unsloth-dynamic").plan(tied)["token_embd.weight"] == "q6_k"
    only = Recipe("mine", classes={"token_embd": "q4_k"})
    assert only.plan(model("qwen3", "token_embd.weight"))["token_embd.weight"] == "q4_k"


def test_tensors_go_before_classes() -> None:
    of = model("qwen3", "token_embd.weight", *block("ffn_up"))
    mine = Recipe(
        "mine",
        classes={"token_embd": "q8_0"},
        where_present={"ffn_up": "q3_k"},
        tensors={"blk.1.*": "q6_k"},
    )
    assert mine.plan(of) == {
        "output_norm.weight": "f32",
        "token_embd.weight": "q8_0",
        "blk.0.ffn_up.weight": "q3_k",
        "blk.1.ffn_up.weight": "q6_k",
    }
    exact = Recipe("mine", tensors={"*": "q4_k", "blk.1.ffn_up.weight": "q8_0"})
    assert exact.plan(of)["blk.1.ffn_up.weight"] == "q8_0"


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (Recipe("r", classes={"token_embd": "q8_0"}), r"no rule for blk\.0\.ffn_up\.weight \(class ffn_up\)"),
        (
            Recipe("r", classes={"token_embd": "q8_0", "ffn_up": "q4_k", "ssm_out": "q4_k"}),
            r"'ssm_out' matches no tensor of this model \(qwen3\)",
        ),
        (Recipe("r", tensors={"*": "q4_k", "blk.9.*": "q8_0"}), r"'blk\.9\.\*' matches no tensor"),
        (
            Recipe("r", tensors={"*embd*": "q4_k", "blk.*": "q8_0", "*ffn*": "q4_k"}),
            r"two rules for blk\.0\.ffn_up\.weight: 'blk\.\*', '\*ffn\*'",
        ),
    ],
)
def test_incomplete_recipes_are_refused(rules: Recipe, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        rules.plan(model("qwen3", "token_embd.weight", *block("ffn_up")))


def test_unknown_tensors_are_named_with_a_rule_to_add() -> None:
    with pytest.raises(UsageError, match=r"blk\.0\.strange\.weight belongs to no class") as caught:
        recipe.load("proposal-c").plan(model("qwen3", "token_embd.weight", "blk.0.strange.weight"))
    assert '[tensors] "blk.*.strange.weight" = "q8_0"' in str(caught.value.remedy)


def test_rows_that_do_not_fill_blocks_get_what_llama_cpp_takes() -> None:
    plan = recipe.load("unsloth-dynamic").plan(
        model(
            "qwen3", "token_embd.weight", "output.weight", *block("ffn_up", "ffn_down", "attn_output"), row=96
        )
    )
    assert plan["blk.0.ffn_up.weight"] == "q4_0"
    assert plan["blk.0.ffn_down.weight"] == "q5_0"
    assert plan["token_embd.weight"] == "q5_1"
    assert plan["output.weight"] == "q8_0"
    assert plan["blk.0.attn_output.weight"] == "bf16"
    assert fallback("q4_k", 24) == fallback("q8_0", 24) == "f16"
    assert fallback("q8_0", 96) == "q8_0"
    assert fallback("iq3_s", 96) == "iq4_nl"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[classes", "no valid TOML"),
        ("", "has no rules"),
        ("[clases]\nffn_up = 'q8_0'", "no 'clases'"),
        ("classes = 'q8_0'", r"\[classes\] must be a table"),
        ("[classes]\nffn_upp = 'q8_0'", "no class 'ffn_upp'"),
        ("[classes]\nffn_up = 'q9_0'", "no tensor type 'q9_0'"),
        ("[classes]\nffn_up = 'q8_0'\n[where-present]\nffn_up = 'q4_0'", "'ffn_up' has two rules"),
        ("imatrix = 1\n[classes]\nffn_up = 'q8_0'", "imatrix is true or false"),
        ("name = 'a/b'\n[classes]\nffn_up = 'q8_0'", "letters, digits"),
        ("name = '4-bit'\n[classes]\nffn_up = 'q8_0'", "does not begin with a letter; llama.cpp's -hf"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        recipe.load(path)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="no recipe 'proposal-d'") as caught:
        recipe.load("proposal-d")
    assert "one of proposal-c" in str(caught.value.remedy)


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    mine = Recipe("mine", 'says "so"', {"token_embd": "q8_0"}, {"ffn_up": "q3_k"}, {"blk.0.*": "iq4_xs"})
    path = tmp_path / "mine.toml"
    path.write_text(recipe.dump(mine))
    assert recipe.load(path) == mine
    path.write_text("[classes]\ntoken_embd = 'Q5_K'\n")
    assert recipe.load(str(path)) == Recipe("mine", classes={"token_embd": "q5_k"})


def test_classes_of_a_model() -> None:
    found = recipe.classes(model("qwen35", "token_embd.weight", "blk.0.ssm_beta.weight", "blk.0.new.weight"))
    assert {name: len(tensors) for name, tensors in found.items()} == {
        "token_embd": 1,
        "linear_alpha_beta": 1,
        "blk.0.new.weight": 1,
    }


def test_sizes() -> None:
    types = recipe.load("proposal-c").plan(DENSE)
    assert DENSE.bytes_as(types) == 4 * ROW + sum(
        int(tensor.values * type_bits(types[tensor.name]) / 8) for tensor in DENSE.quantizable
    )


def qwen35_27b() -> Inventory:
    """The tensors of Qwen3.5-27B: 64 layers, every fourth of them with full attention."""
    embd, ffn, vocab = 5120, 17408, 248320
    inner, heads = 6144, 48

    def weight(name: str, *shape: int) -> Tensor:
        return Tensor(f"{name}.weight", shape, "bf16", quantizable=True)

    def small(name: str, *shape: int) -> Tensor:
        return Tensor(f"{name}.weight", shape, "f32", quantizable=False)

    found = [weight("token_embd", embd, vocab), weight("output", embd, vocab), small("output_norm", embd)]
    for i in range(64):
        b = f"blk.{i}."
        if i % 4 == 3:
            found += [weight(b + "attn_q", embd, 2 * inner), weight(b + "attn_output", inner, embd)]
            found += [weight(b + name, embd, 1024) for name in ("attn_k", "attn_v")]
        else:
            found += [weight(b + "attn_qkv", embd, 10240), weight(b + "attn_gate", embd, inner)]
            found += [weight(b + name, embd, heads) for name in ("ssm_alpha", "ssm_beta")]
            found += [weight(b + "ssm_out", inner, embd), small(b + "ssm_conv1d", 4, 10240)]
        found += [weight(b + "ffn_gate", embd, ffn), weight(b + "ffn_up", embd, ffn)]
        found += [weight(b + "ffn_down", ffn, embd)]
        found += [small(b + name, embd) for name in ("attn_norm", "post_attention_norm")]
    return Inventory("qwen35", tuple(found))


@pytest.mark.parametrize(
    ("name", "gigabytes", "bits"), [("proposal-c", 21.2, 6.30), ("unsloth-dynamic", 17.7, 5.26)]
)
def test_published_sizes(name: str, gigabytes: float, bits: float) -> None:
    of = qwen35_27b()
    types = recipe.load(name).plan(of)
    assert round(of.bytes_as(types) / 1e9, 1) == gigabytes
    assert round(of.bits_as(types), 2) == bits

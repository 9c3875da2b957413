"""Weights in two memories, and the options of llama.cpp for it."""

from __future__ import annotations

import re

import pytest

from ggufrq.ggufs.placement import fitting, placements

EXPERTS = {
    "token_embd.weight": 1000,
    "output.weight": 2000,
    **{f"blk.{i}.attn_q.weight": 10 for i in range(12)},
    "blk.0.ffn_up.weight": 50,  # a first layer without experts
    **{
        f"blk.{i}.{name}.weight": 100
        for i in range(1, 12)
        for name in ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps")
    },
    **{f"blk.{i}.ffn_gate_inp.weight": 1 for i in range(1, 12)},
    **{f"blk.{i}.ffn_up_shexp.weight": 7 for i in range(1, 12)},
}
DENSE = {
    "token_embd.weight": 1000,
    **{f"blk.{i}.{name}.weight": 10 for i in range(3) for name in ("attn_q", "ffn_up", "ffn_down")},
    "blk.0.ffn_norm.weight": 1,
}


@pytest.mark.parametrize("sizes", [EXPERTS, DENSE])
def test_bytes_are_those_of_the_names_that_the_pattern_meets(sizes: dict[str, int]) -> None:
    for place in placements(sizes):
        pattern = place.override.removesuffix("=CPU")
        met = sum(size for name, size in sizes.items() if pattern and re.search(pattern, name))
        assert place.ram == sizes["token_embd.weight"] + met
        copy = sizes["token_embd.weight"] if "output.weight" not in sizes else 0
        assert place.vram + place.ram == sum(sizes.values()) + copy


def test_as_much_as_there_is_room_for_is_on_the_gpu() -> None:
    rest = 2000 + 12 * 10 + 50 + 11 * 8
    whole = rest + 11 * 300
    assert [place.vram for place in placements(EXPERTS)] == [whole, *(whole - 300 * i for i in range(12))]
    found = fitting(EXPERTS, whole - 301, None)
    assert found is not None and found.experts and found.option == "--n-cpu-moe 3"
    assert found.override == r"blk\.(0|1|2)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    assert fitting(EXPERTS, whole - 301, 1599) is None, "two layers' experts and the embedding take 1,600"
    assert fitting(EXPERTS, whole - 301, 1600) == found
    everything = fitting(EXPERTS, whole, 1000)
    assert everything is not None and everything.option == everything.override == ""
    last = fitting(EXPERTS, rest, None)
    assert last is not None and last.override == r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    assert fitting(EXPERTS, rest - 1, None) is None


def test_dense_models_and_one_embedding_for_both_ends() -> None:
    found = fitting(DENSE, 1000 + 30 + 1 + 20, None)
    assert found is not None and found.option == "--n-cpu-ffn 2"
    assert found.override == r"blk\.(0|1)\.ffn_(up|down|gate)\.=CPU"
    assert (found.vram, found.ram) == (1051, 1040), "the embedding is in both"


def test_embeddings_by_layers_are_with_the_cpu_too() -> None:
    """Those of Gemma 3n and 4, which are most of the model."""
    place = placements({**DENSE, "per_layer_token_embd.weight": 5000})[0]
    assert (place.vram, place.ram) == (1000 + 90 + 1, 1000 + 5000)

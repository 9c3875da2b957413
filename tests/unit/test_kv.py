from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufrq import codec
from ggufrq.base.errors import UsageError
from ggufrq.cache.kv import (
    KvPair,
    KvPlan,
    Sought,
    exact_words,
    kv_type,
    kv_types,
    parse_kv,
    parse_plan,
)

NAMES = sorted(kv_types())


@pytest.mark.parametrize(
    ("text", "k", "v", "bits"),
    [
        ("iso3", "iso3", "iso3", 3.125),
        ("iso3/planar4", "iso3", "planar4", 3.625),
        ("rotor2/iso2", "rotor2", "iso2", 2.125),
        ("f16", "f16", "f16", 16),
        ("q8_0/iso3", "q8_0", "iso3", (8.5 + 3.125) / 2),
        (" ISO3 / Q8_0 ", "iso3", "q8_0", (8.5 + 3.125) / 2),
        ("iq4_nl", "iq4_nl", "iq4_nl", 4.5),
        ("q5_1", "q5_1", "q5_1", 6),
    ],
)
def test_parse(text: str, k: str, v: str, bits: float) -> None:
    pair = parse_kv(text)
    assert (pair.k.name, pair.v.name, pair.bits) == (k, v, bits)


@pytest.mark.parametrize(
    ("text", "says", "remedy"),
    [
        ("isso3", "no cache type 'isso3'", "--kv iso3"),
        ("planar6", "no cache type 'planar6'", "--kv planar"),
        ("q8", "no cache type 'q8'", "--kv q8_0"),
        ("iso3/rotr4", "no cache type 'rotr4'", "--kv rotor4"),
        ("xyzzy", "no cache type 'xyzzy'", "--kv iso3"),
        ("", "not a pair", "--kv iso3"),
        ("iso3/", "not a pair", "iso3/planar4"),
        ("/iso3", "not a pair", "iso3/planar4"),
        ("iso3/iso3/iso3", "not a pair", "iso3/planar4"),
    ],
)
@pytest.mark.parametrize("parse", [parse_kv, parse_plan])
def test_refuses(parse: Callable[[str], object], text: str, says: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in caught.value.message
    assert remedy in str(caught.value.remedy)


def test_unknown_name_lists_all_types() -> None:
    with pytest.raises(UsageError) as caught:
        kv_type("nothing")
    assert all(name in caught.value.message for name in NAMES)


@given(k=st.sampled_from(NAMES), v=st.sampled_from(NAMES))
def test_name_parses_back(k: str, v: str) -> None:
    pair = KvPair(kv_type(k), kv_type(v))
    assert parse_kv(pair.name) == pair
    assert pair.ours == (k in OURS or v in OURS)


OURS = {t.name for t in codec.cache_types()}


@given(
    k=st.sampled_from(NAMES),
    v=st.sampled_from(NAMES),
    rows=st.integers(0, 10_000),
    width=st.integers(1, 64).map(lambda n: n * 128),
)
def test_bytes_are_bits_times_values(k: str, v: str, rows: int, width: int) -> None:
    pair = KvPair(kv_type(k), kv_type(v))
    values = rows * width
    assert pair.bytes_for(values, values) * 8 == pair.k.bits * values + pair.v.bits * values
    assert pair.bytes_for(values, 0) * 8 == pair.k.bits * values


def test_published_sizes_of_a_27b_model() -> None:
    """16 layers, 4 KV heads of 256: 64 KiB per token in f16, 400 MiB at 32K in three bits."""
    values = 16 * 4 * 256
    assert parse_kv("f16").bytes_for(values, values) == 64 << 10
    assert parse_kv("iso3").bytes_for(values * 32768, values * 32768) == 400 << 20
    assert parse_kv("iso2").bytes_for(values * 32768, values * 32768) == 272 << 20
    assert parse_kv("rotor4").bytes_for(values * 131072, values * 131072) == 2112 << 20


def test_partial_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="64 values do not fill blocks of 128"):
        kv_type("iso3").bytes_for(64)


def test_heads_of_64_have_blocks_of_their_own() -> None:
    """Under the same name; upstream's types are as they are."""
    for bits, size in ((2, 18), (3, 26), (4, 34), (5, 42)):
        kind = kv_type(f"rotor{bits}")
        for head in (64, 192, 320, 576):
            narrow = kind.for_heads(head)
            assert (narrow.name, narrow.block, narrow.block_bytes) == (kind.name, 64, size)
            assert narrow.bits == kind.bits + 0.125 and narrow.bytes_for(head) == head // 64 * size
        assert all(kind.for_heads(head) == kind for head in (0, 128, 256))
    assert kv_type("q4_0").for_heads(64) == kv_type("q4_0")


def test_other_heads_are_filled_up() -> None:
    """To the next multiple of 64, of which a value has its share; of upstream's types beside them, too."""
    for head, size in ((80, 50), (96, 50), (112, 50), (40, 26), (160, 78)):
        kind = kv_type("iso3").for_heads(head)
        assert (kind.name, kind.block, kind.block_bytes) == ("iso3", head, size)
        assert kind.bytes_for(3 * head) == 3 * size
    shape = Shape((3 * 80, 2 * 96), (3 * 80, 2 * 64), (80, 96), (80, 64))
    assert parse_plan("iso3").layer_bytes(shape) == [(3 * 50, 3 * 50), (2 * 50, 2 * 26)]
    assert parse_plan("iso3; 1:f16").layer_bytes(shape) == [(3 * 50, 3 * 50), (2 * 128 * 2, 2 * 64 * 2)]
    assert parse_plan("iso3/f16").layer_bytes(shape) == [(3 * 50, 3 * 80 * 2), (2 * 50, 2 * 64 * 2)]
    row = 2 * (3 * 128 + 3 * 128 + 2 * 128 + 2 * 64)
    assert parse_plan("iso3").with_exact(32, 1).recent_bytes(shape, 4096) == 34 * row


@pytest.mark.parametrize(
    ("head", "kinds"),
    [(80, "234"), (96, "23"), (112, "234"), (160, "23"), (32, ""), (48, "234"), (64, "234")],
)
def test_heads_are_filled_up_where_it_pays(head: int, kinds: str) -> None:
    """In fewer bits than q4_0, or than f16 where q4_0 cannot hold such heads."""
    assert "".join(bits for bits in "234" if kv_type(f"rotor{bits}").holds(head)) == kinds
    assert kv_type("iso2").holds(head, fill=False) == (head == 64)
    assert kv_type("q4_0").holds(head) == (head % 32 == 0)


def test_size_of_a_plan_follows_the_heads_of_each_side() -> None:
    shape = Shape((3 * 64, 2 * 192), (3 * 64, 2 * 128), (64, 192), (64, 128))
    plan = parse_plan("iso3")
    assert plan.layer_bytes(shape) == [(3 * 26, 3 * 26), (6 * 26, 2 * 50)]
    assert parse_plan("iso3; 1:q8_0/iso4").layer_bytes(shape) == [(78, 78), (384 * 34 // 32, 2 * 66)]
    assert plan.bits(Shape((192,), (192,), (64,), (64,))) == 3.25


def test_upstream_types_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for name, kind in kv_types().items():
        if not kind.ours:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
            assert (kind.block, kind.block_bytes) == (block, size), name


def test_ours_are_those_of_the_codec() -> None:
    ours = {name: kind for name, kind in kv_types().items() if kind.ours}
    assert set(ours) == OURS
    for kind in codec.cache_types():
        assert ours[kind.name].bits == kind.bits_per_value == kind.bits + 0.125


# Plans


@dataclass(frozen=True)
class Shape:
    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]
    k_heads: tuple[int, ...] = ()
    v_heads: tuple[int, ...] = ()


def names(plan: KvPlan, layers: int) -> list[str]:
    return [pair.name for pair in plan.resolve(layers)]


@pytest.mark.parametrize(
    ("text", "name", "layers"),
    [
        ("iso3", "iso3", ["iso3"] * 4),
        ("iso3/q8_0", "iso3/q8_0", ["iso3/q8_0"] * 4),
        ("iso3; 0-1,-1:q8_0", "iso3; 0-1,-1:q8_0", ["q8_0", "q8_0", "iso3", "q8_0"]),
        (" ISO3 ;0 - 1:iso4", None, None),
        ("ISO3;0-1 , -1 : Q8_0", "iso3; 0-1,-1:q8_0", ["q8_0", "q8_0", "iso3", "q8_0"]),
        ("iso3; 0-3:iso4; 2:iso2/f16", "iso3; 0-3:iso4; 2:iso2/f16", ["iso4", "iso4", "iso2/f16", "iso4"]),
        ("iso3; 2:iso2; 0-3:iso4", "iso3; 2:iso2; 0-3:iso4", ["iso4"] * 4),
        ("q8_0; -2--1:iso3", "q8_0; -2--1:iso3", ["q8_0", "q8_0", "iso3", "iso3"]),
        ("q8_0; 1--2:iso3", "q8_0; 1--2:iso3", ["q8_0", "iso3", "iso3", "q8_0"]),
        ("iso3; 2-2:iso4", "iso3; 2:iso4", ["iso3", "iso3", "iso4", "iso3"]),
    ],
)
def test_plans(text: str, name: str | None, layers: list[str] | None) -> None:
    if name is None or layers is None:
        with pytest.raises(UsageError):
            parse_plan(text)
        return
    plan = parse_plan(text)
    assert plan.name == name
    assert names(plan, 4) == layers
    assert parse_plan(plan.name) == plan


@pytest.mark.parametrize(
    ("text", "says", "remedy"),
    [
        ("0-1:q8_0", "'0-1:q8_0' names layers", '"iso3; 0-1:q8_0"'),
        ("", "not a pair", "--kv iso3"),
        ("iso3;", "'' is not LAYERS:TYPE", "iso3; 0-1,-1:q8_0"),
        ("iso3; q8_0", "'q8_0' is not LAYERS:TYPE", "iso3; 0-1,-1:q8_0"),
        ("iso3; :q8_0", "is not LAYERS:TYPE", "iso3; 0-1,-1:q8_0"),
        ("iso3; 0:", "is not LAYERS:TYPE", "iso3; 0-1,-1:q8_0"),
        ("iso3; 0,:q8_0", "'' is no layer", "0-1,5"),
        ("iso3; first:q8_0", "'first' is no layer", "0-1,5"),
        ("iso3; 1.5:q8_0", "'1.5' is no layer", "0-1,5"),
        ("iso3; 3-1:q8_0", "layers 3-1 run backwards", "1-3"),
        ("iso3; -1--3:q8_0", "layers -1--3 run backwards", "-3--1"),
        ("iso3; 0:q9", "no cache type 'q9'", "--kv"),
        ("iso3; 0:q8_0:iso3", "no cache type 'q8_0:iso3'", "--kv"),
    ],
)
def test_plans_that_are_refused(text: str, says: str, remedy: str) -> None:
    test_refuses(parse_plan, text, says, remedy)


@pytest.mark.parametrize("text", ["iso3; 8:q8_0", "iso3; -9:q8_0", "iso3; 6-8:q8_0"])
def test_layers_that_are_not_there(text: str) -> None:
    with pytest.raises(UsageError, match=r"the model has 8 with a KV cache, 0 to 7") as caught:
        parse_plan(text).resolve(8)
    assert "from 0 to 7" in str(caught.value.remedy)


def test_layers_that_run_backwards_in_this_model() -> None:
    plan = parse_plan("iso3; 3--2:q8_0")
    assert names(plan, 6) == ["iso3", "iso3", "iso3", "q8_0", "q8_0", "iso3"]
    with pytest.raises(UsageError, match="of 4, they are 3 to 2"):
        plan.resolve(4)


PAIRS = st.sampled_from([parse_kv(name) for name in ("iso3", "iso4/q8_0", "q8_0", "f16/iso2")])


@given(st.lists(PAIRS, min_size=1, max_size=12))
def test_plan_of_layers(pairs: list[KvPair]) -> None:
    plan = KvPlan.of_layers(pairs)
    assert plan.resolve(len(pairs)) == tuple(pairs)
    assert parse_plan(plan.name) == plan
    assert plan.layered == (len(set(pairs)) > 1)
    assert set(plan.pairs) == set(pairs)


def test_plan_of_layers_is_short() -> None:
    pairs = [parse_kv(name) for name in ["q8_0", "q8_0", "iso3", "iso3", "iso3", "iso4", "iso3", "q8_0"]]
    assert KvPlan.of_layers(pairs).name == "iso3; 0-1,7:q8_0; 5:iso4"


def test_size_of_a_plan_is_exact_where_layers_differ() -> None:
    shape = Shape((256, 256, 1024), (256, 512, 1024))
    plan = parse_plan("iso3; 1:q8_0/iso4; -1:f16")
    sizes = [(256 + 256) * 50 // 128, 256 * 34 // 32 + 512 * 66 // 128, 2 * 2048]
    assert plan.bytes_for(shape, 1) == sum(sizes)
    assert plan.bytes_for(shape, 1000) == 1000 * sum(sizes)
    assert plan.bits(shape) == 8 * sum(sizes) / (256 * 3 + 512 + 2048)
    assert parse_plan("iso3").bits(shape) == 3.125
    with pytest.raises(UsageError, match="there is no layer 3"):
        parse_plan("iso3; 3:f16").bytes_for(shape, 1)
    with pytest.raises(ValueError, match="64 values do not fill blocks of 128"):
        parse_plan("iso3").bytes_for(Shape((64, 64), (64, 64)), 1024)


def test_what_llama_cpp_is_told() -> None:
    plain = parse_plan("iso3/planar4")
    assert plain.arguments() == ["-ctk", "iso3", "-ctv", "planar4"] == parse_kv("iso3/planar4").arguments()
    variables = ["LLAMA_RQ_LAYERS", "LLAMA_RQ_PROFILE", "LLAMA_RQ_CALIB", "LLAMA_RQ_RECENT", "LLAMA_RQ_FIRST"]
    assert plain.environment() == dict.fromkeys(variables)
    assert not plain.layered and plain.ours and not parse_plan("q8_0").ours
    plan = parse_plan("iso3; 0-1, -1:q8_0; 5:iso4/iso3")
    assert plan.arguments() == ["-ctk", "iso3", "-ctv", "iso3", "--kv-layers", "0-1,-1:q8_0;5:iso4/iso3"]
    assert plan.environment()["LLAMA_RQ_LAYERS"] == "0-1,-1:q8_0;5:iso4/iso3"
    assert parse_plan("q8_0; 0:f16").ours, "layers apart take the patched llama.cpp"
    profiled = plain.with_profile(Path("m.gguf"))
    assert profiled.arguments() == [*plain.arguments(), "--kv-profile", "m.gguf"]
    assert profiled.environment() == {**plain.environment(), "LLAMA_RQ_PROFILE": "m.gguf"}
    assert profiled.name == plain.name and profiled.with_profile(None) == plain
    assert profiled.title == "iso3/planar4 +profile"


def test_what_is_usual() -> None:
    usual = parse_plan("iso3").as_usual()
    assert usual.title == "iso3 +profile +first1 +recent32" and usual.profile is Sought.AUTO
    assert parse_plan("q8_0/iso4").as_usual().title == "q8_0/iso4 +first1 +recent32"
    assert parse_plan("q8_0").as_usual() == parse_plan("q8_0") and not parse_plan("q8_0").as_usual().optional
    # tokens that were asked for may not be left out, nor those beside them
    plan = parse_plan("iso3")
    wishes = [(None, None), (0, None), (None, 0), (0, 0), (8, None), (None, 2)]
    found = [plan.with_wished(*wish) for wish in wishes]
    assert [(p.recent, p.first) for p in found] == [(32, 1), (0, 1), (32, 0), (0, 0), (8, 1), (32, 2)]
    assert [p.optional for p in found] == [True, True, True, False, False, False]
    assert not found[0].with_exact(32, 1).optional
    with pytest.raises(UsageError, match="the newest tokens are kept in f16 beside a quantized type"):
        parse_plan("f16").with_wished(8, None)
    beside = parse_plan("q4_0").with_wished(1024, None)
    assert beside.title == "q4_0 +recent1024" and not beside.optional
    assert beside.ours and not parse_plan("q4_0").ours, "it takes the patched llama.cpp"


def test_the_newest_tokens_are_arguments_bytes_and_no_part_of_the_name() -> None:
    @dataclass
    class Shape:
        k_layers: tuple[int, ...] = (256, 256)
        v_layers: tuple[int, ...] = (256, 256)
        k_heads: tuple[int, ...] = ()
        v_heads: tuple[int, ...] = ()

    plain = parse_plan("iso3; 0:q8_0")
    plan = plain.with_exact(32)
    assert plan.arguments() == [*plain.arguments(), "--kv-recent", "32"]
    assert plan.environment() == {**plain.environment(), "LLAMA_RQ_RECENT": "32"}
    assert plain.environment()["LLAMA_RQ_RECENT"] is None
    assert plan.name == plain.name and plan.with_exact(0) == plain
    both = plain.with_exact(32, 4)
    assert both.arguments() == [*plain.arguments(), "--kv-first", "4", "--kv-recent", "32"]
    assert both.environment() == {**plan.environment(), "LLAMA_RQ_FIRST": "4"}
    assert both.title == "iso3 +first4 +recent32; 0:q8_0" and both.name == plain.name
    token = 2 * 1024  # f16
    assert plain.recent_bytes(Shape(), 4096) == 0
    assert plan.recent_bytes(Shape(), 4096) == 33 * token
    assert plan.recent_bytes(Shape(), 4096, sequences=4) == 129 * token
    assert plan.recent_bytes(Shape(), 4096, sequences=4, streams=4) == 4 * 33 * token
    assert plan.recent_bytes(Shape(), 16) == 17 * token
    assert both.recent_bytes(Shape(), 4096) == 37 * token
    assert both.recent_bytes(Shape(), 4096, sequences=4, streams=2) == 2 * (2 * 36 + 1) * token
    assert plain.with_exact(0, 1).recent_bytes(Shape(), 4096) == 2 * token
    assert both.recent_bytes(Shape(), 16) == 17 * token
    assert not parse_plan("q8_0").rotated and parse_plan("q8_0; 1:f16/iso3").rotated


@pytest.mark.parametrize("text", ["q8_0/iso3", "f16; 0:q8_0", "f16; 0:f16/iso3"])
def test_a_profile_is_for_k_in_a_type_of_ours(text: str) -> None:
    with pytest.raises(UsageError, match=r"for K in a type of ours, and K is in (q8_0|f16)") as caught:
        parse_plan(text).with_profile(Path("m.gguf"))
    assert "without --kv-profile" in str(caught.value.remedy)
    assert parse_plan("f16; 0:iso3/f16").with_profile(Path("m.gguf")).file == Path("m.gguf")


def test_a_profile_that_was_not_looked_for_is_no_argument() -> None:
    with pytest.raises(AssertionError):
        parse_plan("iso3").with_profile(Sought.AUTO).arguments()


@pytest.mark.parametrize(
    ("text", "tokens", "says"),
    [
        ("bf16", 8, "beside a quantized type, and K and V are in bf16"),
        ("f16; 0:bf16", 8, "beside a quantized type, and K and V are in f16; 0:bf16"),
        ("iso3", 4097, "4097 newest tokens cannot be kept, 4,096 at most"),
        ("iso3", -1, "-1 newest tokens cannot be kept"),
    ],
)
def test_newest_tokens_that_cannot_be(text: str, tokens: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_plan(text).with_exact(tokens)
    with pytest.raises(UsageError, match=says.replace("newest", "first")):
        parse_plan(text).with_exact(0, tokens)


@pytest.mark.parametrize(
    ("recent", "first", "words"),
    [
        (0, 0, ""),
        (32, 0, "the newest 32 tokens"),
        (0, 1, "the first token"),
        (1024, 4, "the first 4 tokens and the newest 1,024"),
    ],
)
def test_tokens_in_f16_in_words(recent: int, first: int, words: str) -> None:
    assert exact_words(recent, first) == words

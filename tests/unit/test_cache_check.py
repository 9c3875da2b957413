"""Whether a cache was kept as asked for: on logs of real runs, and on what a log would say."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import gguf
import pytest

from ggufrq.cache.cases import Case, parse_case, parse_cases
from ggufrq.cache.kv import parse_plan
from ggufrq.drive import cache_check
from ggufrq.drive.cache_check import CacheError, check_context, mode_of
from ggufrq.ggufs.kv_shape import KvShape
from ggufrq.tools.logs import Context, KvCache, Metric, Rotation, parse_context

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"
MODEL = Path("model.gguf")
MIB = 1 << 20


@pytest.fixture
def ours() -> Context:
    """K in iso3, V in planar4, block rotations, four streams of 256 tokens."""
    context = parse_context((LOGS / "ppl-iso3-planar4.err.txt").read_text(encoding="utf-8"))
    assert context is not None
    return context


@pytest.fixture
def upstream() -> Context:
    """K in q8_0 and V in q4_0, both rotated by upstream."""
    context = parse_context((LOGS / "cli-ok.err.txt").read_text(encoding="utf-8"))
    assert context is not None
    return context


def test_as_asked(ours: Context, upstream: Context) -> None:
    size = check_context(parse_case("iso3/planar4:block"), ours, MODEL, None, 1024)
    assert size == 8 * 2 * 1024 * (50 + 66)
    assert check_context(parse_case("iso3/planar4"), ours, MODEL, None, None) == size
    assert mode_of(ours) == "block"
    assert check_context(parse_case("q8_0/q4_0"), upstream, MODEL, None, None)
    assert mode_of(upstream) == "hadamard"


@pytest.mark.parametrize(
    ("case", "tokens", "message"),
    [
        ("iso3", 1024, "did not keep the cache in iso3, but K in iso3 and V in planar4"),
        ("f16/planar4", 1024, "K in iso3"),
        ("iso3/planar4", 256, "a cache of 1024 tokens instead of 256"),
        ("iso3/planar4:full", 1024, "did not rotate K"),
        ("iso3/planar4:block/full", 1024, "did not rotate V"),
        ("iso3/planar4:block:norm", 1024, "scaled blocks as usual, although"),
        ("iso3/planar4; 0:q8_0", 1024, "did not keep the cache"),
    ],
)
def test_otherwise(ours: Context, case: str, tokens: int, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        check_context(parse_case(case), ours, MODEL, None, tokens)


def test_rotation_of_another_type_or_none(ours: Context) -> None:
    case = parse_case("iso3/planar4")
    other = {**ours.rotations, "K": Rotation("rotor3", "rotor", "block")}
    for rotations in (other, {"V": ours.rotations["V"]}):
        with pytest.raises(CacheError, match="did not rotate K"):
            check_context(case, dataclasses.replace(ours, rotations=rotations), MODEL, None, None)


def test_upstream_rotates_although_it_was_told_not_to(upstream: Context) -> None:
    with pytest.raises(CacheError, match="rotated K although q8_0/q4_0 none asks for no rotation"):
        check_context(parse_case("q8_0/q4_0:none"), upstream, MODEL, None, None)


def test_scale_by_the_norm_that_was_not_asked_for(ours: Context) -> None:
    with pytest.raises(CacheError, match="scaled blocks with norm, although iso3/planar4 was asked for"):
        check_context(parse_case("iso3/planar4"), dataclasses.replace(ours, scale="norm"), MODEL, None, None)


# What a log would say

SHAPE = KvShape(k_layers=(256,) * 4, v_layers=(256,) * 4)


def context(plan: str, tokens: int = 1024, base: str = "iso3") -> Context:
    """What the log says of a cache that is kept as ``plan`` says."""
    asked = parse_plan(plan)
    mib = round(asked.bytes_for(SHAPE, tokens) / MIB, 2)
    pairs = asked.resolve(4)
    cache = KvCache(tokens, 4, 1, 1, mib, base, base, mib / 2, mib / 2)
    layers = {"K": tuple(p.k.name for p in pairs), "V": tuple(p.v.name for p in pairs)}
    return Context((cache,), 0.0, {}, layers=layers if asked.layered else {})


@pytest.mark.parametrize(
    ("plan", "other"),
    [
        ("iso3; 0,-1:q8_0", "iso3; 0:q8_0"),
        ("iso3; 0,-1:q8_0", "iso3"),
        ("iso3", "iso3; 0:q8_0"),
        ("iso3; 1:iso3/iso4", "iso3; 1:iso4/iso3"),
    ],
)
def test_types_as_asked(plan: str, other: str) -> None:
    found = context(plan)
    assert cache_check.as_asked(found, parse_plan(plan))
    assert not cache_check.as_asked(found, parse_plan(other))


def test_another_spelling_of_the_same() -> None:
    assert cache_check.as_asked(context("iso3; 0,-1:q8_0"), parse_plan("iso3; 0-3:q8_0; 1-2:iso3"))


def test_a_profile_is_asked_for_or_not() -> None:
    metric = Metric("m-kv.gguf", "weights", 4096)
    without, with_it = context("iso3"), dataclasses.replace(context("iso3"), profile=metric)
    plan = parse_plan("iso3")
    asked = plan.with_profile(Path("m-kv.gguf"))
    assert cache_check.as_asked(with_it, asked) and not cache_check.as_asked(without, asked)
    assert cache_check.as_asked(without, plan) and not cache_check.as_asked(with_it, plan)
    assert not cache_check.as_asked(with_it, plan.with_profile(Path("other.gguf")))
    # a log that was read as UTF-8 does not have such a name as it is
    named = os.fsdecode(b"caf\xe9\xe2\x86-kv.gguf")
    read = dataclasses.replace(
        with_it, profile=Metric(os.fsencode(named).decode(errors="replace"), metric.source)
    )
    assert cache_check.as_asked(read, plan.with_profile(Path(named)))
    assert cache_check.found(with_it).endswith("V in iso3, by the profile m-kv.gguf")


def test_words() -> None:
    assert cache_check.found(context("iso3")) == "K in iso3 and V in iso3"
    assert cache_check.found(context("iso3; 0:q8_0/iso4")).startswith(
        "K in q8_0, iso3, iso3, iso3 by layers and V in"
    )


def test_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_check, "find_kv_shape", lambda _: SHAPE)
    model, plan = Path("m.gguf"), parse_plan("iso3; 0,-1:q8_0")
    found = context(plan.name)
    size = plan.bytes_for(SHAPE, 1024)
    assert cache_check.cache_bytes(found, plan, model) == size
    assert cache_check.f16_bytes(found, model) == 2 * 8 * 256 * 1024
    # a log that says otherwise
    assert cache_check.cache_bytes(context("iso3; 0:q8_0"), plan, model) is None
    assert cache_check.cache_bytes(context("iso3"), parse_plan("iso3"), model) == 8 * 256 * 1024 * 50 // 128


def test_models_whose_shape_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_check, "find_kv_shape", lambda _: None)
    plan = parse_plan("iso3; 0:q8_0")
    assert cache_check.cache_bytes(context(plan.name), plan, Path("m.gguf")) is None
    assert cache_check.f16_bytes(context(plan.name), Path("m.gguf")) is None


def test_the_newest_tokens_are_asked_for_or_not() -> None:
    without, with_them = context("iso3"), dataclasses.replace(context("iso3"), recent=32, recent_bytes=1000)
    plan = parse_plan("iso3")
    first = dataclasses.replace(with_them, first=1)
    assert cache_check.as_asked(first, plan.with_exact(32, 1))
    assert not cache_check.as_asked(first, plan.with_exact(32))
    assert not cache_check.as_asked(with_them, plan.with_exact(32, 1))
    assert cache_check.found(first).endswith("the first token and the newest 32 in f16")
    refused = dataclasses.replace(without, not_held="no flash attention")
    assert cache_check.found(refused).endswith("no tokens in f16: no flash attention")
    draft = dataclasses.replace(context("f16", base="f16"), not_held="neither has a rotated type")
    assert cache_check.found(draft) == "K in f16 and V in f16"
    assert cache_check.as_asked(with_them, plan.with_exact(32)) and not cache_check.as_asked(with_them, plan)
    assert cache_check.as_asked(without, plan) and not cache_check.as_asked(without, plan.with_exact(32))
    assert not cache_check.as_asked(with_them, plan.with_exact(16))
    assert "the newest 32 tokens in f16" in cache_check.found(with_them)
    size = cache_check.cache_bytes(without, plan, Path("m"))
    assert size is not None
    assert cache_check.cache_bytes(with_them, plan.with_exact(32), Path("m")) == size + 1000


def test_usual_tokens_that_are_not_held_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    held = dataclasses.replace(context("iso3"), recent=32, first=1)
    refused = dataclasses.replace(context("iso3"), not_held="layer 0 is on CUDA0")
    usual, asked = parse_plan("iso3").with_wished(None, None), parse_plan("iso3").with_exact(32, 1)
    assert cache_check.as_kept(held, usual).title == usual.title
    assert cache_check.as_kept(refused, asked).title == usual.title
    assert capsys.readouterr().err == ""
    assert cache_check.as_kept(refused, usual) == parse_plan("iso3")
    said = "the first token and the newest 32 are not kept in f16: layer 0 is on CUDA0\n"
    assert capsys.readouterr().err == said


def test_a_model_beside_whose_cache_none_are_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where an indexer chooses the keys. Where V is read from K they are."""
    cases, asked = parse_cases("iso3", None, None, None), parse_cases("iso3", None, 32, 1)
    numbers = {"block_count": 4, "attention.head_count": 4, "embedding_length": 512}
    indexer = {"head_count": 8, "key_length": 128, "top_k": 64}
    models = {
        "qwen4exp": {f"attention.indexer.{key}": value for key, value in indexer.items()},
        "deepseek2": {"attention.key_length": 576, "attention.key_length_mla": 192},
        "llama": {},
    }
    for arch, more in models.items():
        path = tmp_path / f"{arch}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        for key, value in (numbers | more).items():
            writer.add_uint32(f"{arch}.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        none = arch == "qwen4exp"
        kept = cache_check.held_cases(cases, path)
        assert [case.name for case in kept] == ["iso3" if none else "iso3 +first1 +recent32"]
        assert ("this model's kind of attention" in capsys.readouterr().err) is none
        assert cache_check.held_cases(asked, path) == asked


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        ({}, None),
        ({"profile": None}, r"in iso3 \+profile \+first1 \+recent32, but K in iso3 and V in iso3, the first"),
        ({"profile": Metric("x.gguf", "weights")}, "by the profile x.gguf"),
        ({"first": 0}, "the newest 32 tokens in f16"),
        ({"first": 2}, "the first 2 tokens and the newest 32 in f16"),
        ({"recent": 31}, "the first token and the newest 31 in f16"),
        ({"recent_bytes": 34 * 4096 - 1}, "take 139264 bytes; llama.cpp reports 139263"),
    ],
)
def test_planted_differences_in_a_run(planted: dict[str, Any], says: str | None) -> None:
    plan = parse_plan("iso3").with_profile(Path("m-kv.gguf")).with_exact(32, 1)
    rotations = {side: Rotation("iso3", "iso", "full") for side in "KV"}
    told = dataclasses.replace(
        context("iso3"), rotations=rotations, profile=Metric("m-kv.gguf", "weights"), recent=32, first=1,
        recent_bytes=34 * 4096,
    )  # fmt: skip
    told = dataclasses.replace(told, **planted)
    if says is None:
        size = plan.bytes_for(SHAPE, 1024) + 34 * 4096
        assert check_context(Case(plan), told, MODEL, SHAPE, 1024) == size
        return
    with pytest.raises(CacheError, match=says):
        check_context(Case(plan), told, MODEL, SHAPE, 1024)


def test_bits_are_those_of_the_blocks_that_there_are() -> None:
    """Of heads of 64, and of K alone where there is no V (MLA)."""

    def log(n: int, v_mib: float) -> str:
        sides = "".join(f"llama_rq: {s} iso3, rotation = iso, mode = full, n = {n}\n" for s in "KV")
        return (
            f"{sides}llama_kv_cache: size = 0.11 MiB ( 256 cells, 2 layers, 1/1 seqs), "
            f"K (iso3): 0.11 MiB, V (iso3): {v_mib:.2f} MiB\n"
        )

    for text, want in ((log(64, 0), 3.25), (log(64, 0.11), 3.25), (log(128, 0.11), 3.125)):
        context = parse_context(text)
        assert context is not None and cache_check.bits(context) == want


def test_the_keys_of_an_indexer_are_no_cache_of_k_and_v() -> None:
    """They stay in f16, whatever K and V are in."""
    line = (
        "llama_kv_cache: size = {} MiB ( 256 cells, 2 layers, 1/1 seqs), K ({}): {} MiB, V (iso4): 0.00 MiB\n"
    )
    text = "llama_kv_cache_dsa: creating main KV cache, size = 256 cells\n" + line.format(
        "0.14", "iso4", "0.14"
    )
    text += "llama_kv_cache_dsa: creating indexer KV cache, size = 256 cells\n" + line.format(
        "0.12", "f16", "0.12"
    )
    context = parse_context(text + line.format("0.14", "iso4", "0.14"))
    assert context is not None and context.k_types == {"iso4"} and len(context.caches) == 2
    assert context.index_mib == 0.12

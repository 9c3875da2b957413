from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ggufrq.base import table
from ggufrq.base.errors import UsageError
from ggufrq.cache.cases import Case, parse_case
from ggufrq.cache.kv import parse_plan
from ggufrq.flows import demo


def row(**changes: Any) -> dict[str, Any]:
    meta = {
        "llama_cpp": "0c1e57098bba43ac29e6e3b677cdceebdd22334f",
        "patch_set": "0123456789abcdef",
        "cpu": "Some Processor",
        "threads": 2,
        "weights": "Q8_0",
        "n_ctx": 1024,
        "chunks": 4,
        "prompt": 256,
        "generate": 32,
        "depth": 512,
        "base_command": "llama-perplexity -ctk f16",
        "commands": ["llama-perplexity -ctk iso3", "llama-bench -ctk iso3"],
    }
    values = {
        "model": "m",
        "type_k": "iso3",
        "type_v": "iso3",
        "mode": "full",
        "bits_per_value": 3.125,
        "cache_bytes": 6553600,
        "cache_tokens": 4096,
        "prefill_tps": 12345.67,
        "decode_tps": 987.6,
        "ppl": 22.123,
        "ppl_err": 0.5,
        "kld_mean": 0.00512,
        "kld_mean_err": 0.0001,
        "kld_p999": 0.1234,
        "same_top": 0.9123,
        "meta": meta,
    }
    return {**values, **changes}


def test_table() -> None:
    lines = demo.render(
        [
            row(
                type_k="f16",
                type_v="f16",
                mode="none",
                bits_per_value=16.0,
                cache_bytes=33554432,
                kld_mean=-1e-7,
            ),
            row(),
            row(mode="block"),
            row(type_v="planar4", bits_per_value=3.625),
        ]
    ).splitlines()
    assert lines[0].split() == [
        "cache",
        "bits",
        "bytes",
        "prefill",
        "decode",
        "PPL",
        "KLD",
        "99.9%",
        "top",
        "%",
    ]
    assert lines[1].split() == [
        "f16",
        "16",
        "33,554,432",
        "12,346",
        "988",
        "22.12",
        "0.00000",
        "0.1234",
        "91.2",
    ]
    assert lines[2].split() == [
        "iso3",
        "3.125",
        "6,553,600",
        "12,346",
        "988",
        "22.12",
        "0.00512",
        "0.1234",
        "91.2",
    ]
    assert lines[3].startswith("iso3 block ")
    assert lines[4].startswith("iso3/planar4 ")
    assert max(map(len, lines)) <= 80


def test_caption_says_what_was_done() -> None:
    text = demo.caption([row(), row()])
    flat = " ".join(text.split())
    for part in (
        "Weights Q8_0; Some Processor, 2 threads; llama.cpp 0c1e57098bba, patch set 0123456789ab",
        "bytes: of the cache for 4,096 tokens, from llama.cpp's log",
        "256 and 32 tokens behind 512",
        "4 chunks of 1,024 tokens (2,044 scored: PPL ± 2 %)",
        "K is quantized from the first token on in every row",
        "llama-perplexity -ctk f16",
        "llama-bench -ctk iso3",
    ):
        assert part in flat, part
    assert max(map(len, text.splitlines())) <= 80


def test_plan() -> None:
    usual = demo.plan()
    assert usual.models == ("docs-qwen3-8m", "docs-qwen3.5-8m")
    assert len(usual.cases) == 13 and usual.settings == demo.USUAL
    chosen = demo.plan("docs-qwen3-8m", "f16, iso3/planar4,iso3:block", quick=True, fresh=True)
    assert [case.name for case in chosen.cases] == ["f16", "iso3/planar4", "iso3 block"]
    assert (chosen.settings, chosen.fresh) == (demo.QUICK, True)


def test_case() -> None:
    assert parse_case("iso3:block") == Case(parse_plan("iso3"), "block")
    assert parse_case("iso3") == Case(parse_plan("iso3"))
    with pytest.raises(UsageError):
        parse_case("iso6:block")


def test_json_is_one_list(tmp_path: Path) -> None:
    demo.write_json(tmp_path / "t.json", {"a": [row(model="a")], "b": [row(model="b"), row(model="b")]})
    assert [entry["model"] for entry in json.loads((tmp_path / "t.json").read_text())] == ["a", "b", "b"]


def test_plain_tables() -> None:
    assert table.render(("a", "bb"), [("long", "1"), ("s", "22")], "lr") == "a     bb\nlong   1\ns     22"
    assert table.render(("a", ""), [("x", "")], "ll") == "a\nx"

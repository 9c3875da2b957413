"""What a model takes of memory, from metadata alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import hubs
import numpy as np
import pytest
from click.testing import CliRunner

from ggufrq.base import proc, sizes
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.cache.kv import Sought, parse_plan
from ggufrq.cli import cli
from ggufrq.cli import memory as command
from ggufrq.ggufs.header import TensorInfo, read_header
from ggufrq.ggufs.heads import Heads
from ggufrq.ggufs.kv_shape import find_kv_shape, kv_shape
from ggufrq.ggufs.memory_shape import MemoryShape, head_sizes, memory_shape
from ggufrq.memory.cells import (
    ContextSettings,
    exact_bytes,
    index_bytes,
    kv_bytes,
    profile_bytes,
    state_bytes,
)
from ggufrq.memory.compute import Buffers, estimate
from ggufrq.memory.estimate import Memory
from ggufrq.memory.told import published

fake = hubs.fake()

MIB = 1 << 20
QWEN35_27B: dict[str, Any] = {
    "block_count": 64,
    "context_length": 262144,
    "embedding_length": 5120,
    "feed_forward_length": 17408,
    "attention.head_count": 24,
    "attention.head_count_kv": 4,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 6144,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "vocab_size": 248320,
}
#: MiB of K and V at 8K, 32K, 128K and 262K by the arithmetic of the type's bits per value.
QWEN35_27B_TABLE = {
    "f16": (512, 2048, 8192, 16384),
    "q8_0": (272, 1088, 4352, 8704),
    "q4_0": (144, 576, 2304, 4608),
    "iso4": (132, 528, 2112, 4224),
    "iso3": (100, 400, 1600, 3200),
    "iso2": (68, 272, 1088, 2176),
}
DENSE: dict[str, Any] = {
    "block_count": 4,
    "context_length": 8192,
    "embedding_length": 512,
    "feed_forward_length": 1024,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": 1000,
}


WEIGHTS: dict[str, tuple[int, int]] = {"token_embd.weight": (10, 64)}


def model(
    path: Path,
    architecture: str,
    values: dict[str, Any],
    weights: dict[str, tuple[int, int]] = WEIGHTS,
    **more: Any,
) -> Path:
    """A GGUF of this architecture with these values, weights of these shapes, and nothing else."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (values | more).items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    for name, shape in weights.items():
        writer.add_tensor(name, np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shape_of(tmp_path: Path, architecture: str, values: dict[str, Any], **more: Any) -> MemoryShape:
    return memory_shape([read_header(model(tmp_path / "m.gguf", architecture, values, **more))])


def values(shape: MemoryShape) -> list[tuple[int, int]]:
    return [(layer.k, layer.v) for layer in shape.layers]


def test_numbers_of_tokens_and_sizes() -> None:
    texts = ("8K", "32k", "128K", "131K", "262K", "256K", "1M", "1000", "40K")
    assert [sizes.parse_tokens(text) for text in texts] == [
        8192,
        32768,
        131072,
        131072,
        262144,
        262144,
        1 << 20,
        1000,
        40960,
    ]
    assert sizes.parse_memory("24GB") == 24 * 10**9
    assert sizes.parse_memory("1.5 GiB") == 3 << 29
    for wrong in ("", "0", "8X", "-1", "1.5K"):
        with pytest.raises(UsageError):
            sizes.parse_tokens(wrong)
    for wrong in ("24", "GB", "0GB", "24B", "24iB", "0.1"):
        with pytest.raises(UsageError):
            sizes.parse_memory(wrong)


def test_the_table_of_qwen35_27b(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "qwen35", QWEN35_27B)
    for name, row in QWEN35_27B_TABLE.items():
        for ctx, mib in zip(("8K", "32K", "128K", "262K"), row, strict=True):
            settings = ContextSettings(sizes.parse_tokens(ctx))
            assert sum(kv_bytes(shape, parse_plan(name), settings)) == mib * MIB
    assert round(state_bytes(shape, ContextSettings(8192)) / MIB, 1) == 149.6
    assert state_bytes(shape, ContextSettings(8192, parallel=4)) == 4 * state_bytes(
        shape, ContextSettings(8192)
    )
    assert values(shape)[:4] == [(0, 0), (0, 0), (0, 0), (1024, 1024)]
    told = "\n".join(published(shape))
    for claim in ("10.3", "16 times", "110 GB", "57 GB", "30 GB", "23 GB"):
        assert claim in told
    assert "it is 17.2 GB" in told and "it is 28.6 GB" in told
    assert len(published(shape_of(tmp_path, "qwen3", DENSE))) == 2  # of the types alone


def test_a_head_for_further_tokens_is_no_part_of_the_context(tmp_path: Path) -> None:
    with_head = QWEN35_27B | {"block_count": 65, "nextn_predict_layers": 1}
    assert values(shape_of(tmp_path, "qwen35", with_head)) == values(shape_of(tmp_path, "qwen35", QWEN35_27B))


def test_dense_models(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "llama", DENSE)
    assert values(shape) == [(256, 256)] * 4
    assert (shape.native, shape.vocabulary, shape.weight_bytes) == (8192, 1000, 2 * 640)
    assert values(shape_of(tmp_path, "llama", DENSE, attention__head_count_kv=[1, 2, 4, 0])) == [
        (128, 128),
        (256, 256),
        (512, 512),
        (0, 0),
    ]
    plan = parse_plan("iso3; 0,-1:q8_0/f16")
    k, v = kv_bytes(shape, plan, ContextSettings(1000))  # padded to 1,024 cells
    assert k == 1024 * (2 * 256 * 50 // 128 + 2 * 256 * 34 // 32)
    assert v == 1024 * (2 * 256 * 50 // 128 + 2 * 256 * 2)
    assert sum(kv_bytes(shape, parse_plan("f16"), ContextSettings(1000, parallel=3))) == 3 * 512 * 4 * 1024


def test_compressed_models_keep_one_row_of_k(tmp_path: Path) -> None:
    mla = {
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
    }
    shape = shape_of(tmp_path, "deepseek2", DENSE | mla)
    assert values(shape) == [(576, 0)] * 4
    assert kv_bytes(shape, parse_plan("q8_0"), ContextSettings(4096)) == (4 * 4096 * 576 * 34 // 32, 0)
    assert kv_bytes(shape, parse_plan("iso3"), ContextSettings(4096)) == (4 * 4096 * 9 * 26, 0)
    usual = Memory(shape, 0).estimate(parse_plan("iso3").as_usual(), ContextSettings(4096))
    assert (usual.kv, usual.exact_tokens) == ("iso3 +first1 +recent32", 4 * 34 * 576 * 2)
    assert "cannot have different types" in str(Heads.of(shape).why_not(parse_plan("q8_0/f16")))
    assert "types of their own" in str(Heads.of(shape).why_not(parse_plan("f16; 0:q8_0")))
    assert Heads.of(shape).why_not(parse_plan("q4_0")) is None


@pytest.mark.parametrize(
    ("architecture", "more", "windows"),
    [
        ("gemma2", {}, [True, False, True, False]),
        ("gemma3", {"attention__sliding_window": 1024}, [True, True, True, True]),
        ("gemma3", {}, [False] * 4),
        ("gpt-oss", {"attention__sliding_window": 128}, [True, False, True, False]),
        ("cohere2moe", {"attention__sliding_window": 128}, [False, True, True, True]),
        ("llama4", {}, [True, True, True, False]),
        ("llama4", {"attention__sliding_window": 0}, [False] * 4),
        ("exaone4", {"attention__sliding_window": 128}, [False] * 4),
        (
            "gemma4",
            {"attention__sliding_window": 128, "attention__sliding_window_pattern": [1, 0, 0, 1]},
            [True, False, False, True],
        ),
        ("llama", {"attention__sliding_window": 128}, [False] * 4),
    ],
)
def test_windows(tmp_path: Path, architecture: str, more: dict[str, Any], windows: list[bool]) -> None:
    shape = shape_of(tmp_path, architecture, DENSE, **more)
    assert [layer.window for layer in shape.layers] == windows


def test_cells_of_a_window(tmp_path: Path) -> None:
    shape = shape_of(
        tmp_path,
        "gpt-oss",
        DENSE | {"attention.key_length_swa": 256},
        attention__sliding_window=128,
    )
    assert [layer.k for layer in shape.layers] == [512, 256, 512, 256]
    k, _ = kv_bytes(shape, parse_plan("f16"), ContextSettings(8192))
    assert k == 2 * (2 * 512 * 768 + 2 * 256 * 8192)  # 128 + 512 tokens, padded to 256
    k, _ = kv_bytes(shape, parse_plan("f16"), ContextSettings(512))
    assert k == 2 * (2 * 512 * 512 + 2 * 256 * 512)


def test_later_layers_share_the_cache_of_earlier_ones(tmp_path: Path) -> None:
    more = {"attention__sliding_window": 128, "attention__sliding_window_pattern": [1, 0, 1, 0]}
    shape = shape_of(tmp_path, "gemma4", DENSE, **more, attention__shared_kv_layers=2)
    assert values(shape) == [(256, 256)] * 2 + [(0, 0)] * 2


SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.group_count": 2}


@pytest.mark.parametrize(
    ("architecture", "more", "kept", "state"),
    [
        ("mamba", {}, 0, 4 * (3 * (512 + 64) + 16 * 512)),
        ("jamba", {"attention__head_count_kv": [0, 0, 2, 0]}, 1, 3 * (3 * (512 + 64) + 16 * 512)),
        ("falcon-h1", {}, 4, 4 * (3 * (512 + 64) + 16 * 512)),
        (
            "nemotron_h",
            {"attention__head_count_kv": [0, 2, 0, 0], "feed_forward_length": [0, 0, 64, 0]},
            1,
            2 * (3 * (512 + 64) + 16 * 512),
        ),
        ("kimi-linear", {"kda__head_dim": 64, "attention__head_count_kv": [0, 0, 0, 4]}, 1,
         3 * (3 * 3 * 4 * 64 + 64 * 64 * 4)),
        ("rwkv7", {"wkv__head_size": 64}, 0, 4 * (2 * 512 + 64 * 512)),
    ],
)  # fmt: skip
def test_recurrent_models(
    tmp_path: Path, architecture: str, more: dict[str, Any], kept: int, state: int
) -> None:
    shape = shape_of(tmp_path, architecture, DENSE | SSM, **more)
    assert (len(shape.cached), shape.state) == (kept, state)


INDEXER = {
    "attention.indexer.head_count": 8,
    "attention.indexer.key_length": 128,
    "attention.indexer.top_k": 64,
}


@pytest.mark.parametrize(
    ("architecture", "more", "index"),
    [
        ("deepseek32", {}, [128] * 4),
        ("glm-dsa", {}, [128] * 4),
        ("glm-dsa", {"context_length": 1 << 20, "block_count": 8}, [128, 128, 128, 0, 0, 0, 128, 0]),
        ("glm-dsa", {"attention.indexer.types": [1, 0, 0, 1]}, [128, 0, 0, 128]),
        ("hy_v4", {"attention.indexer.types": [1, 0, 1, 0]}, [128, 0, 128, 0]),
        ("hy_v4", {"attention.indexer.top_k": 0}, [0] * 4),
        ("minimax-m3", {"leading_dense_block_count": 1}, [0, 128, 128, 128]),
        ("qwen4exp", {}, [0, 0, 0, 128]),
        ("llama", {}, [0] * 4),
    ],
)
def test_the_keys_of_an_indexer(
    tmp_path: Path, architecture: str, more: dict[str, Any], index: list[int]
) -> None:
    """In f16 beside types of ours, and as K is otherwise; tests/cache/test_memory.py holds it to logs."""
    shape = shape_of(tmp_path, architecture, DENSE | INDEXER | more)
    assert [layer.index for layer in shape.layers] == index
    keys = sum(map(bool, index)) * 128
    spare = {"q8_0": 34 / 32, "iso3": 50 / 128} if architecture == "minimax-m3" else {}
    for kv, size in (("q8_0", 34 / 32), ("iso3", 2)):
        plan = parse_plan(kv)
        assert index_bytes(shape, plan, ContextSettings(512)) == 512 * keys * (size + spare.get(kv, 0))
        found = Memory(shape, 0).estimate(plan.as_usual(), ContextSettings(512))
        assert found.cache == found.k + found.v + found.index + found.exact_tokens + found.profile
        assert (found.exact_tokens > 0) == (keys == 0 and kv == "iso3"), "an indexer chooses among all keys"


def test_models_that_are_not_computed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="deepseek4 is not computed: it keeps compressed K") as caught:
        shape_of(tmp_path, "deepseek4", DENSE)
    assert "--kv q8_0" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="which layers have an indexer"):
        shape_of(tmp_path, "hy_v4", DENSE | INDEXER)
    with pytest.raises(ModelError, match=r"no llama\.block_count"):
        shape_of(tmp_path, "llama", {})
    with pytest.raises(ModelError, match="which layers have a window"):
        shape_of(tmp_path, "gemma4", DENSE, attention__sliding_window=128)
    assert shape_of(tmp_path, "bert", DENSE).cached == ()


def test_types_that_heads_cannot_hold(tmp_path: Path) -> None:
    narrow = shape_of(tmp_path, "llama", DENSE | {"attention.key_length": 96, "attention.value_length": 96})
    assert Heads.of(narrow).why_not(parse_plan("iso3")) is None
    assert Heads.of(narrow).why_not(parse_plan("iso4")) == (
        "iso4 takes 5.50 bits a value in heads of K with 96, which are filled up to 128; "
        "q8_0 or q4_0 or iso3 can be used"
    )
    assert "heads of V" in str(Heads.of(narrow).why_not(parse_plan("f16/iso4")))
    assert kv_bytes(narrow, parse_plan("iso3"), ContextSettings(4096)) == (4 * 4096 * 2 * 50,) * 2
    latent = {"attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192}
    mla = shape_of(tmp_path, "deepseek2", DENSE | latent | {"attention.head_count_kv": 1})
    assert all(Heads.of(mla).why_not(parse_plan("iso3"), gpu=gpu) is None for gpu in (False, True))
    assert kv_bytes(mla, parse_plan("iso3"), ContextSettings(4096)) == (4 * 4096 * 9 * 26, 0)
    assert "iso5 is for the CPU alone" in str(Heads.of(mla).why_not(parse_plan("iso5"), gpu=True))
    other = shape_of(tmp_path, "deepseek2", DENSE | latent | {"attention.key_length": 608})
    said = str(Heads.of(other).why_not(parse_plan("iso3")))
    assert "blocks of 64 or 128 values, which heads of K with 608" in said
    assert said.endswith("q8_0 or q4_0 can be used"), "heads are not filled up where V is read from K"
    for sides in ((64, 64), (192, 128), (320, 64)):
        lengths = dict(zip(("attention.key_length", "attention.value_length"), sides, strict=True))
        shape = shape_of(tmp_path, "llama", DENSE | lengths)
        assert all(Heads.of(shape).why_not(parse_plan("iso3"), gpu=gpu) is None for gpu in (False, True))
        k, v = kv_bytes(shape, parse_plan("iso3"), ContextSettings(4096))
        rows = [2 * n // 64 * 26 if n % 128 else 2 * n // 128 * 50 for n in sides]
        assert [k, v] == [4 * 4096 * row for row in rows]
    wide = shape_of(tmp_path, "llama", DENSE)
    assert Heads.of(wide).why_not(parse_plan("iso5")) is None
    for kv in ("iso5", "iso3/planar5", "iso3; 0:rotor5"):
        said = str(Heads.of(wide).why_not(parse_plan(kv), gpu=True))
        assert "5 is for the CPU alone; q8_0 or q4_0 or" in said and said.endswith("4 can be used")
    odd = shape_of(tmp_path, "llama", DENSE | {"attention.key_length": 80, "attention.value_length": 80})
    assert str(Heads.of(odd).why_not(parse_plan("q8_0"))).endswith("f16 can be used")
    assert "there is no layer 4" in str(Heads.of(narrow).why_not(parse_plan("f16; 4:q8_0")))


def test_the_largest_context(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "llama", DENSE)
    memory = Memory(shape, 10 * MIB)
    plan = parse_plan("f16")
    need = memory.estimate(plan, ContextSettings(2048)).total
    fit = memory.fit(plan, need)
    assert fit.estimate is not None and (fit.estimate.ctx, fit.native) == (2048, False)
    fit = memory.fit(plan, need - 1)
    assert fit.estimate is not None and fit.estimate.ctx == 2048 - 256
    fit = memory.fit(plan, 1 << 40)
    assert fit.estimate is not None and (fit.estimate.ctx, fit.native) == (8192, True)
    fit = memory.fit(plan, 1 << 40, parallel=3)
    assert fit.estimate is not None and fit.estimate.ctx == 3 * 8192
    assert memory.fit(plan, 10 * MIB).estimate is None
    narrow = shape_of(tmp_path, "llama", DENSE | {"attention.key_length": 96})
    assert "filled up to 128" in str(Memory(narrow, 0).fit(parse_plan("iso4"), 1 << 40).why_not)


def test_the_estimate_of_compute_buffers_has_masks_and_logits(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "llama", DENSE)
    plan = parse_plan("f16")
    small, large = estimate(shape, plan, ContextSettings(2048)), estimate(shape, plan, ContextSettings(4096))
    assert large.served - small.served == 2048 * 512 * 2
    assert estimate(shape, plan, ContextSettings(4096, parallel=2)).served == small.served
    words = shape_of(tmp_path, "llama", DENSE | {"vocab_size": 100_000})
    assert estimate(words, plan, ContextSettings(2048)).batch == 512 * 4 * (100_000 + 2 * 512)
    assert not small.exact


def test_the_simple_shape(tmp_path: Path) -> None:
    shape = kv_shape(model(tmp_path / "m.gguf", "llama", DENSE))
    assert (shape.k_layers, shape.k_values, shape.v_values, shape.layers) == ((256,) * 4, 1024, 1024, 4)
    assert parse_plan("iso3").bytes_for(shape, 1024) == 2048 * 1024 * 50 // 128
    assert shape.bits_for(parse_plan("iso3").bytes_for(shape, 1024), 1024) == 3.125
    assert shape.bits_for(parse_plan("iso2/rotor4").bytes_for(shape, 4096), 4096) == 3.125
    assert kv_shape(model(tmp_path / "m.gguf", "qwen35", QWEN35_27B)).v_layers == (1024,) * 16
    for architecture, more in (
        ("gemma2", {}),
        ("bert", {}),
        ("deepseek2", {"attention__key_length_mla": 192}),
    ):
        path = model(tmp_path / "m.gguf", architecture, DENSE, **more)
        with pytest.raises(ModelError, match="not simply K and V"):
            kv_shape(path)
        assert find_kv_shape(path) is None


def test_one_reading_of_head_sizes(tmp_path: Path) -> None:
    def sizes(architecture: str, **more: Any) -> tuple[int, ...]:
        return head_sizes(read_header(model(tmp_path / "m.gguf", architecture, DENSE, **more)).values)

    assert sizes("llama") == (128,)
    assert sizes("llama", attention__key_length=192) == (192, 128)
    windows = {"attention__sliding_window": 128, "attention__sliding_window_pattern": [True, False] * 2}
    assert sizes("gemma4", **windows, attention__key_length_swa=64, attention__value_length_swa=256) == (
        64, 128, 256,
    )  # fmt: skip
    assert head_sizes({"general.architecture": "llama"}) == ()


def test_what_is_kept_beside_k_and_v(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "llama", DENSE)  # 4 layers, 2 heads of 128
    row = 2 * 4 * 2 * 256  # K and V of a token in f16
    plan = parse_plan("iso3").with_exact(32, 1)
    assert exact_bytes(shape, plan, ContextSettings(4096)) == plan.recent_bytes(shape, 4096) == 34 * row
    assert exact_bytes(shape, plan, ContextSettings(4096, parallel=4)) == 4 * 34 * row
    assert profile_bytes(shape, plan) == 0
    profiled = plan.with_profile(Sought.AUTO)
    maps = 2 * 2 * 128 * 128  # values of one layer
    assert profile_bytes(shape, profiled) == 4 * (2 * maps + 4 * 2 * 128)
    mixed = parse_plan("f16; 1:iso3").with_profile(Sought.AUTO)
    assert profile_bytes(shape, mixed) == profile_bytes(shape, profiled) + 3 * 2 * maps
    memory = Memory(shape, 1000)
    plain, more = (memory.estimate(p, ContextSettings(4096)) for p in (parse_plan("iso3"), profiled))
    assert more.total - plain.total == more.exact_tokens + more.profile == more.cache - plain.cache > 0
    assert (plain.kv, more.kv) == ("iso3", "iso3 +profile +first1 +recent32")
    windows = {"attention__sliding_window": 128, "attention__sliding_window_pattern": [True, False] * 2}
    swa = shape_of(tmp_path, "gemma4", DENSE, **windows)
    assert (
        exact_bytes(swa, parse_plan("iso3").with_exact(1000), ContextSettings(4096))
        == (769 + 1001) * row // 2
    )


def test_the_plan_and_the_estimate_count_the_same_bytes(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "llama", DENSE)
    for text in ("f16", "iso3/q8_0", "iso3; 0,-1:q8_0/iso4"):
        plan, settings = parse_plan(text), ContextSettings(2048)
        assert sum(kv_bytes(shape, plan, settings)) == plan.bytes_for(shape, 2048)


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(command, "usable_build", lambda: None)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["memory", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.usefixtures("no_build", "no_programs")
def test_the_command_without_a_build(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", "qwen35", QWEN35_27B)
    data = json.loads(run(str(path), "--ctx", "8K,262K", "--kv", "f16,iso3", "--json"))
    assert [(row["kv"], row["ctx"], (row["k"] + row["v"]) // MIB) for row in data["rows"]] == [
        ("f16", 8192, 512),
        ("f16", 262144, 16384),
        ("iso3 +profile +first1 +recent32", 8192, 100),
        ("iso3 +profile +first1 +recent32", 262144, 3200),
    ]
    assert all((row["exact_tokens"] > 0) == (row["kv"] != "f16") for row in data["rows"])
    assert not any(row["exact"] for row in data["rows"])
    assert all(row["total"] > row["k"] + row["v"] + row["state"] + data["weights"] for row in data["rows"])
    text = run(str(path), "--why", "--kv", "f16,iso3", "--ctx", "262K,512K")
    assert "recurrent state 149.6 MiB per sequence" in text
    assert "16,384" in text and "estimated (~)" in text and "beyond the model's own" in text
    assert "110 GB: it is 17.2 GB" in text
    assert "16 layers x (1,024 values of K + 1,024 of V)" in text
    text = run(str(path), "--fits", "6GB", "--kv", "f16,iso3")
    assert "the model's own context" in text and "in 5,722 MiB (6.00 GB)" in text


@pytest.mark.usefixtures("no_build", "no_programs")
def test_two_memories(tmp_path: Path) -> None:
    names = ("token_embd", *(f"blk.{i}.{part}" for i in range(4) for part in ("attn_q", "ffn_up")))
    weights = {f"{name}.weight": (512, 512) for name in names}
    path = model(tmp_path / "m.gguf", "llama", DENSE, weights)
    tensor = 512 * 512 * 2
    data = json.loads(run(str(path), "--ctx", "4K", "--kv", "f16", "--json"))
    beside = data["rows"][0]["total"] - 9 * tensor
    arguments = [str(path), "--ctx", "4K", "--kv", "f16"]
    room = f"{(beside + 7 * tensor) / 1e9:.9f}GB"
    data = json.loads(run(*arguments, "--vram", room, "--ram", "1GB", "--json"))
    placed = data["places"][0]["placement"]
    assert (placed["layers"], placed["vram"], placed["ram"]) == (2, 7 * tensor, 3 * tensor)
    text = run(*arguments, "--vram", room)
    assert "--n-cpu-ffn 2 is\n    --override-tensor 'blk\\.(0|1)\\.ffn_(up|down|gate)\\.=CPU'" in text
    assert "does not fit" in run(*arguments, "--vram", room, "--ram", "0.001GB")
    assert "all of it on the GPU" in run(*arguments, "--vram", "24GB")
    for wrong in (["--ram", "1GB"], ["--vram", "1GB", "--fits", "1GB"]):
        assert isinstance(CliRunner().invoke(cli, ["memory", str(path), *wrong]).exception, UsageError)


@pytest.mark.usefixtures("no_build", "no_programs")
def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    """What all rotated types have beside them is told once; where they differ, in each row."""
    path = model(tmp_path / "m.gguf", "llama", DENSE)
    text = run(str(path), "--kv", "f16,iso3,iso4", "--ctx", "8K,128K")
    rows = [line.split()[0] for line in text.splitlines() if line.startswith(("f16", "iso"))]
    assert rows == ["f16", "f16", "iso3", "iso3", "iso4", "iso4"] and "iso3 +" not in text
    assert "\nrotated types with +profile +first1 +recent32, as run and serve keep them\n" in text
    assert max(map(len, text.splitlines())) <= 80
    text = run(str(path), "--kv", "iso3,iso3+plain", "--ctx", "8K")
    assert "\niso3 +profile +first1 +recent32 " in text and "rotated types with" not in text


@pytest.mark.usefixtures("no_build", "no_programs")
def test_sentences_stand_for_numbers_that_there_are_not(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", "llama", DENSE | {"attention.key_length": 96})
    text = run(str(path), "--kv", "q8_0,iso4", "--ctx", "4K")
    assert "iso4 +profile +first1 +recent32: iso4 takes 5.50 bits a value in heads of K with 96" in text
    data = json.loads(run(str(path), "--kv", "iso4", "--ctx", "4K", "--json", "--fits", "1GB"))
    assert data["rows"][0]["total"] is None and data["fits"][0]["ctx"] is None


def test_of_a_model_on_the_hub_only_the_header_is_fetched(tmp_path: Path) -> None:
    """In a process of its own: the endpoint is read on import."""
    whole = model(tmp_path / "m.gguf", "qwen35", QWEN35_27B).read_bytes() + bytes(40 * MIB)
    with fake.fake_hub({"me/it-GGUF": {"it-Q8_0.gguf": whole, "README.md": b""}}) as hub:
        env = hubs.environment(hub.url, tmp_path / "hf", token=None)
        for name in ("me/it-GGUF", "me/it-GGUF:Q8_0"):
            hub.sent = 0
            command = [sys.executable, "-m", "ggufrq", "memory", name]
            done = proc.run([*command, "--ctx", "8K", "--kv", "iso3", "--json"], env=env, timeout=120)
            data = json.loads(done.stdout)
            assert data["model"] == f"it-Q8_0.gguf of me/it-GGUF at {fake.SHA[:12]}"
            assert data["rows"][0]["k"] == 50 * MIB
            assert hub.sent < 5 * MIB


def test_what_llama_cpp_cannot_say_is_estimated(tmp_path: Path) -> None:
    from ggufrq.base.errors import ToolError

    shape = shape_of(tmp_path, "llama", DENSE)

    def refuse(*_: object) -> Buffers:
        raise ToolError("no")

    assert not Memory(shape, 0, refuse).estimate(parse_plan("f16"), ContextSettings(512)).exact
    dry = Memory(shape, 0, lambda *_: Buffers(5, 9, exact=True)).estimate(
        parse_plan("f16"), ContextSettings(512)
    )
    assert (dry.compute, dry.batch_extra, dry.exact) == (5, 4, True)


def test_all_shards_count(tmp_path: Path) -> None:
    header = read_header(model(tmp_path / "m.gguf", "llama", DENSE))
    assert memory_shape([header, header]).weight_bytes == 2 * memory_shape([header]).weight_bytes


def test_a_scalar_is_a_row_of_one(tmp_path: Path) -> None:
    header = read_header(model(tmp_path / "m.gguf", "llama", DENSE))
    scalar = TensorInfo("scale", (), 1, 0)  # in f16
    more = replace(header, tensors=(*header.tensors, scalar))
    assert memory_shape([more]).weight_bytes == memory_shape([header]).weight_bytes + 2


@pytest.mark.parametrize("more", [{}, {"attention.key_length": 128, "attention.value_length": 128}])
def test_a_first_layer_without_attention_does_not_stand_for_all(tmp_path: Path, more: dict[str, int]) -> None:
    heads = {"attention.head_count": [0, 4], "attention.head_count_kv": [0, 2], "block_count": 2}
    shape = shape_of(tmp_path, "llama", DENSE | heads | more)
    assert values(shape) == [(0, 0), (256, 256)]
    assert len(shape.cached) == 1

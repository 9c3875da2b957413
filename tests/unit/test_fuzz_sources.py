"""What a model comes from, in forms that nobody thought of: the answer is a sound result or one clear error.

A longer run: GGUFRQ_FUZZ=20000 pytest tests/unit/test_fuzz_sources.py --hypothesis-seed=1
"""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggufrq.base import log
from ggufrq.base.errors import GgufrqError, ModelError
from ggufrq.ggufs import imatrix, values
from ggufrq.ggufs.files import read_model
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.imatrix import Entry, Matrix
from ggufrq.ggufs.memory_shape import memory_shape
from ggufrq.make import mix
from ggufrq.models import convert, view

COUNT = int(os.environ.get("GGUFRQ_FUZZ", "60"))
fuzz = settings(
    max_examples=COUNT,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def silent() -> None:
    log.set_up(quiet=True, command=[])


# Importance matrices

MEANS = st.one_of(
    st.just(0.0),
    st.floats(0, 1e4, width=32),
    st.sampled_from([1e-45, 1e-38, 1e-30, 1e-12, 1e12, 1e19, 1e21, 3e38, float("inf"), float("nan"), -1.0]),
)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    experts, columns = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    sums = draw(st.lists(MEANS, min_size=experts * columns, max_size=experts * columns))
    counted = draw(st.sampled_from([1, experts]))
    counts = draw(
        st.lists(
            st.sampled_from([0.0, 1.0, 512.0, 1e-30, float("inf"), float("nan"), -1.0]),
            min_size=counted,
            max_size=counted,
        )
    )
    return Entry(np.array(sums, np.float32).reshape(experts, columns), np.array(counts, np.float32))


@fuzz
@given(st.lists(entries(), min_size=1, max_size=3), st.integers(1, 3))
def test_what_is_taken_of_a_matrix_weighs_every_column(found: list[Entry], times: int) -> None:
    """As llama-quantize reads it, no weight is zero, or no number."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        imatrix.write(Matrix({f"blk.{i}.a.weight": e for i, e in enumerate(found)}, (), 1, 512), path)
        try:
            whole = imatrix.merge([imatrix.read(path)] * times, ["m"] * times)
        except ModelError:
            return
        usable, told = imatrix.mended(whole)
        imatrix.write(usable, path)
        again = imatrix.read(path)
    for name, entry in again.entries.items():
        for expert, sums in enumerate(entry.sums):
            count = entry.counts[expert % len(entry.counts)]
            weights = sums / count if count > 0 else np.ones_like(sums)
            assert np.isfinite(weights).all() and (weights > 0).all(), (name, weights)
    changed = {line.partition(":")[0] for line in told}
    for name, entry in whole.entries.items():
        same = np.array_equal(entry.sums, again.entries[name].sums)
        assert same or name in changed
    assert imatrix.mended(again)[1] == ()


# Folders with safetensors

NAMES = ["model.safetensors", "model_old.safetensors", "adapter_model.safetensors", "x.safetensors"]
NAMES += [f"model-{i:05d}-of-{n:05d}.safetensors" for n in (1, 2, 3) for i in range(1, n + 1)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    files = draw(st.lists(st.sampled_from(NAMES), max_size=5, unique=True))
    tensors = {
        name: draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3, unique=True)) for name in files
    }
    index: Any = draw(
        st.none()
        | JSON
        | st.dictionaries(
            st.sampled_from("abcdef"), st.sampled_from([*NAMES, "../model.safetensors"]), max_size=6
        )
    )
    return {"tensors": tensors, "index": index, "damage": draw(st.sampled_from(["", "cut", "bytes", "page"]))}


@fuzz
@given(folders(), st.randoms(use_true_random=False))
def test_a_folder_is_one_model_or_refused(plan: dict[str, Any], rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        for name, tensors in plan["tensors"].items():
            header = {
                t: {"dtype": "U8", "shape": [4], "data_offsets": [4 * i, 4 * i + 4]}
                for i, t in enumerate(tensors)
            }
            text = json.dumps(header).encode()
            data = bytearray(struct.pack("<Q", len(text)) + text + bytes(4 * len(tensors)))
            if plan["damage"] == "cut":
                data = data[: rng.randrange(len(data))]
            elif plan["damage"] == "bytes":
                data[rng.randrange(len(data))] = rng.randrange(256)
            elif plan["damage"] == "page":
                data = bytearray(b"<html></html>")
            (folder / name).write_bytes(data)
        if plan["index"] is not None:
            (folder / view.INDEX).write_text(json.dumps({"weight_map": plan["index"]}))
        try:
            found = convert.inspect(folder)
        except ModelError:
            return
        there = set(plan["tensors"])
        assert set(found.weights.files) <= there
        listed = found.weights.listed
        if listed:
            assert set(listed) <= set(found.tensors) and set(found.weights.files) == set(listed.values())
        elif view.SINGLE in there:
            assert found.weights.files == (view.SINGLE,)
        else:
            assert len({name.rpartition("-of-")[2] for name in found.weights.files}) == 1
        with view.view("m", found.content) as seen:
            weights = {path.name for path in seen.glob("*.safetensors")}
            assert weights == set(found.weights.files)
            assert (seen / view.INDEX).exists() is bool(listed)


# READMEs

HEADS = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(str.encode),
    st.dictionaries(
        st.sampled_from(["license", "tags", "language", "base_model", "author", "version", "datasets"]), JSON
    ).map(lambda head: yaml.safe_dump(head).encode()),
    st.sampled_from(
        [b"base_model: a: b", b"- no", b"a: [", b"x: !!python/object:os.system", b"d: 2024-99-99"]
    ),
)


@fuzz
@given(HEADS, st.sampled_from([b"", b"\xef\xbb\xbf"]), st.sampled_from([b"\n", b"\r\n"]))
def test_a_readme_is_taken_as_far_as_it_is_text(head: bytes, mark: bytes, end: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "README.md").write_bytes(mark + end.join([b"---", head, b"---", b"Text."]))
        made = view._card_head(Path(place))
    if made is None:
        return
    found = yaml.safe_load(made.decode().removeprefix("---\n").removesuffix("---\n"))
    for value in (found or {}).values():
        assert isinstance(value, str) or all(isinstance(item, str) for item in value)


# Chat templates, against transformers

PARTS = st.sampled_from(
    [
        "{{ bos_token }}",
        "{% if tools %}{{ tools | tojson }}{% endif %}",
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
        "{%- for m in messages -%}{% generation %}{{ m.content }}{% endgeneration %}{%- endfor -%}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages | length) }}",
        "{{ raise_exception('refused') }}",
        "{{ undefined.x }}",
        "{{ messages[0].content.split()[0] }}",
        "{% if add_generation_prompt %}more{% else %}no more{% endif %}",
        "{% if documents is none %}none{% endif %}{{ eos_token is defined }}",
        "{{ dict(a=1) | tojson(ensure_ascii=False, separators=(',', ':')) }}",
        "  {# a comment #}  \n  text  \n",
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}",
        "{% do messages.append(1) %}",
        "{% if %}",
    ]
)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": WORDS}),
    min_size=1,
    max_size=3,
)


@fuzz
@given(st.lists(PARTS, max_size=4).map("".join), TURNS, st.booleans())
def test_templates_give_what_transformers_gives(
    template: str, messages: list[dict[str, str]], with_tools: bool
) -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [{"type": "function", "function": {"name": "f", "description": "é <b>"}}] if with_tools else None
    template += "{# tool_calls #}"
    metadata = {
        "tokenizer.chat_template": template,
        "tokenizer.ggml.tokens": ("<a>", "<s>"),
        "tokenizer.ggml.bos_token_id": 1,
    }
    conversation = {"messages": messages} | ({"tools": tools} if tools else {})
    ours = mix.renderer(metadata)(conversation)
    try:
        (theirs,), _ = transformers.render_jinja_template(
            [messages], tools=tools, chat_template=template, bos_token="<s>"
        )
    except Exception:
        assert ours == mix.chatml(conversation)
        return
    assert ours == theirs if theirs.strip() else ours.strip()  # one that writes nothing is not taken


# GGUF files by a writer that makes mistakes


def written(path: Path, rng: random.Random) -> None:
    writer = gguf.GGUFWriter(path, rng.choice(["llama", "qwen3", "x", ""]))
    alignment = rng.choice([None, 8, 32, 64, 4096])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    heads = rng.choice([4, [0, 2], [4, 4]])
    for key, value in (("block_count", 2), ("embedding_length", 64), ("context_length", 128)):
        writer.add_uint32(f"llama.{key}", value)
    if isinstance(heads, list):
        writer.add_array("llama.attention.head_count", heads)
    else:
        writer.add_uint32("llama.attention.head_count", heads)
    for i in range(rng.randrange(4)):
        kind = rng.choice(["F32", "F16", "BF16", "Q8_0", "Q4_K"])
        array = np.random.default_rng(i).standard_normal((4, 256)).astype(np.float32)
        if rng.random() < 0.2:
            array[1, 3] = rng.choice([np.nan, np.inf])
        if kind == "Q4_K":
            raw = np.zeros((4, 144), np.uint8)
        else:
            with np.errstate(all="ignore"):
                raw = gguf.quantize(array, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"blk.{i}.attn_q.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@fuzz
@given(st.randoms(use_true_random=False), st.integers(0, 3))
def test_a_gguf_is_read_or_refused(rng: random.Random, mutations: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "m.gguf"
        written(path, rng)
        data = bytearray(path.read_bytes())
        end = min(len(data), 900)
        for _ in range(mutations):
            at = rng.randrange(end)
            what = rng.randrange(5)
            if what == 0:
                data[at] = rng.randrange(256)
            elif what == 1:
                data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
            elif what == 2:
                del data[at : at + rng.randrange(1, 9)]
            elif what == 3:
                data[at:at] = bytes(rng.randrange(1, 9))
            else:
                data = data[: rng.randrange(1, len(data) + 1)]
                end = min(len(data), 900)
        path.write_bytes(data)
        for ask in (
            lambda: read_model(path),
            lambda: values.first_odd(path),
            lambda: list(values.losses(path, path)),
            lambda: memory_shape([read_header(path)]),
            lambda: imatrix.read(path),
        ):
            try:
                ask()
            except GgufrqError as error:
                assert error.message.strip()

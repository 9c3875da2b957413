"""The factory's parts that need no llama.cpp."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from filelock import FileLock, Timeout

from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError, ModelError, UsageError
from ggufrq.base.sizes import parse_size
from ggufrq.build.project import Build
from ggufrq.cli.quantize import chosen
from ggufrq.cli.quantize_plan import plan_as_json, refuse_what_does_not_fit, render_plan, render_tensors
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.tensors import Inventory, Tensor
from ggufrq.make import family as quantize
from ggufrq.make import matrix, quantizer, recipe
from ggufrq.make.plan import Conversion, FamilyPlan, Output, Request, Want, needs_imatrix
from ggufrq.make.quantizer import Forecast, Job
from ggufrq.make.record import Record
from ggufrq.make.work import Work
from ggufrq.tools import quantize as tool
from ggufrq.tools.logs import Incomplete

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"


# Families and what is asked for


def test_families_name_what_there_is() -> None:
    known = tool.parse_types((LOGS / "quantize-help.txt").read_text(encoding="utf-8"))
    assert set(quantize.families()) == {"default", "small", "full"}
    for family in quantize.families().values():
        assert family.description
        for name in family.types:
            assert known.get(name) == name or name in recipe.shipped()


def test_what_is_asked_for() -> None:
    assert chosen(None, None, ()) == list(quantize.DEFAULT_TYPES)
    both = chosen("Q8_0, Q4_0", None, ("proposal-c",))
    assert both == ["Q8_0", "Q4_0", recipe.load("proposal-c")]
    for name, told in (("Q8_0", "there is no recipe 'Q8_0'"), ("my/x.toml", "there is no file 'my/x.toml'")):
        with pytest.raises(UsageError, match=told) as caught:
            chosen(None, None, (name,))
        assert str(caught.value.remedy).startswith("one of proposal-c, unsloth-dynamic, or a .toml file")
    assert chosen("Q8_0", "small", ()) == [*quantize.families()["small"].types, "Q8_0"]
    with pytest.raises(UsageError, match="names no type"):
        chosen(" ,", None, ())


def test_who_needs_a_matrix() -> None:
    assert all(needs_imatrix(name) for name in ("IQ2_M", "Q2_K", "Q3_K_M", "iq3_s", "q3_k"))
    assert not any(needs_imatrix(name) for name in ("IQ4_XS", "Q4_K_M", "Q8_0", "bf16"))
    assert needs_imatrix({"a": "q8_0", "b": "q3_k"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5G", 5 * 10**9),
        ("1.5GB", 15 * 10**8),
        (" 500m ", 5 * 10**8),
        ("6048640", 6048640),
        ("2000kb", 2 * 10**6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "5", "999999", "G", "-1G", "0G", "5T", "0.5M", "5GiB", "5 GB/s", "5000000i"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size of a file"):
        parse_size(text)


# llama-quantize


def test_tensors_of_a_dry_run() -> None:
    text = (LOGS / "quantize-dry-run.txt").read_text(encoding="utf-8")
    lines = tool.parse_tensors(text)
    assert len(lines) == 90
    by_name = {line.name: line for line in lines}
    assert by_name["token_embd.weight"] == tool.TensorLine("token_embd.weight", (256, 4096), "bf16", "q6_k")
    assert by_name["output_norm.weight"] == tool.TensorLine("output_norm.weight", (256,), "f32", "f32")
    with pytest.raises(Incomplete, match="listed 89 of 90"):
        tool.parse_tensors(text.replace("blk.3.ffn_up.weight ", "", 1))
    with pytest.raises(Incomplete):
        tool.parse_tensors("")


def test_each_tensor_matches_its_own_line_alone() -> None:
    names = [
        "blk.1.ffn_up.weight",
        "blk.11.ffn_up.weight",
        "blk.1.ffn_up_exps.weight",
        "output.weight",
        "A.b",
    ]
    lines = tool.tensor_type_lines(dict.fromkeys(names, "q8_0")).split()
    patterns = [line.rpartition("=")[0] for line in lines]
    assert all(line.endswith("=q8_0") and line == line.lower() for line in lines)
    for i, name in enumerate(names):
        assert [bool(re.search(pattern, name)) for pattern in patterns] == [j == i for j in range(len(names))]
    assert not re.search(patterns[0], "blkx1xffn_up.weight")


def test_label_is_the_type_of_most_weights() -> None:
    values = {"a": 10, "b": 4, "c": 4}
    assert quantizer.label({"a": "bf16", "b": "q5_k", "c": "q8_0"}, values) == "Q8_0"
    assert quantizer.label({"a": "q3_k", "b": "q5_k", "c": "q5_k"}, values) == "Q3_K_M"
    with pytest.raises(UsageError, match="quantizes no tensor"):
        quantizer.label({"a": "bf16", "b": "f32"}, values)


# Importance matrices


MODEL = Inventory(
    "qwen3",
    (
        Tensor("token_embd.weight", (64, 32), "bf16", True),
        Tensor("blk.0.ffn_up_exps.weight", (64, 32, 4), "bf16", True),
        Tensor("output_norm.weight", (64,), "f32", False),
    ),
)


def write_matrix(path: Path, shapes: dict[str, tuple[int, ...]], kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.in_sum2", np.ones(shape, np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((shape[0], 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_matrix_of_this_model(tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "m.gguf", {"blk.0.ffn_up_exps.weight": (4, 64)})
    matrix.check(path, MODEL)
    made = matrix.stand_in(tmp_path / "s.gguf", [Path("text.txt")], MODEL)
    matrix.check(made, MODEL)
    assert read_header(made).values["imatrix.datasets"] == ("text.txt",)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"blk.9.ffn_up.weight": (1, 64)}, r"another model: this one has no tensor blk\.9\.ffn_up\.weight"),
        ({"token_embd.weight": (1, 32)}, "token_embd.weight has 32 columns there and 64 here"),
        ({"blk.0.ffn_up_exps.weight": (1, 64)}, "another model"),
        ({}, "importance matrix of nothing"),
        ({"output_norm.weight": (1, 64)}, "has nothing on the tensors"),
    ],
)
def test_a_matrix_of_another_model(tmp_path: Path, shapes: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        matrix.check(write_matrix(tmp_path / "m.gguf", shapes), MODEL)


def test_no_matrix_at_all(tmp_path: Path) -> None:
    path = write_matrix(tmp_path / "m.gguf", {"token_embd.weight": (1, 64)}, kind="model")
    with pytest.raises(ModelError, match="is no importance matrix"):
        matrix.check(path, MODEL)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match="is damaged"):
        matrix.check(path, MODEL)
    path.write_bytes(b"\x10\0\0\0" * 100)
    with pytest.raises(ModelError, match="in GGUF form") as caught:
        matrix.check(path, MODEL)
    assert "--in-file m.gguf" in str(caught.value.remedy)


# The record


def small_gguf(path: Path, value: float = 1.0) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", np.full((4, 32), value, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FROM = {"source": "abc"}


def finish(record: Record, name: str, value: float = 1.0) -> None:
    with record.making(name) as temporary:
        record.finish(name, [(small_gguf(temporary, value), name)], FROM, {"type": "F16"})


def test_a_finished_file_is_known_again(tmp_path: Path) -> None:
    finish(Record(tmp_path, "m"), "m-F16.gguf")
    record = Record(tmp_path, "m")
    entry = record.kept("m-F16.gguf", FROM)
    assert entry is not None and entry["type"] == "F16"
    assert record.kept("m-F16.gguf", {"source": "other"}) is None
    assert record.kept("m-Q8_0.gguf", FROM) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-F16.gguf", "m.ggufrq.json"]


def test_a_copy_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    finish(Record(tmp_path / "a", "m"), "m-F16.gguf")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert Record(tmp_path / "b", "m").kept("m-F16.gguf", FROM) is not None
    path = tmp_path / "b" / "m-F16.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert Record(tmp_path / "b", "m").kept("m-F16.gguf", FROM) is None


def test_an_entry_without_its_file_is_nothing(tmp_path: Path) -> None:
    """As after a kill between the entry and the renaming."""
    finish(Record(tmp_path, "m"), "m-F16.gguf")
    (tmp_path / "m-F16.gguf").unlink()
    assert Record(tmp_path, "m").kept("m-F16.gguf", FROM) is None
    # the older file is still there, under a newer entry
    finish(Record(tmp_path, "m"), "m-F16.gguf", 1.0)
    old = (tmp_path / "m-F16.gguf").read_bytes()
    finish(Record(tmp_path, "m"), "m-F16.gguf", 2.0)
    (tmp_path / "m-F16.gguf").write_bytes(old)
    assert Record(tmp_path, "m").kept("m-F16.gguf", FROM) is None


def test_parts_replace_the_file_in_one_piece(tmp_path: Path) -> None:
    record = Record(tmp_path, "m")
    finish(record, "m-F16.gguf")
    names = ["m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf"]
    made = [(small_gguf(tmp_path / f".{name}.tmp"), name) for name in names]
    record.finish("m-F16.gguf", made, FROM, {})
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == names
    assert Record(tmp_path, "m").kept("m-F16.gguf", FROM) is not None
    Record(tmp_path, "m").refuse_foreign(names, force=False)


def test_files_of_others_and_what_is_left_of_a_kill(tmp_path: Path) -> None:
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"precious")
    (tmp_path / ".m-Q8_0.gguf.1.abc.tmp").mkdir()
    (tmp_path / ".m-Q8_0.gguf.1.abd.tmp").write_bytes(b"half")
    record = Record(tmp_path, "m")
    with pytest.raises(UsageError, match="was not made by ggufrq here"):
        record.refuse_foreign(["m-Q8_0.gguf"], force=False)
    record.refuse_foreign(["m-Q8_0.gguf"], force=True)
    record.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["m-Q8_0.gguf"]


@pytest.mark.parametrize("text", ["", "[]", '{"files": 7}', '{"files": {"m-F16.gguf": 3}}'])
def test_a_damaged_record_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.ggufrq.json").write_text(text)
    record = Record(tmp_path, "m")
    assert record.kept("m-F16.gguf", FROM) is None
    finish(record, "m-F16.gguf")
    assert json.loads((tmp_path / "m.ggufrq.json").read_text())["files"]["m-F16.gguf"]["from"] == FROM


# The plan


def plan(
    tmp_path: Path, *, kept: bool = False, size: int = 3_000_000, split: int | None = None
) -> FamilyPlan:
    types = {"token_embd.weight": "q5_0", "blk.0.ffn_up_exps.weight": "q8_0", "output_norm.weight": "f32"}
    output = Output(
        Want("mine", recipe.Recipe("mine")),
        "m-mine-Q8_0.gguf",
        Job(tmp_path / "m.gguf", "Q8_0", types),
        Forecast(types, 8.25, size, 1),
        {},
        {"token_embd.weight": "q4_k", "blk.0.ffn_up_exps.weight": "q8_0"},
        kept,
    )
    conversion = Conversion("m-BF16.gguf", "model", "BF16", {}, 7_000_000)
    return FamilyPlan("m", tmp_path / "not" / "there", {}, MODEL, (conversion,), (output,), split)


def test_what_a_plan_needs(tmp_path: Path) -> None:
    assert plan(tmp_path).disk_needed == 10_000_000
    assert plan(tmp_path, kept=True).disk_needed == 7_000_000
    assert plan(tmp_path, split=2_000_000).disk_needed == 13_000_000
    assert plan(tmp_path).disk_free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_plan_as_text_and_data(tmp_path: Path) -> None:
    text = render_plan(plan(tmp_path))
    assert re.search(r"^m-mine-Q8_0\.gguf +Q8_0 +3\.0 MB +8\.25 +1 larger tensor$", text, re.MULTILINE)
    assert "disk    10.0 MB needed" in text
    assert "token_embd.weight has rows that q4_k cannot hold and gets q5_0" in text
    listed = render_tensors(plan(tmp_path)).splitlines()
    assert listed[2].split() == ["token_embd.weight", "token_embd", "64", "×", "32", "bf16", "q5_0"]
    assert listed[4].split() == ["output_norm.weight", "64", "f32", "f32"]
    data = plan_as_json(plan(tmp_path))
    assert data["files"][0]["fallbacks"] == {"token_embd.weight": ["q4_k", "q5_0"]}
    assert data["disk_needed"] == 10_000_000
    whole = plan(tmp_path, kept=True)
    text = render_plan(replace(whole, conversions=(replace(whole.conversions[0], kept=True),)))
    assert "all of it is there" in text and "needed" not in text


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    refuse_what_does_not_fit(plan(tmp_path))
    with pytest.raises(GgufrqError, match=r"has no room: .* are left alone"):
        refuse_what_does_not_fit(plan(tmp_path, size=1 << 60))


def test_a_folder_is_read_once_and_by_one_run_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another run has just finished is known to the one that waited for it."""
    read: list[Path] = []

    class Read(Record):
        def __init__(self, folder: Path, base: str) -> None:
            (name,) = (paths.cache_dir() / "locks").glob("*.lock")
            with pytest.raises(Timeout):
                FileLock(name).acquire(timeout=0)
            read.append(folder)
            super().__init__(folder, base)

    monkeypatch.setattr(quantize, "Record", Read)
    monkeypatch.setattr(Work, "make", lambda work: work.planner.folder)
    request = Request("docs-qwen3-8m", (Want("Q8_0"),), tmp_path / "out")
    assert quantize.make_family(request, Build("key", tmp_path, tmp_path, tmp_path, {})) == tmp_path / "out"
    assert read == [tmp_path / "out"]

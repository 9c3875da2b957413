"""Families of the embedded models: made, checked, kept, and made whole again after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import guessing
import hubs
import pytest
import vision
from click.testing import CliRunner
from families import family_of

from ggufrq.base import paths
from ggufrq.base.errors import GgufrqError, ModelError, UsageError
from ggufrq.build.project import Build
from ggufrq.cache.kv import Sought
from ggufrq.card import compose, quickstart
from ggufrq.cli.quantize import as_data, render
from ggufrq.cli.quantize import quantize as command
from ggufrq.drive.profiles import find
from ggufrq.ggufs.files import read_gguf, read_model
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.ggufs.header import read_header
from ggufrq.make import family as quantize
from ggufrq.make import matrix
from ggufrq.make.plan import Family, Request
from ggufrq.make.verify import short_run
from ggufrq.models.resolve import embedded_models
from ggufrq.profile import read_profile

MODELS = ("docs-qwen3-8m", "docs-qwen3.5-8m")
# Bits per weight of a large model; the small ones keep more of their tensors in larger types.
BITS = {
    "IQ4_XS": (4.25, 4.8),
    "Q4_K_M": (4.5, 5.3),
    "Q5_K_M": (5.5, 6.0),
    "Q6_K": (6.5, 6.7),
    "Q8_0": (8.5, 8.6),
}


@pytest.mark.parametrize("name", MODELS)
def test_family(families: dict[str, Family], name: str) -> None:
    family = families[name]
    assert [made.type for made in family.files] == list(BITS)
    tensors = read_gguf(family.folder / f"{name}-BF16.gguf").tensors
    for made in family.files:
        facts = read_gguf(made.path)
        assert made.path.name == f"{name}-{made.type}.gguf"
        assert (facts.tensors, facts.file_type) == (tensors, made.type)
        low, high = BITS[made.type]
        assert low <= facts.bits <= high and facts.bits == made.bits
        assert made.fresh and not made.imatrix and made.fallbacks == 0
    assert not list(family.folder.glob(".*"))
    assert not [path for path in family.folder.glob("*.gguf") if "imatrix" in path.name]


def test_a_second_time_nothing_is_made(families: dict[str, Family], llama_build: Build) -> None:
    folder = families[MODELS[0]].folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.gguf")}
    again = family_of(MODELS[0], list(BITS), llama_build, out=folder)
    assert not any(made.fresh for made in again.files)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.gguf")} == before


@pytest.fixture(scope="module")
def untouched(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """What a run gives that nobody disturbs, with the build as ``command_line`` passes it on."""
    folder = tmp_path_factory.mktemp("untouched")
    build = replace(llama_build, manifest={})
    return family_of(MODELS[0], ["Q4_K_M", "Q5_K_M", "Q6_K"], build, out=folder)


def data_of(path: Path) -> bytes:
    """The weights of a file, without its metadata."""
    return path.read_bytes()[read_header(path).data_offset :]


@pytest.fixture
def copy(families: dict[str, Family], tmp_path: Path) -> Path:
    """A folder with the 16-bit file and Q8_0 of the dense model, that a test may spoil."""
    folder = tmp_path / "family"
    shutil.copytree(families[MODELS[0]].folder, folder)
    for path in folder.glob("*.gguf"):
        if not path.stem.endswith(("BF16", "Q8_0")):
            path.unlink()
    return folder


def _cut(path: Path) -> None:
    facts = path.stat()
    path.write_bytes(path.read_bytes()[:-1000])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def _spoil_inside(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("spoil", [_cut, _spoil_inside, Path.unlink])
def test_a_file_that_changed_is_made_anew(
    copy: Path, llama_build: Build, spoil: Callable[[Path], None]
) -> None:
    path = copy / f"{MODELS[0]}-Q8_0.gguf"
    whole = path.stat().st_size
    spoil(path)
    family = family_of(MODELS[0], ["Q8_0"], llama_build, out=copy)
    assert [made.fresh for made in family.files] == [True]
    assert path.stat().st_size == whole
    read_gguf(path)
    os.utime(path, ns=(1, 1))
    assert not family_of(MODELS[0], ["Q8_0"], llama_build, out=copy).files[0].fresh


def test_what_the_record_and_the_file_say(families: dict[str, Family]) -> None:
    family = families[MODELS[0]]
    record = json.loads((family.folder / f"{MODELS[0]}.ggufrq.json").read_text())
    for made in family.files:
        entry = record["files"][made.name]
        (part,) = entry["parts"]
        assert part["sha256"] == hashlib.sha256(made.path.read_bytes()).hexdigest() == made.sha256[0]
        assert entry["tokens_run"] >= 1
        values = read_header(made.path).values
        assert values["ggufrq.source.name"] == MODELS[0] and values["general.quantized_by"].startswith(
            "ggufrq "
        )
        assert len(values["ggufrq.llama_cpp"]) == 40


@pytest.mark.parametrize("name", MODELS)
def test_the_profile_of_the_family(families: dict[str, Family], llama_build: Build, name: str) -> None:
    family = families[name]
    assert family.profile == family.folder / f"{name}-kv.gguf"
    profile = read_profile(family.profile)
    assert (profile.model, profile.source) == (fingerprint(family.file("Q4_K_M")), "text")
    assert find(family.file("Q4_K_M"), Sought.AUTO).said == f"profile {name}-kv.gguf, from a text"
    entry = json.loads((family.folder / f"{name}.ggufrq.json").read_text())["files"][family.profile.name]
    (part,) = entry["parts"]
    assert part["sha256"] == hashlib.sha256(family.profile.read_bytes()).hexdigest()
    assert (entry["type"], entry["source"]) == ("kv-profile", "text")
    assert "kv-profile" in render(family) and as_data(family)["profile"] == str(family.profile)


def test_a_profile_from_elsewhere_is_kept(
    copy: Path, llama_build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    path = family_of(MODELS[0], ["Q8_0"], llama_build, out=copy).profile
    assert path == copy / f"{MODELS[0]}-kv.gguf"
    made = path.read_bytes()
    replace(read_profile(path), tokens=4096).write(path)
    given = path.read_bytes()
    for told in (True, False):
        assert family_of(MODELS[0], ["Q8_0"], llama_build, out=copy).profile == path
        said = capsys.readouterr().err
        assert (f"{path.name} is there already, from a text, and is kept" in said) == told
    assert path.read_bytes() == given
    path.unlink()
    family_of(MODELS[0], ["Q8_0"], llama_build, out=copy)
    assert path.read_bytes() == made
    # and so is one that was entered, when the model is converted anew
    path.write_bytes(given)
    family_of(MODELS[0], ["Q8_0"], llama_build, out=copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ggufrq.drive.profiles.MAKE", 0)
        family_of(MODELS[0], ["Q8_0"], llama_build, out=copy)
    assert path.read_bytes() == given
    path.write_bytes(b"GGUF precious")
    with pytest.raises(UsageError, match="is no profile") as caught:
        family_of(MODELS[0], ["Q8_0", "Q4_1"], llama_build, out=copy)
    assert not list(copy.glob("*Q4_1*")), "refused before anything is made"
    assert "--force" in str(caught.value.remedy) and path.read_bytes() == b"GGUF precious"
    family_of(MODELS[0], ["Q8_0"], llama_build, out=copy, force=True)
    assert path.read_bytes() == made


def test_files_of_others_are_not_replaced(copy: Path, llama_build: Build) -> None:
    path = copy / f"{MODELS[0]}-Q4_0.gguf"
    path.write_bytes(b"GGUF precious")
    with pytest.raises(UsageError, match="was not made by ggufrq here") as caught:
        family_of(MODELS[0], ["Q8_0", "Q4_0"], llama_build, out=copy)
    assert "--force" in str(caught.value.remedy)
    assert path.read_bytes() == b"GGUF precious"
    family_of(MODELS[0], ["Q4_0"], llama_build, out=copy, force=True)
    read_gguf(path)


def test_imatrix_only_where_it_is_needed(
    copy: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "CHUNKS", 6)
    family = family_of(MODELS[0], ["Q2_K", "Q3_K_M", "IQ2_XXS", "Q8_0"], llama_build, out=copy)
    assert {made.type: made.imatrix for made in family.files} == {
        "Q2_K": True,
        "Q3_K_M": True,
        "IQ2_XXS": True,
        "Q8_0": False,
    }
    assert family.files[-1].fresh is False
    made_matrix = copy / f"{MODELS[0]}-imatrix.gguf"
    made_at = made_matrix.stat().st_mtime_ns
    assert all(read_gguf(made.path).bits < 4.6 for made in family.files[:3])
    # a given one is used for all types, and makes other files
    given = family_of(MODELS[0], ["Q8_0"], llama_build, out=copy, imatrix=made_matrix)
    assert given.files[0].imatrix and given.files[0].fresh
    assert made_matrix.stat().st_mtime_ns == made_at


def test_the_matrix_of_a_family_is_used_again(
    copy: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By its converted file, which is the same model, and when the next command names no text; another one is
    made when that is asked for, and the files of the one before are told."""
    monkeypatch.setattr(matrix, "CHUNKS", 6)
    family_of(MODELS[0], ["Q2_K"], llama_build, out=copy)
    made_matrix, manifest = copy / f"{MODELS[0]}-imatrix.gguf", copy / f"{MODELS[0]}.ggufrq.json"
    first, source = made_matrix.read_bytes(), json.loads(manifest.read_text())["source"]
    converted = str(copy / f"{MODELS[0]}-BF16.gguf")
    again = family_of(converted, ["Q2_K", "IQ3_S"], llama_build, out=copy)
    assert [made.fresh for made in again.files] == [False, True]
    assert made_matrix.read_bytes() == first and json.loads(manifest.read_text())["source"] == source
    text = copy / "text.txt"
    text.write_text((paths.data_dir("texts") / "calibration.txt").read_text()[:20_000])
    capfd.readouterr()
    family_of(MODELS[0], ["Q4_0"], llama_build, out=copy, calibrate=(text,))
    replaced = f"{made_matrix.name} is replaced: the one before was for {MODELS[0]}-Q2_K.gguf, "
    assert replaced in capfd.readouterr().err
    second = made_matrix.read_bytes()
    assert second != first
    (made,) = family_of(MODELS[0], ["IQ3_XXS"], llama_build, out=copy).files
    assert made.imatrix and made_matrix.read_bytes() == second


def test_from_gguf(families: dict[str, Family], llama_build: Build, tmp_path: Path) -> None:
    source = families[MODELS[0]].folder
    family = family_of(str(source / f"{MODELS[0]}-BF16.gguf"), ["Q4_K_M"], llama_build, out=tmp_path)
    assert family.file("Q4_K_M") == tmp_path / f"{MODELS[0]}-Q4_K_M.gguf"
    assert data_of(family.file("Q4_K_M")) == data_of(families[MODELS[0]].file("Q4_K_M"))
    with pytest.raises(ModelError, match=r"quantized already \(Q8_0\)"):
        family_of(str(source / f"{MODELS[0]}-Q8_0.gguf"), ["Q4_K_M"], llama_build, out=tmp_path)
    again = family_of(
        str(source / f"{MODELS[0]}-Q8_0.gguf"), ["IQ4_XS"], llama_build, out=tmp_path, requantize=True
    )
    assert read_gguf(again.file("IQ4_XS")).file_type == "IQ4_XS"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mmproj": True}, "--mmproj"),
        ({"mtp": "drop"}, "--mtp drop"),
        ({"pre_tokenizer": "gpt-2"}, "--pre-tokenizer"),
    ],
)
def test_what_is_for_a_conversion_is_refused_of_a_gguf(
    families: dict[str, Family], llama_build: Build, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    model = str(families[MODELS[0]].file("Q8_0"))
    with pytest.raises(UsageError, match=f"is a GGUF file; {says} is for the conversion"):
        family_of(model, ["Q4_K_M"], llama_build, out=tmp_path, requantize=True, **options)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_noticed_before_anything_is_made(
    copy: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=66 << 20))
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(
        GgufrqError,
        match=r"8m-Q4_K_M.gguf, .*-Q6_K.gguf takes 1\d\.\d MB, 67.1 MB are left alone, .* has 69\.2 MB free",
    ):
        family_of(MODELS[0], ["Q4_K_M", "Q6_K"], llama_build, out=copy)
    assert sorted(path.name for path in copy.iterdir()) == before


def test_full_disk_is_noticed_before_the_conversion(
    llama_build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(64 << 20) + 20_000_000))
    with pytest.raises(GgufrqError, match=r"BF16\.gguf, .*-Q8_0\.gguf takes 2\d\.\d MB"):
        family_of(MODELS[0], ["Q8_0"], llama_build, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_split(copy: Path, llama_build: Build, tmp_path: Path) -> None:
    whole = copy / f"{MODELS[0]}-Q8_0.gguf"
    before = read_gguf(whole)
    family = family_of(MODELS[0], ["Q8_0"], llama_build, out=copy, split_size=3_000_000)
    (made,) = family.files
    assert not whole.exists()
    assert made.parts == tuple(sorted(path.name for path in copy.glob("*-Q8_0-*.gguf")))
    assert len(made.parts) == 3 and made.path.name == made.parts[0]
    facts = read_model(made.path)
    assert (facts.tensor_types, facts.data_bytes) == (before.tensor_types, before.data_bytes)
    short_run(made.path, llama_build, tmp_path / "log")
    assert not family_of(MODELS[0], ["Q8_0"], llama_build, out=copy, split_size=3_000_000).files[0].fresh
    # shards are a source as good as a file in one piece
    again = family_of(str(made.path), ["Q4_0"], llama_build, out=tmp_path / "again", requantize=True)
    assert read_gguf(again.file("Q4_0")).tensors == before.tensors
    (copy / made.parts[1]).write_bytes((copy / made.parts[1]).read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"Q8_0-00002-of-00003\.gguf is damaged"):
        family_of(str(made.path), ["Q4_0"], llama_build, out=tmp_path / "third", requantize=True)
    assert not list((tmp_path / "third").glob("*"))


def test_the_converted_file_can_be_asked_for(copy: Path, llama_build: Build) -> None:
    (made,) = family_of(MODELS[0], ["BF16"], llama_build, out=copy).files
    assert (made.name, made.type, made.fresh) == (f"{MODELS[0]}-BF16.gguf", "BF16", False)


def test_head_for_further_tokens(llama_build: Build, tmp_path: Path) -> None:
    """A model with a head of random weights: kept, left out, and apart."""
    model = with_head(embedded_models()[MODELS[1]], tmp_path / "Headed-8M")
    kept = family_of(str(model), ["Q8_0"], llama_build, out=tmp_path / "kept")
    dropped = family_of(str(model), ["Q8_0"], llama_build, out=tmp_path / "apart", mtp="apart")
    request = Request(str(model), quantize.parse_wants(["Q6_K"], llama_build), mtp="apart")
    names = {made.name: read_gguf(made.path) for made in dropped.files}
    assert list(names) == ["Headed-8M-Q8_0.gguf", "mtp-Headed-8M-BF16.gguf"]
    head = {name for name in read_gguf(kept.file("Q8_0")).tensor_types if "nextn" in name}
    assert "blk.8.nextn.eh_proj.weight" in head or head
    assert not head & names["Headed-8M-Q8_0.gguf"].tensor_types.keys()
    assert head <= names["mtp-Headed-8M-BF16.gguf"].tensor_types.keys()
    plan = quantize.plan_family(replace(request, out=kept.folder), llama_build)
    sizes = {part.name: part.bytes for part in plan.conversions}
    assert sizes == {name: (dropped.folder / name).stat().st_size for name in sizes} and len(sizes) == 2
    told = plan.told
    assert [line.partition(":")[0] for line in told] == ["Headed-8M-Q8_0.gguf"]
    assert "made from another version of the model (its files, --revision, --mtp" in told[0]
    assert not quantize.plan_family(replace(request, out=dropped.folder), llama_build).told
    apart = str(dropped.folder / "mtp-Headed-8M-BF16.gguf")
    manifest = dropped.folder / "Headed-8M.ggufrq.json"
    source = json.loads(manifest.read_text())["source"]
    smaller = family_of(apart, ["Q8_0"], llama_build, out=dropped.folder)
    assert [made.name for made in smaller.files] == ["mtp-Headed-8M-Q8_0.gguf"] and smaller.profile is None
    assert list(dropped.folder.glob("*.ggufrq.json")) == [manifest]  # it goes into the family
    assert json.loads(manifest.read_text())["source"] == source
    with pytest.raises(ModelError, match="Q2_K takes an importance matrix, and no text runs through mtp-"):
        family_of(apart, ["Q2_K"], llama_build, out=dropped.folder)
    for folder, draft in ((kept.folder, ""), (dropped.folder, "-md mtp-Headed-8M-Q8_0.gguf")):
        start = quickstart._Starts(compose.collect(folder), llama_build, True).ahead("iso3")
        lines = start.lines[0].replace(" \\\n ", "")
        assert start.ran and "--spec-type draft-mtp" in lines and draft in lines
    with pytest.raises(ModelError, match="has no vision encoder"):
        family_of(str(model), ["Q8_0"], llama_build, out=tmp_path / "apart", mmproj=True)
    with pytest.raises(ModelError, match="has no head for further tokens"):
        family_of(MODELS[1], ["Q8_0"], llama_build, out=tmp_path / "none", mtp="apart")


def test_the_projector_of_a_model_that_sees(llama_build: Build, tmp_path: Path) -> None:
    """A file of its own, whose bytes the plan knows, and a row of the card."""
    model = vision.write(tmp_path / "Seeing-1M")
    wants = quantize.parse_wants(["Q8_0"], llama_build)
    request = Request(str(model), wants, mmproj=True, out=tmp_path / "out")
    planned = {part.name: part.bytes for part in quantize.plan_family(request, llama_build).conversions}
    made = family_of(str(model), ["Q8_0"], llama_build, out=tmp_path / "out", mmproj=True)
    assert [file.name for file in made.files] == ["Seeing-1M-Q8_0.gguf", "mmproj-Seeing-1M-F16.gguf"]
    assert planned == {name: (made.folder / name).stat().st_size for name in planned} and len(planned) == 2
    assert read_gguf(made.files[1].path).architecture == "clip"
    kinds = {file.name: file.kind for file in compose.collect(made.folder).files}
    assert kinds["mmproj-Seeing-1M-F16.gguf"] == "mmproj"
    (made.folder / "mmproj-Seeing-1M-F16.gguf").unlink()  # of a model that was converted before, too
    again = quantize.plan_family(request, llama_build).conversions
    assert {part.name: part.bytes for part in again} == planned and [part.kept for part in again] == [
        True,
        False,
    ]


def test_a_draft_goes_into_the_family_of_its_model(
    copy: Path, llama_build: Build, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And is not run alone, which llama.cpp does not stand."""
    name, manifest = f"eagle3-{MODELS[0]}", copy / f"{MODELS[0]}.ggufrq.json"
    before = json.loads(manifest.read_text())
    folder = tmp_path_factory.mktemp("draft")
    draft = guessing.eagle(copy / f"{MODELS[0]}-BF16.gguf", folder / f"{name}-BF16.gguf")
    made = family_of(str(draft), ["Q8_0"], llama_build, out=copy)
    assert [file.name for file in made.files] == [f"{name}-Q8_0.gguf"] and made.profile is None
    after = json.loads(manifest.read_text())
    assert after["source"] == before["source"] and f"{name}-Q8_0.gguf" in after["files"]
    assert list(copy.glob("*.ggufrq.json")) == [manifest]
    request = Request(MODELS[0], quantize.parse_wants(["Q8_0"], llama_build), out=copy)
    assert not quantize.plan_family(request, llama_build).told


def with_head(model: Path, folder: Path) -> Path:
    """A copy of a hybrid model with a head that predicts one more token."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    full = next(name for name in tensors if name.endswith("self_attn.q_proj.weight"))
    prefix = full.removesuffix("self_attn.q_proj.weight")
    head = {
        f"mtp.layers.0.{name.removeprefix(prefix)}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    norm = tensors[f"{prefix}input_layernorm.weight"]
    size = norm.shape[0]
    head["mtp.fc.weight"] = norm.new_full((size, 2 * size), 0.01)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        head[f"mtp.{name}.weight"] = norm.clone()
    save_file({**tensors, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_unknown_type(llama_build: Build) -> None:
    with pytest.raises(UsageError, match=r"no quantization type 'Q9_K'; it has .*Q4_K_M") as caught:
        quantize.parse_types("Q8_0,q9_k", llama_build)
    assert "--types IQ4_XS" in str(caught.value.remedy)
    assert quantize.parse_types("q4_k, Q4_K_M,q8_0", llama_build) == ("Q4_K_M", "Q8_0")


def test_command(copy: Path) -> None:
    result = CliRunner().invoke(command, [MODELS[0], "--types", "q8_0,Q6_K", "-o", str(copy)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"docs-qwen3-8m-Q8_0\.gguf +Q8_0 +8\.0 MB +8\.52 +kept", lines[1])
    assert re.fullmatch(r"docs-qwen3-8m-Q6_K\.gguf +Q6_K +6\.\d MB +6\.\d\d", lines[2])
    result = CliRunner().invoke(command, [MODELS[0], "--types", "Q8_0", "-o", str(copy), "--json"])
    told = json.loads(result.stdout)
    assert told["base"] == MODELS[0]
    assert told["files"][0]["bytes"] == (copy / f"{MODELS[0]}-Q8_0.gguf").stat().st_size


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
@pytest.mark.parametrize(
    "after", ["docs-qwen3-8m-BF16.gguf", "docs-qwen3-8m-Q4_K_M.gguf", ".docs-qwen3-8m-Q5_K_M"]
)
def test_killed_and_run_again(
    untouched: Family,
    llama_build: Build,
    command_line: Callable[..., list[str]],
    tmp_path: Path,
    after: str,
) -> None:
    types = ["Q4_K_M", "Q5_K_M", "Q6_K"]
    arguments = ["quantize", MODELS[0], "--types", ",".join(types), "-o", str(tmp_path)]
    process = subprocess.Popen(
        command_line(llama_build, *arguments),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not any(path.name.startswith(after) for path in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.gguf")}
    family = family_of(MODELS[0], types, replace(llama_build, manifest={}), out=tmp_path)
    for made in family.files:
        assert read_gguf(made.path).file_type == made.type
        assert made.fresh == (made.path.name not in kept)
        assert made.path.read_bytes() == untouched.file(made.type).read_bytes()
    for name, when in kept.items():
        assert (tmp_path / name).stat().st_mtime_ns == when, f"{name} was finished and yet made again"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def kill_after(process: subprocess.Popen[bytes], seconds: float, folder: Path) -> None:
    """Kill a run and all that it started; under a final name there is never half a file."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in folder.glob("*.gguf"):
        read_gguf(path)


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
@pytest.mark.slow
def test_killed_five_times_at_any_moment(
    untouched: Family, llama_build: Build, command_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Whenever it is killed, the rerun ends with the very same files."""
    types = ["Q4_K_M", "Q5_K_M", "Q6_K"]
    arguments = command_line(
        llama_build, "quantize", MODELS[0], "--types", ",".join(types), "-o", str(tmp_path)
    )
    moments = random.Random(time.time_ns())
    for _ in range(5):
        process = subprocess.Popen(
            arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        kill_after(process, moments.uniform(0.5, 5), tmp_path)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    for kind in types:
        made = tmp_path / f"{MODELS[0]}-{kind}.gguf"
        assert made.read_bytes() == untouched.file(kind).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_killed_while_it_folds(
    llama_build: Build, command_line: Callable[..., list[str]], tmp_path: Path, untouched: Family
) -> None:
    """Whenever it is killed, the rerun of a folded family ends with the very same files."""
    source = str(untouched.folder / f"{MODELS[0]}-BF16.gguf")
    given = tmp_path / f"{MODELS[0]}-imatrix.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "CHUNKS", 4)
        matrix.make_alone(Path(source), given, [paths.data_dir("texts") / "calibration.txt"], llama_build)
    types, folder = ["Q4_0", "Q8_0"], tmp_path / "killed"
    options = {"imatrix": given, "fold": "awq", "run": False}
    whole = family_of(source, types, replace(llama_build, manifest={}), out=tmp_path / "whole", **options)
    arguments = command_line(
        llama_build,
        "quantize",
        source,
        *("--types", ",".join(types), "--imatrix", str(given), "--fold", "awq", "--no-run"),
        *("-o", str(folder)),
    )
    moments = random.Random(time.time_ns())
    for stage in (".docs", ".docs", "docs-qwen3-8m-awq-Q4_0", "docs-qwen3-8m-awq-Q4_0", "docs"):
        process = subprocess.Popen(
            arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and not list(folder.glob(f"{stage}*.*")):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kill_after(process, moments.uniform(0, 2), folder)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in whole.folder.iterdir()
    )
    for made in whole.files:
        assert (folder / made.name).read_bytes() == made.path.read_bytes()


def test_from_the_hub(
    llama_build: Build, command_line: Callable[..., list[str]], fake_hub: ModuleType, tmp_path: Path
) -> None:
    folder = embedded_models()[MODELS[1]]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    home = tmp_path / "hf"
    # As a large model is planned; and the disk is full as soon as the weights are there, where that is wanted
    large = "import ggufrq.make.work as work\nwork._SMALL = 0\n"
    full = (
        "import pathlib, shutil\n"
        "usage = shutil.disk_usage\n"
        f"weights = pathlib.Path({str(home)!r})\n"
        "left = lambda: 1 << 20 if any(weights.rglob('*.safetensors')) else 1 << 40\n"
        "shutil.disk_usage = lambda folder: usage(folder)._replace(free=left())\n"
    )

    def run(url: str, *more: str, before: str = large) -> subprocess.CompletedProcess[str]:
        arguments = ("quantize", "somebody/Docs-8M", "--types", "Q8_0", "--json", *more)
        line = command_line(llama_build, *arguments)
        line[2] = before + line[2]
        return subprocess.run(
            line,
            cwd=tmp_path,
            env=hubs.environment(url, home, token=None),
            capture_output=True,
            text=True,
            timeout=600,
        )

    with fake_hub.fake_hub({"somebody/Docs-8M": {**files, "pytorch_model.bin": b"unwanted"}}) as hub:
        plan = run(hub.url, "--dry-run")
        assert plan.returncode == 0, plan.stderr
        assert hub.sent < len(files["model.safetensors"]) / 10
        assert not (tmp_path / "Docs-8M-GGUF").exists()
        refused = run(hub.url, before=large + full)
        assert refused.returncode == 1 and "the disk has no room: " in refused.stderr, refused.stderr
        assert hub.sent > len(files["model.safetensors"])
        done = run(hub.url)
        assert done.returncode == 0, done.stderr
        assert not any("pytorch" in name for name in hub.fetched)
    log = (Path(os.environ["GGUFRQ_CACHE"]) / "logs" / "quantize-Docs-8M.log").read_text(encoding="utf-8")
    headers = re.findall(r"^\$ .*_hf_to_gguf\.py .* header ", log, re.MULTILINE)
    assert len(headers) == 3, "each run plans once by headers"
    assert len(re.findall(r"^\$ .*_hf_to_gguf\.py .* all ", log, re.MULTILINE)) == 1
    told = json.loads(done.stdout)
    assert json.loads(plan.stdout)["files"][0]["bytes"] == told["files"][0]["bytes"]
    assert told["source"]["repo"] == "somebody/Docs-8M"
    assert told["source"]["revision"] == fake_hub.SHA
    values = read_header(tmp_path / "Docs-8M-GGUF" / "Docs-8M-Q8_0.gguf").values
    assert values["ggufrq.source.revision"] == fake_hub.SHA
    assert (values["general.name"], values["general.basename"]) == ("Docs 8M", "Docs")
    assert values["general.source.repo_url"] == "https://huggingface.co/somebody/Docs-8M"
    assert "fetching somebody/Docs-8M at 0123456789ab" in done.stderr

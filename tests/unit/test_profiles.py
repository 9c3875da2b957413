"""Which profile a model's K is kept by: given, beside the model, or made from its weights and kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from attention_models import QK_NORM, SPLIT, numbers, write

import ggufrq.profile
from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, parse_cases
from ggufrq.cache.kv import Sought, parse_plan
from ggufrq.drive import profiles, run, serve
from ggufrq.drive.profiles import Found, find, positions_for, settle, settle_cases
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.make.fold import fold_file, kv
from ggufrq.make.fold.changes import Change
from ggufrq.make.fold.weights import Weights, write_changed
from ggufrq.models.names import names_beside
from ggufrq.profile import profile_from_weights, read_profile
from ggufrq.tools.programs import Programs

pytestmark = pytest.mark.usefixtures("cache")

WEIGHTS = "profile from the weights"


def small(folder: Path, name: str = "Small-1B-Q8_0.gguf", architecture: str = "qwen3", **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / name, architecture, numbers(**more), [{**SPLIT, **QK_NORM}] * 2)
    return folder / name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small(tmp_path / "models")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What profiles were made of."""
    calls: list[tuple[Any, ...]] = []

    def make(path: Path, positions: int, progress: Callable[[int, int], None]) -> ggufrq.profile.Profile:
        calls.append((path.name, positions))
        return profile_from_weights(path, positions, progress)

    monkeypatch.setattr(ggufrq.profile, "profile_from_weights", make)
    return calls


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("Qwen3-8B-Q4_K_M.gguf", ["Qwen3-8B-kv.gguf", "Qwen3-8B-Q4_K_M-kv.gguf"]),
        ("Qwen3-8B.Q4_K_M.gguf", ["Qwen3-8B-kv.gguf", "Qwen3-8B.Q4_K_M-kv.gguf"]),
        ("Qwen3-8B-UD-IQ2_XXS.gguf", ["Qwen3-8B-kv.gguf", "Qwen3-8B-UD-IQ2_XXS-kv.gguf"]),
        ("big-BF16-00001-of-00003.gguf", ["big-kv.gguf", "big-BF16-00001-of-00003-kv.gguf"]),
        ("model.gguf", ["model-kv.gguf"]),
    ],
)
def test_names_beside_a_model(name: str, beside: list[str]) -> None:
    assert list(names_beside(Path("folder") / name)) == beside
    assert list(names_beside(Path("folder") / name, "another")) == beside


def test_a_file_that_a_recipe_made_finds_the_profile_of_its_family(tmp_path: Path) -> None:
    model = small(tmp_path, "Small-1B-mine-2-Q5_K_M.gguf", ggufrq__recipe="mine-2")
    beside = tmp_path / "Small-1B-kv.gguf"
    profile_from_weights(model, 64).write(beside)
    assert find(model, Sought.AUTO).file == beside
    own = tmp_path / "Small-1B-mine-2-kv.gguf"
    own.write_bytes(beside.read_bytes())
    assert find(model, Sought.AUTO).file == own


@pytest.mark.parametrize(
    ("native", "n_ctx", "positions"),
    [
        (4096, None, 4096),
        (4096, 512, 4096),
        (4096, 4097, 8192),
        (131072, 4096, 32768),
        (131072, 40000, 65536),
        (None, None, 32768),
    ],
)
def test_positions(native: int | None, n_ctx: int | None, positions: int) -> None:
    assert positions_for(native, n_ctx) == positions


def test_made_from_the_weights_once(model: Path, cache: Path, made: list[Any]) -> None:
    first = find(model, Sought.AUTO, 256)
    assert first.file is not None and first.said.startswith(f"{WEIGHTS}, made in ")
    assert read_profile(first.file).n_ctx == 512, "of the model's own context"
    assert find(model, Sought.AUTO) == find(model, Sought.WEIGHTS, 512) == Found(first.file, WEIGHTS)
    assert made == [(model.name, 512)]
    # another context, and another quantization of the same model
    longer = find(model, Sought.AUTO, 513)
    assert longer.file != first.file and made[1:] == [(model.name, 1024)]
    other = model.with_name("Small-1B-Q4_K_M.gguf")
    other.write_bytes(model.read_bytes())
    assert find(other, Sought.AUTO).file == first.file and len(made) == 2
    assert sorted(cache.rglob("*kv*")) == [] and list(cache.rglob("*.tmp")) == []


def test_from_the_weights_where_the_programs_fail(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = Build("key", tmp_path / "build", tmp_path, tmp_path, {})
    found = find(model, Sought.AUTO, 256, build)
    assert found.file is not None and read_profile(found.file).source == "weights"
    assert found.said.startswith(f"{WEIGHTS}, made in ")
    told = capsys.readouterr().err
    assert "no profile from a text (" in told
    assert "has no program 'llama-rq-moments'), so one from the weights" in told
    # which is not tried again by this build, but by another
    assert find(model, Sought.AUTO, 256, build) == Found(found.file, WEIGHTS)
    assert capsys.readouterr().err == ""
    other = find(model, Sought.AUTO, 256, replace(build, key="another"))
    assert other.said.startswith(f"{WEIGHTS}, made in ")


@pytest.mark.parametrize("damage", ["short", "other model", "other context", "no profile"])
def test_a_kept_profile_that_is_no_good_is_made_anew(model: Path, made: list[Any], damage: str) -> None:
    kept = find(model, Sought.AUTO).file
    assert kept is not None
    if damage == "short":
        kept.write_bytes(kept.read_bytes()[:-100])
    elif damage == "no profile":
        kept.write_bytes(model.read_bytes())
    else:
        changed = {"model": "0" * 16} if damage == "other model" else {"n_ctx": 7}
        replace(read_profile(kept), **changed).write(kept)
    again = find(model, Sought.AUTO)
    assert again.file == kept and again.said.startswith(f"{WEIGHTS}, made in ")
    assert len(made) == 2 and find(model, Sought.AUTO).said == WEIGHTS


def test_a_file_beside_the_model(model: Path, made: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    beside = model.with_name("Small-1B-kv.gguf")
    replace(profile_from_weights(model, 64), source="text").write(beside)
    assert find(model, Sought.AUTO, 100_000) == Found(beside, "profile Small-1B-kv.gguf, from a text")
    assert find(model, Sought.WEIGHTS).file != beside
    # not of this model: passed over
    replace(read_profile(beside), model="0" * 16).write(beside)
    assert find(model, Sought.AUTO).said == WEIGHTS
    assert "Small-1B-kv.gguf is a profile for another model and is not used" in capsys.readouterr().err
    own = model.with_name("Small-1B-Q8_0-kv.gguf")
    profile_from_weights(model, 64).write(own)
    assert find(model, Sought.AUTO) == Found(own, "profile Small-1B-Q8_0-kv.gguf, from the weights")
    # one from the weights for fewer positions than are asked for
    longer = find(model, Sought.AUTO, 65)
    assert longer.file not in (None, own) and longer.said == WEIGHTS
    assert "Small-1B-Q8_0-kv.gguf is for 64 positions, and this context is longer" in capsys.readouterr().err
    own.write_bytes(own.read_bytes()[:-100])
    with pytest.raises(ModelError) as caught:
        find(model, Sought.AUTO)
    assert "-kv.gguf away, or --kv-profile weights" in str(caught.value.remedy)


def test_one_of_a_little_text_is_made_anew_for_a_longer_context(model: Path) -> None:
    """But not one of more text, which is worth more than its positions."""
    beside = model.with_name("Small-1B-kv.gguf")
    for tokens, used in ((profiles.TOKENS, False), (4096, True)):
        replace(profile_from_weights(model, 64), source="text", tokens=tokens).write(beside)
        assert read_profile(beside).tokens == tokens
        assert (find(model, Sought.AUTO, 65).file == beside) is used
        assert find(model, Sought.AUTO, 64).file == beside


def test_a_folded_model_and_a_fine_tune_have_their_own(model: Path, tmp_path: Path, made: list[Any]) -> None:
    """Whose last norm, by which a model is named, is that of the model that they come from."""
    plain = find(model, Sought.AUTO).file
    folded = tmp_path / "folded.gguf"
    with Weights(model) as weights:
        changes = kv.find(weights, model).changes
        write_changed(weights, folded, changes, fold_file.metadata("kv", model))
    assert fingerprint(folded) == fingerprint(model)
    found = find(folded, Sought.AUTO).file
    assert found not in (None, plain) and len(made) == 2
    assert find(folded, Sought.AUTO).file == found and find(model, Sought.AUTO).file == plain
    tuned = tmp_path / "tuned.gguf"
    with Weights(model) as weights:
        norm = "blk.1.attn_norm.weight"
        write_changed(weights, tuned, {norm: Change(columns=np.full((1, 1), 1.5))}, {})
    assert find(tuned, Sought.AUTO).file not in (None, plain, found)


def test_a_given_file(model: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.gguf"
    profile = profile_from_weights(model, 64)
    profile.write(given)
    assert find(model, given) == Found(given, "profile given.gguf, from the weights")
    replace(profile, model="0" * 16).write(given)
    with pytest.raises(
        ModelError, match=r"is a profile for another model than Small-1B-Q8_0\.gguf"
    ) as caught:
        find(model, given)
    assert "--kv-profile weights" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="is no profile of a KV cache but qwen3"):
        find(model, model)
    given.write_bytes(b"nothing")
    with pytest.raises(ModelError):
        find(model, given)


def test_a_file_of_means(model: Path, tmp_path: Path) -> None:
    def means(of: str) -> Path:
        path = tmp_path / "kv-calib.gguf"
        writer = gguf.GGUFWriter(path, "kv-calib")
        writer.add_type("kv-calib")
        writer.add_string("rq.calib.model", of)
        writer.add_tensor("blk.0.k_mean", np.zeros((2, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    path = means(profile_from_weights(model, 64).model)
    assert find(model, path) == Found(path, "means of K subtracted: kv-calib.gguf")
    with pytest.raises(ModelError, match="for another model"):
        find(model, means("0" * 16))


def test_a_model_that_has_none(tmp_path: Path) -> None:
    model = small(tmp_path / "models", architecture="unheard-of")
    found = find(model, Sought.AUTO)
    assert found.file is None
    assert found.said.startswith("no profile: it is not known which channels RoPE turns together")
    plan, said = settle(parse_plan("iso3").with_profile(Sought.AUTO), model)
    assert plan == parse_plan("iso3") and said == found.said
    with pytest.raises(ModelError, match="it is not known which channels"):
        find(model, Sought.WEIGHTS)


def test_cases_are_settled_together(model: Path, made: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    cases = parse_cases("f16,iso3,iso3+plain,iso4; 0:q8_0", Sought.AUTO)
    settled = settle_cases(cases, model)
    assert [case.name for case in settled] == [case.name for case in cases]
    files = {case.plan.file for case in settled}
    assert len(files) == 2 and None in files and len(made) == 1
    assert capsys.readouterr().err.count(WEIGHTS) == 1
    assert settled[1].facts()["profile"] and "profile" not in settled[2].facts()
    none = small(model.parent, "other.gguf", "unheard-of")
    assert settle_cases(cases, none) == [Case(parse_plan(name)) for name in ("f16", "iso3", "iso4; 0:q8_0")]


def test_plans_without_a_wish_are_left_alone() -> None:
    assert settle(parse_plan("iso3"), Path("not there")) == (parse_plan("iso3"), None)
    assert settle_cases([Case(parse_plan("f16"))], Path("not there")) == [Case(parse_plan("f16"))]


def test_refused_before_llama_cpp_starts(model: Path, no_programs: None) -> None:
    plan = parse_plan("iso3").with_profile(model)
    with pytest.raises(ModelError, match="is no profile"):
        run.generate(model, "Hello", plan, Programs(Path("none")))


def test_what_stands_for_the_maker_is_part_of_the_name(
    model: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find(model, Sought.AUTO)
    monkeypatch.setattr(profiles, "MAKE", profiles.MAKE + 1)
    find(model, Sought.AUTO)
    assert len(made) == 2


@pytest.mark.skipif(os.name != "posix", reason="its program is a script")
def test_the_profile_is_made_where_the_server_puts_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the devices that the server is given, and tried again on others where it failed."""
    told = tmp_path / "told"
    program = tmp_path / "llama-rq-moments"
    program.write_text(f'#!/bin/sh\necho "$@" >> {told}\nexit 1\n')
    program.chmod(0o755)

    def started(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "started", started)
    (tmp_path / "llama-server").touch()
    programs = Programs.of_build(Build("key", tmp_path, tmp_path, tmp_path, {}))
    plan = parse_plan("iso3").with_profile(Sought.AUTO)
    given = ("--temp", "0", "-dev", "none", "--gpu_layers", "0", "--metrics", "-ot", "exps=CPU", "--cpu-moe")
    for extra in (given, given, ("-ngl", "1")):
        with pytest.raises(KeyboardInterrupt), serve.serving(model, plan, programs, extra=extra, threads=3):
            pass
    tries = [line.partition(" -t 3")[2] for line in told.read_text().splitlines()]
    assert list(dict.fromkeys(tries)) == [
        " -dev none --gpu_layers 0 -ot exps=CPU --cpu-moe",
        " -ngl 1",
    ]
    for value in ("none", "none", "Vulkan0"):
        monkeypatch.setenv("LLAMA_ARG_DEVICE", value)
        with pytest.raises(KeyboardInterrupt), serve.serving(model, plan, programs, threads=3):
            pass
    assert capsys.readouterr().err.count("no profile from a text (") == 4, "variables are places, too"

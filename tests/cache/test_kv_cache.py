"""The cache types inside llama.cpp: on both embedded models, and one short run on every architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_drivers import DENSE, HYBRID, NARROW, ONE_THREAD, means, metric, run

from ggufrq.base import paths, proc
from ggufrq.build.project import Build
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.memory_shape import is_mla
from ggufrq.models.names import names_beside
from ggufrq.profile import profile_from_weights
from ggufrq.tools.logs import parse_context

pytestmark = [pytest.mark.build, pytest.mark.models]

# type of K and V, flash attention, largest error against f16: the embedded models lose less than half of it
PAIRS = [
    ("iso3", "planar4", True, 0.02),
    ("planar3", "rotor3", True, 0.02),
    ("iso4", "iso4", True, 0.005),
    ("rotor2", "rotor2", True, 0.15),
    ("iso3", "f16", False, 0.02),
    ("planar4", "q8_0", True, 0.005),
    ("f16", "iso3", True, 0.02),
    ("iso5", "rotor5", True, 0.0015),
]


@pytest.mark.parametrize("model", [DENSE, HYBRID])
@pytest.mark.parametrize(("k", "v", "flash", "bound"), PAIRS)
def test_a_cache_survives_what_upstreams_does(
    driver: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    model: str,
    k: str,
    v: str,
    flash: bool,
    bound: float,
) -> None:
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[model], text, k, v, "1" if flash else "0", tmp_path / "state.bin")
    got = run(driver, *arguments, "write")
    assert 0 < got["plain"] < bound and 0 < got["next"] < bound, got
    if model == DENSE:  # upstream cannot shift the positions of the other one
        assert 0 < got["shifted"] < 2 * bound, got
    # Where a cell stands moves the last bits of a sum, and with them indices of the codes in the next layer:
    # less than the code itself costs. A sequence that saw another one would differ by a hundred times that.
    assert max(got["sequences_unified"], got["sequences_streams"], got["copied"]) < bound, got
    assert run(driver, *arguments, "read") == {"restored": True, "state": pytest.approx(0, abs=1e-7)}


# the same for heads of 64, with a profile and the newest tokens beside, and layers of other types
NARROWED = [
    ("iso3", "planar4", True, None, 0.02),
    ("rotor2", "rotor2", True, None, 0.15),
    ("planar3", "f16", False, None, 0.02),
    ("f16", "iso3", True, None, 0.02),
    ("iso3", "planar4", True, "0,-1:q8_0;1:iso4/f16", 0.02),
    ("planar5", "planar5", True, None, 0.0015),
]


@pytest.mark.parametrize(("k", "v", "flash", "layers", "bound"), NARROWED)
def test_a_cache_of_heads_of_64_survives_it_too(
    driver: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    k: str,
    v: str,
    flash: bool,
    layers: str | None,
    bound: float,
) -> None:
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[NARROW], text, k, v, "1" if flash else "0", tmp_path / "state.bin")
    got = run(driver, *arguments, "write", layers=layers)
    assert 0 < got["plain"] < bound and 0 < got["next"] < bound and 0 < got["shifted"] < 2 * bound, got
    assert max(got["sequences_unified"], got["sequences_streams"], got["copied"]) < bound, got
    restored = run(driver, *arguments, "read", layers=layers)
    assert restored == {"restored": True, "state": pytest.approx(0, abs=1e-7)}


def test_families_of_layers_with_heads_of_64_are_part_of_a_state(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    """What they are stored in has no family: read as another one it would be noise."""
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[NARROW], text, "iso3", "iso3", "1", tmp_path / "state.bin")
    run(driver, *arguments, "write", layers="0-3:planar3")
    assert run(driver, *arguments, "read", layers="0-3:rotor3") == {"restored": False}
    assert run(driver, *arguments, "read") == {"restored": False}
    assert run(driver, *arguments, "read", layers="0-3:planar3")["restored"]


def test_heads_of_64_have_profiles_and_exact_tokens(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    profile = tmp_path / "kv.gguf"
    profile_from_weights(f16_models[NARROW], 1024).write(profile)
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[NARROW], text, "iso3", "iso3", "1", tmp_path / "state.bin")
    plain = run(driver, *arguments, "write", profile=profile)
    assert 0 < plain["plain"] < 0.05 and 0 < plain["shifted"] < 0.05
    exact = run(driver, *arguments, "write", profile=profile, recent=32, first=1)
    assert 0 < exact["plain"] < plain["plain"] / 2
    assert run(driver, *arguments, "read") == {"restored": False}


def test_rotation_modes_differ_and_all_are_right(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    text = paths.data_dir("texts") / "heldout.txt"
    errors = {}
    for mode in ("full", "block", "hadamard", "none", "full/block"):
        arguments = (f16_models[DENSE], text, "iso3", "iso3", "1", tmp_path / "state.bin")
        errors[mode] = run(driver, *arguments, "write", mode=mode)["plain"]
    assert len(set(errors.values())) == len(errors), errors
    assert all(0 < error < 0.05 for error in errors.values()), errors


# base types of K and V, types of layers, largest error: q8_0 with upstream's rotation and f16 beside ours,
# layers of ours in an f16 cache, upstream's types alone, entries that overwrite each other
LAYERED = [
    ("iso3", "planar4", "0,-1:q8_0;1:iso4/f16", 0.02),
    ("f16", "f16", "0-1:iso3/rotor3", 0.02),
    ("f16", "f16", "0:q8_0/f16", 0.005),
    ("planar3", "planar3", "0--1:iso2; -2--2,0: f16", 0.1),
]


@pytest.mark.parametrize("model", [DENSE, HYBRID])
@pytest.mark.parametrize(("k", "v", "layers", "bound"), LAYERED)
def test_a_cache_with_types_by_layer_survives_it_too(
    driver: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    model: str,
    k: str,
    v: str,
    layers: str,
    bound: float,
) -> None:
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[model], text, k, v, "1", tmp_path / "state.bin")
    got = run(driver, *arguments, "write", layers=layers)
    assert 0 < got["plain"] < bound and 0 < got["next"] < bound, got
    if model == DENSE:
        assert 0 < got["shifted"] < 2 * bound, got
    assert max(got["sequences_unified"], got["sequences_streams"], got["copied"]) < bound, got
    restored = run(driver, *arguments, "read", layers=layers)
    assert restored == {"restored": True, "state": pytest.approx(0, abs=1e-7)}
    assert run(driver, *arguments, "read") == {"restored": False}


def test_layers_of_one_type_are_that_type(driver: Path, f16_models: dict[str, Path], tmp_path: Path) -> None:
    text = paths.data_dir("texts") / "heldout.txt"

    def results(k: str, layers: str | None) -> dict[str, Any]:
        return run(driver, f16_models[DENSE], text, k, k, "1", tmp_path / "s", "write", layers=layers)

    assert results("f16", "0-7:iso3") == results("iso3", None)
    assert results("f16", "-8--1:q8_0") == results("q8_0", None)


@pytest.mark.parametrize("model", [DENSE, HYBRID])
def test_centering_is_exact(driver: Path, f16_models: dict[str, Path], tmp_path: Path, model: str) -> None:
    """K in f32 so that nothing but the centering could differ; means ten times as large as K itself."""
    calib = means(f16_models[model], tmp_path / "calib.gguf", size=10.0)
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[model], text, "f32", "f16", "1", tmp_path / "state.bin")
    layers = "0:iso3/f16;0--1:f32/f16"  # the first entry chooses the rotation, the second the types
    got = run(driver, *arguments, "write", layers=layers, profile=calib)
    assert set(got) >= {"plain", "next", "sequences_unified", "sequences_streams", "copied"}
    assert ("shifted" in got) == (model == DENSE)
    assert all(error < 3e-4 for error in got.values()), got
    restored = run(driver, *arguments, "read", layers=layers, profile=calib)
    assert restored == {"restored": True, "state": pytest.approx(0, abs=1e-7)}
    other = means(f16_models[model], tmp_path / "other.gguf", size=9.0)
    for file in (None, other):  # a state is for one calibration
        assert run(driver, *arguments, "read", layers=layers, profile=file) == {"restored": False}


@pytest.mark.parametrize("types", [("iso3", "iso3"), ("planar4", "f16")])
def test_a_centered_cache_survives_it_too(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path, types: tuple[str, str]
) -> None:
    rotation = types[0][:-1] + "/full"
    calib = means(f16_models[DENSE], tmp_path / "calib.gguf", size=0.3, rotation=rotation)
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[DENSE], text, *types, "1", tmp_path / "state.bin")
    got = run(driver, *arguments, "write", profile=calib)
    assert got["plain"] > 0 and all(error < 0.05 for error in got.values()), got
    assert run(driver, *arguments, "read", profile=calib)["state"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("model", [DENSE, HYBRID])
@pytest.mark.parametrize("no_means", [False, True])
def test_a_profile_is_exact(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path, model: str, no_means: bool
) -> None:
    """K in f32 so that nothing but the profile could differ, in all that a cache goes through."""
    profile = metric(f16_models[model], tmp_path / "kv.gguf", spread=3.0, no_means=no_means)
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[model], text, "f32", "f16", "1", tmp_path / "state.bin")
    layers = "0:iso3/f16;0--1:f32/f16"  # the first entry chooses the rotation, the second the types
    got = run(driver, *arguments, "write", layers=layers, profile=profile)
    assert set(got) >= {"plain", "next", "sequences_unified", "sequences_streams", "copied"}
    assert ("shifted" in got) == (model == DENSE)
    assert all(error < 3e-4 for error in got.values()), got
    restored = run(driver, *arguments, "read", layers=layers, profile=profile)
    assert restored == {"restored": True, "state": pytest.approx(0, abs=1e-7)}
    other = metric(f16_models[model], tmp_path / "other.gguf", spread=3.0, no_means=no_means, seed=8)
    for file in (None, other):  # a state is for one profile
        assert run(driver, *arguments, "read", layers=layers, profile=file) == {"restored": False}


@pytest.mark.parametrize(
    ("types", "layers", "mode"),
    [
        (("iso3", "iso3"), None, None),
        (("planar4", "f16"), "0:q8_0/f16", None),
        (("rotor3", "q8_0"), None, "block"),
    ],
)
def test_a_cache_with_a_profile_survives_it_too(
    driver: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    types: tuple[str, str],
    layers: str | None,
    mode: str | None,
) -> None:
    profile = metric(f16_models[DENSE], tmp_path / "kv.gguf", spread=1.3)
    text = paths.data_dir("texts") / "heldout.txt"
    arguments = (f16_models[DENSE], text, *types, "1", tmp_path / "state.bin")
    got = run(driver, *arguments, "write", layers=layers, mode=mode, profile=profile)
    assert got["plain"] > 0 and all(error < 0.05 for error in got.values()), got
    restored = run(driver, *arguments, "read", layers=layers, mode=mode, profile=profile)
    assert restored["state"] == pytest.approx(0, abs=1e-7)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"--kv-layers": "8:iso3"}, "there is no layer 8, the model has 8 with a KV cache, 0 to 7"),
    ({"--kv-layers": "-9:iso3"}, "there is no layer -9"),
    ({"--kv-layers": "3-1:iso3"}, "the range 3-1 runs backwards"),
    ({"--kv-layers": "0:iso6"}, "there is no cache type 'iso6'"),
    ({"--kv-layers": "0:q4_K"}, "there is no cache type 'q4_K'"),
    ({"--kv-layers": "a:iso3"}, "'a' is no layer and no range of layers"),
    ({"--kv-layers": "0:iso3;"}, "'' is not LAYERS:TYPE"),
    ({"--kv-layers": "0:f16/q8_0", "-fa": "off", "-ctv": "f16"}, "requires flash attention: use -fa on"),
    ({"--kv-calib": "no such file"}, "is missing or damaged"),
    ({"--kv-calib": {"damaged": True}}, "is missing or damaged"),
    ({"--kv-calib": {"type": "model"}}, "it holds no metric of K"),
    ({"--kv-calib": {"version": 2}}, "is of another version"),
    ({"--kv-calib": {"of": "0" * 16}}, "is for another model"),
    ({"--kv-calib": {"rotation": "iso/block"}}, "is for K rotated by iso/block/128, not iso/full/128"),
    ({"--kv-calib": {"missing": 1}}, "has no blk.0.k_mean of this model's shape"),
    ({"--kv-calib": {"head_dim": 64}}, "has no blk.0.k_mean of this model's shape"),
    ({"--kv-calib": {"nan": True}}, "has a value in blk.0.k_mean that is not finite"),
    ({"--kv-profile": {"damaged": True}}, "is missing or damaged"),
    ({"--kv-profile": {"version": 2}}, "is of another version"),
    ({"--kv-profile": {"of": "0" * 16}}, "is for another model"),
    ({"--kv-profile": {"missing": 1}}, "has no blk.0.k_map of this model's shape"),
    ({"--kv-profile": {"head_dim": 64}}, "of this model's shape"),
    ({"--kv-profile": {"nan": True}}, "has a value in blk.0.k_map that is not finite"),
    ({"--kv-profile": {"mixed_up": True}}, "do not undo each other, in layer 0"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_what_makes_no_sense_is_refused_with_a_sentence(
    llama_build: Build, f16_models: dict[str, Path], tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    given = {"-ctk": "iso3", "-ctv": "iso3"} | options
    for option in ("--kv-calib", "--kv-profile"):
        if isinstance(change := given.get(option), dict):
            out = tmp_path / "kv.gguf"
            if option == "--kv-calib":
                means(f16_models[DENSE], out, size=0.1, **change)
            else:
                metric(f16_models[DENSE], out, spread=1.1, **change)
            if change.get("damaged"):
                out.write_bytes(out.read_bytes()[:-4000])
            given[option] = str(out)
    command = [llama_build.tool("llama-completion"), "-m", f16_models[DENSE], "-no-cnv", "-p", "a", "-n", "1"]
    done = proc.run(
        [*command, *(word for pair in given.items() for word in pair)], env=ONE_THREAD, check=False
    )
    assert done.rc > 0
    assert sentence in done.stderr


def test_a_calibration_for_types_that_are_not_rotated_is_not_used(
    llama_build: Build, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    calib = means(f16_models[DENSE], tmp_path / "calib.gguf", size=0.1)
    command = [llama_build.tool("llama-completion"), "-m", f16_models[DENSE], "-no-cnv", "-p", "a", "-n", "1"]
    done = proc.run([*command, "-ctk", "q8_0", "--kv-calib", calib], env=ONE_THREAD)
    assert "is not used: K has none of the rotated types" in done.stderr


def test_options_reach_the_tools_that_have_none_by_the_environment(
    llama_build: Build, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    calib = means(f16_models[DENSE], tmp_path / "calib.gguf", size=0.1)
    env = {**ONE_THREAD, "LLAMA_RQ_LAYERS": "0:q8_0", "LLAMA_RQ_CALIB": str(calib), "LLAMA_RQ_SCALE": "norm"}
    command = [llama_build.tool("llama-bench"), "-m", f16_models[DENSE], "-ctk", "iso3", "-fa", "1", "-v"]
    done = proc.run([*command, "-p", "8", "-n", "0", "-r", "1", "-t", "1"], env=env)
    assert "K layers: 0 q8_0, 1 iso3" in done.stderr
    assert f"calibration {calib}: 8 layers" in done.stderr
    assert "scale = norm" in done.stderr


@pytest.mark.parametrize(
    ("k", "v", "mode"), [("iso3", "iso3", "block"), ("rotor3", "iso3", None), ("q8_0", "q8_0", None)]
)
def test_a_state_of_another_type_or_rotation_is_refused(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path, k: str, v: str, mode: str | None
) -> None:
    text, state = paths.data_dir("texts") / "heldout.txt", tmp_path / "state.bin"
    run(driver, f16_models[DENSE], text, "iso3", "iso3", "1", state, "write")
    assert run(driver, f16_models[DENSE], text, k, v, "1", state, "read", mode=mode) == {"restored": False}


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("LLAMA_RQ_MODE", "unknown rotation mode 'ful', use full, block, hadamard or none"),
        ("LLAMA_RQ_SCALE", "unknown scale 'ful', use inner, lsq or norm"),
    ],
)
def test_an_unknown_rotation_mode_or_scale_is_an_error(
    llama_build: Build, f16_models: dict[str, Path], variable: str, sentence: str
) -> None:
    command = [llama_build.tool("llama-completion"), "-m", f16_models[DENSE], "-ctk", "iso3", "-no-cnv"]
    done = proc.run([*command, "-p", "a", "-n", "1"], env={**ONE_THREAD, variable: "ful"}, check=False)
    assert done.rc > 0
    assert sentence in done.stderr


def test_the_scale_can_be_the_norm(driver: Path, f16_models: dict[str, Path], tmp_path: Path) -> None:
    text, state = paths.data_dir("texts") / "heldout.txt", tmp_path / "state.bin"
    arguments = (f16_models[DENSE], text, "iso3", "iso3", "1", state, "write")
    norm = proc.run([driver, *arguments], env={**ONE_THREAD, "LLAMA_RQ_SCALE": "norm"}, timeout=600)
    plain: float = json.loads(norm.stdout)["plain"]
    assert run(driver, *arguments)["plain"] < plain < 0.1


def one_token(build: Build, model: Path, **env: str) -> proc.Completed:
    command = [build.tool("llama-completion"), "-m", model, "-ctk", "iso3", "-ctv", "rotor3", "-lv", "4"]
    command += ["-p", "1 2 3", "-n", "1", "-no-cnv", "-t", "1"]
    return proc.run(command, env={**ONE_THREAD, **env}, check=False, timeout=120)


def tiny_profile(model: Path, out: Path, *, maps: bool) -> Path:
    """Means of one and, if asked for, maps of the identity, for a model of any architecture."""
    import gguf

    blocks = read_header(model).values
    arch = blocks["general.architecture"]
    heads = blocks[f"{arch}.attention.head_count_kv"]
    kind, name = ("kv-profile", "profile") if maps else ("kv-calib", "calib")
    writer = gguf.GGUFWriter(out, kind)
    writer.add_type(kind)
    writer.add_uint32(f"rq.{name}.version", 1)
    writer.add_string(f"rq.{name}.model", fingerprint(model))
    dim = blocks.get(f"{arch}.attention.key_length", 128)
    writer.add_string(f"rq.{name}.k_rotation", f"iso/full/{256 if dim % 256 == 0 else 128}")
    for il in range(blocks[f"{arch}.block_count"]):
        count = max(heads if isinstance(heads, int) else heads[il], 1)
        writer.add_tensor(f"blk.{il}.k_mean", np.ones((count, dim), np.float32))
        if maps:
            for what in ("k_map", "q_map"):
                writer.add_tensor(f"blk.{il}.{what}", np.tile(np.eye(dim, dtype=np.float32), (count, 1, 1)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("name", ["gemma3-dense", "llama4-moe", "falcon-h1-dense", "lfm2-dense"])
def test_layers_and_means_in_models_with_two_caches(
    llama_build: Build, tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Sliding windows (layers of both caches count together) and recurrent layers (these do not count)."""
    model = tiny_models[name]
    plain = one_token(llama_build, model, LLAMA_RQ_LAYERS="0:q8_0;-1:f16")
    assert plain.rc == 0, plain.stderr[-2000:]
    context = parse_context(plain.stderr)
    assert context is not None
    *others, last = context.layers["K"]  # of which recurrent models may have a single one
    assert last == "f16" and others[:1] in ([], ["q8_0"])
    assert len(context.layers["K"]) == sum(cache.layers for cache in context.caches)

    calib = tiny_profile(model, tmp_path / "calib.gguf", maps=False)
    done = one_token(llama_build, model, LLAMA_RQ_CALIB=str(calib))
    assert done.rc == 0, done.stderr[-2000:]
    loaded = re.findall(rf"calibration {calib}: (\d+) layers", done.stderr)
    assert sum(map(int, loaded[-len(context.caches) :])) == len(context.layers["K"])


@pytest.mark.parametrize(
    ("name", "why"), [("gpt-oss-moe", "has attention sinks"), ("gemma2-dense", "caps its attention scores")]
)
def test_means_are_not_used_where_they_are_not_exact(
    llama_build: Build, tiny_models: dict[str, Path], tmp_path: Path, name: str, why: str
) -> None:
    """A file of means alone is refused there; of a profile the maps remain."""
    model = tiny_models[name]
    calib = tiny_profile(model, tmp_path / "calib.gguf", maps=False)
    done = one_token(llama_build, model, LLAMA_RQ_PROFILE=str(calib))
    assert done.rc > 0
    assert f"{calib} cannot be used, it holds means alone and this model {why}" in done.stderr
    profile = tiny_profile(model, tmp_path / "kv.gguf", maps=True)
    done = one_token(llama_build, model, LLAMA_RQ_PROFILE=str(profile))
    assert done.rc == 0, done.stderr[-2000:]
    assert re.search(rf"profile {profile}: .* layers, without means", done.stderr)


def test_programs_find_the_profile_beside_the_model(
    llama_build: Build, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """By the names that ggufrq has for it; not one of another model."""
    model = tmp_path / "Tiny-UD-IQ4_XS-GGUF-00001-of-00001.gguf"
    model.symlink_to(tiny_models["qwen3-dense"])
    names = list(names_beside(model))
    assert names == ["Tiny-kv.gguf", f"{model.stem}-kv.gguf"]
    profiles = [tiny_profile(model, tmp_path / name, maps=True) for name in names]
    by_hand = {"LLAMA_RQ_PROFILE": ""}  # else ggufrq says "none"
    for profile in profiles:
        done = one_token(llama_build, model, **by_hand)
        assert done.rc == 0 and f"profile {profile}: " in done.stderr, done.stderr[-2000:]
        assert "llama_rq: profile" not in one_token(llama_build, model).stderr
        profile.rename(tmp_path / "other.gguf")
    assert "llama_rq: profile" not in one_token(llama_build, model, **by_hand).stderr

    other = tiny_profile(tiny_models["llama-dense"], profiles[0], maps=True)
    done = one_token(llama_build, model, **by_hand)
    assert done.rc == 0 and f"profile {other} is for another model and is not used" in done.stderr
    other.write_bytes(b"GGUF")
    done = one_token(llama_build, model, **by_hand)
    assert done.rc > 0 and f"the profile {other} cannot be read" in done.stderr


def test_a_profile_is_no_weight_of_the_model(
    llama_build: Build, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    """Its matrices are named as weights of K, so that devices share them; llama-imatrix sees none."""
    found = []
    for profile in ("none", str(metric(f16_models[DENSE], tmp_path / "kv.gguf", spread=1.3))):
        out = tmp_path / f"{len(found)}.gguf"
        command = [llama_build.tool("llama-imatrix"), "-m", f16_models[DENSE], "-ctk", "iso3", "-ctv", "iso3"]
        command += ["-f", paths.data_dir("texts") / "heldout.txt", "-c", "64", "--chunks", "1", "-o", out]
        proc.run([*command, "-t", "1"], env={**ONE_THREAD, "LLAMA_RQ_PROFILE": profile}, timeout=120)
        found.append({tensor.name for tensor in read_header(out).tensors})
    assert found[0] == found[1]


def test_a_bias_of_k_without_a_profile_is_told(llama_build: Build, tiny_models: dict[str, Path]) -> None:
    told = "adds a bias to K"
    assert told in one_token(llama_build, tiny_models["qwen2-dense"], LLAMA_RQ_PROFILE="").stderr
    assert told not in one_token(llama_build, tiny_models["qwen2-dense"], LLAMA_RQ_PROFILE="none").stderr
    assert told not in one_token(llama_build, tiny_models["plamo3-dense"], LLAMA_RQ_PROFILE="").stderr


def test_every_architecture_runs_or_is_refused_with_a_sentence(
    llama_build: Build, tiny_models: dict[str, Path]
) -> None:
    """None may crash with our types."""
    models = list(tiny_models.values())
    assert len(models) > 100
    refused: dict[str, str] = {}
    for model in models:
        command = [
            str(llama_build.tool("llama-completion")),
            "-m",
            str(model),
            "-ctk",
            "iso3",
            "-ctv",
            "iso3" if is_mla(read_header(model).values) else "rotor3",
        ]
        command += ["-p", "1 2 3", "-n", "4", "-no-cnv", "-t", "1"]
        done = proc.run(command, env=ONE_THREAD, check=False, timeout=120)
        output = done.stdout + done.stderr
        assert done.rc >= 0, f"{model.name} crashed: {output[-2000:]}"
        sentences = [line for line in output.splitlines() if "llama_rq: " in line and " use " in line]
        if done.rc != 0:
            if model.name.startswith("grok"):  # has no flash attention, so upstream refuses any quantized V
                continue
            assert sentences, f"{model.name}: {output[-2000:]}"
            refused[model.name] = sentences[0]
    assert not any("head_dim" in sentence for sentence in refused.values())
    assert {name.partition("-")[0] for name in refused if "whose graph" in refused[name]} == {
        "deepseek4",
        "glm5",
    }
    assert {name.partition("-")[0] for name in refused} <= {"deepseek4", "glm5", "t5"}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["FLASH_ATTN_EXT", "MUL_MAT", "GET_ROWS", "SET_ROWS", "CPY"])
def test_upstreams_test_of_operations_passes_for_our_types(llama_build: Build, op: str) -> None:
    command = [llama_build.tool("test-backend-ops"), "test", "-b", "CPU", "-o", op]
    command += ["-p", "planar|iso|rotor|recent=|rq.*v_is_view_of_k=1"]
    done = proc.run(command, env=ONE_THREAD, timeout=900)
    assert "1/1 backends passed" in done.stdout.replace("\x1b[1;32m", "").replace("\x1b[0m", "")
    assert done.stdout.count("iso3") > 2
    if op == "FLASH_ATTN_EXT":
        assert done.stdout.count("recent=33,apart=0") > 30 and done.stdout.count("recent=33,apart=1") > 6
        latent = r"hsk=(?:576|640|320|256),hsv=(?:512|256|192).*type_K=(?:rq|iso).*v_is_view_of_k=1"
        assert len(re.findall(latent, done.stdout)) > 36

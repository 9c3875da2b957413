"""The newest tokens in f16, beside a quantized cache: which query sees which, and what it changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import head_models
import pytest
from kv_drivers import DENSE, HYBRID, ONE_THREAD, run

from ggufrq.base import paths, proc
from ggufrq.build.project import Build
from ggufrq.tools.logs import parse_context

pytestmark = [pytest.mark.build, pytest.mark.models]

TEXT = paths.data_dir("texts") / "heldout.txt"


@pytest.fixture(scope="session")
def looking(compiled: Callable[[str], Path]) -> Path:
    """kv_recent.cpp, which looks at every attention."""
    return compiled("kv_recent")


@pytest.mark.parametrize(
    ("model", "k", "v", "newest", "first", "layers"),
    [
        (DENSE, "iso3", "iso3", 32, 0, None),
        (DENSE, "planar4", "f16", 5, 3, None),
        (DENSE, "q8_0", "rotor2", 1, 1, None),
        (DENSE, "q4_0", "q4_0", 32, 1, None),  # upstream's types, rotated by upstream
        (HYBRID, "q8_0", "f16", 16, 2, None),
        (DENSE, "iso3", "iso3", 64, 4, "0:q8_0;-1:f16"),
        (HYBRID, "iso3", "rotor4", 32, 1, None),
    ],
)
def test_a_query_sees_just_its_newest_and_first_tokens_as_they_were_computed(
    looking: Path,
    f16_models: dict[str, Path],
    model: str,
    k: str,
    v: str,
    newest: int,
    first: int,
    layers: str | None,
) -> None:
    what = "all" if model == DENSE else "recurrent"
    arguments = (f16_models[model], TEXT, k, v, f"{newest},{first}", "1", what)
    assert run(looking, *arguments, layers=layers)["checked"] > 3000


@pytest.mark.parametrize("name", ["576/512 (MLA)", "640/512 (MLA)", "192/128"])
def test_so_it_is_where_k_is_compressed(looking: Path, tmp_path: Path, name: str) -> None:
    """With MLA V is the first values of what is held of K."""
    models: dict[str, Callable[[Path], Path]] = {
        "576/512 (MLA)": head_models.latent,
        "640/512 (MLA)": lambda path: head_models.latent(path, 512, 128),
        "192/128": lambda path: head_models.expanded(path, 128, 64, 128),
    }
    arguments = (models[name](tmp_path / "m.gguf"), TEXT, "iso3", "iso3", "32,1", "1", "all")
    assert run(looking, *arguments)["checked"] > 3000


@pytest.mark.parametrize(
    ("model", "kind", "loses"), [(DENSE, "iso2", 1e-3), (HYBRID, "iso2", 1e-3), (DENSE, "q4_0", 3e-4)]
)
def test_if_all_tokens_are_newest_the_cache_is_as_good_as_f16(
    driver: Path, f16_models: dict[str, Path], tmp_path: Path, model: str, kind: str, loses: float
) -> None:
    arguments = (f16_models[model], TEXT, kind, kind, "1", tmp_path / "state.bin", "write")
    got = run(driver, *arguments, recent=1024)
    assert got["plain"] < 1e-4 and got["next"] < 1e-4, got
    assert run(driver, *arguments)["plain"] > loses
    assert max(got["sequences_unified"], got["sequences_streams"], got["copied"]) < 1e-4, got


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gemma3-dense", "sliding windows"),
        ("llama4-moe", "chunks as windows"),
        ("exaone4-dense", "windows"),
        ("gpt-oss-moe", "attention sinks"),
        ("gemma2-dense", "capped scores"),
    ],
)
def test_so_it_is_in_models_with_other_attention(
    driver: Path, tiny_models: dict[str, Path], tmp_path: Path, name: str, what: str
) -> None:
    arguments = (tiny_models[name], TEXT, "iso2", "iso2", "1", tmp_path / "state.bin", "write")
    got, without = run(driver, *arguments, recent=1024), run(driver, *arguments)
    assert 0 < got["plain"] < without["plain"] / 100 and got["next"] < without["next"] / 100, what
    some = run(driver, *arguments, recent=32)
    assert got["plain"] < some["plain"] < without["plain"], what


@pytest.mark.parametrize("model", [DENSE, HYBRID])
@pytest.mark.parametrize(("types", "bound"), [(("iso3", "planar4"), 0.02), (("iso4", "f16"), 0.005)])
def test_a_cache_with_the_newest_tokens_survives_what_any_does(
    driver: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    model: str,
    types: tuple[str, str],
    bound: float,
) -> None:
    arguments = (f16_models[model], TEXT, *types, "1", tmp_path / "state.bin")
    got = run(driver, *arguments, "write", recent=32)
    assert 0 < got["plain"] < bound and 0 < got["next"] < bound, got
    if model == DENSE:
        assert 0 < got["shifted"] < 2 * bound, got
    assert max(got["sequences_unified"], got["sequences_streams"], got["copied"]) < bound, got
    # a restored state holds none of them: the next tokens see the cache, as they do without
    restored = run(driver, *arguments, "read", recent=32)
    assert restored["restored"] and restored["state"] < bound
    # and may be one that was saved without, or be read without
    assert run(driver, *arguments, "read")["restored"]


def test_the_first_tokens_help_alone(driver: Path, f16_models: dict[str, Path], tmp_path: Path) -> None:
    arguments = (f16_models[DENSE], TEXT, "iso2", "iso2", "1", tmp_path / "state.bin", "write")
    got, without = run(driver, *arguments, first=16), run(driver, *arguments)
    assert 0 < got["plain"] != without["plain"] > 0
    assert run(driver, *arguments, first=1024)["plain"] < 1e-4


def logs(build: Build, model: Path, *options: str, **env: str) -> proc.Completed:
    command = [build.tool("llama-completion"), "-m", model, "-no-cnv", "-t", "1", "-lv", "4", *options]
    return proc.run([*command], env={**ONE_THREAD, **env}, check=False, timeout=120)


def test_what_they_take_is_in_the_log(llama_build: Build, f16_models: dict[str, Path]) -> None:
    options = ["-p", "a", "-n", "1", "-c", "512", "-ctk", "iso3", "-ctv", "iso4", "--kv-recent", "32"]
    options += ["--kv-first", "2"]
    done = logs(llama_build, f16_models[DENSE], *options)
    context = parse_context(done.stderr)
    assert context is not None
    assert (context.recent, context.first) == (32, 2)
    assert context.recent_bytes == 35 * 2 * 8 * 2 * 256  # rows of 8 layers, K and V, 2 heads of 128


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-ctk", "f16", "-ctv", "bf16"], "neither K nor V is quantized"),
        (["-ctk", "iso3", "-fa", "off"], "that takes flash attention, use -fa on"),
    ],
)
def test_where_they_cannot_be_held_the_log_says_why(
    llama_build: Build, f16_models: dict[str, Path], options: list[str], sentence: str
) -> None:
    done = logs(llama_build, f16_models[DENSE], "-p", "a", "-n", "1", "--kv-recent", "8", *options)
    assert done.rc == 0
    assert f"the newest 8 and first 0 tokens are not held in f16: {sentence}" in done.stderr


@pytest.mark.parametrize("variable", ["LLAMA_RQ_RECENT", "LLAMA_RQ_FIRST"])
@pytest.mark.parametrize("value", ["-1", "4097", "32x", "99999999999"])
def test_what_is_no_number_of_tokens_is_an_error(
    llama_build: Build, f16_models: dict[str, Path], variable: str, value: str
) -> None:
    options = ["-p", "a", "-n", "1", "-ctk", "iso3"]
    done = logs(llama_build, f16_models[DENSE], *options, **{variable: value})
    assert done.rc > 0
    assert f"{variable}: '{value}' is no number of tokens, use 0 to 4096" in done.stderr


@pytest.mark.slow
def test_every_architecture_that_runs_without_runs_with_them(
    llama_build: Build, tiny_models: dict[str, Path]
) -> None:
    """Several ubatches, so that rows of an earlier one are read; among them models with sliding windows,
    shared and recurrent layers."""
    options = ["-p", "1 2 3 4 5 6 7 8 9 10 11 12", "-n", "6", "-ub", "4", "-b", "4", "--temp", "0"]
    options += ["-ctk", "iso3", "-ctv", "rotor3"]
    held = 0
    for model in tiny_models.values():
        done = logs(llama_build, model, *options, LLAMA_RQ_RECENT="3")
        assert done.rc >= 0, f"{model.name} crashed: {done.stderr[-2000:]}"
        if done.rc > 0:
            assert logs(llama_build, model, *options).rc > 0, f"{model.name}: {done.stderr[-2000:]}"
            continue
        context = parse_context(done.stderr)
        held += context is not None and context.recent == 3
    assert held > len(tiny_models) / 2

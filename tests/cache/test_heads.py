"""Heads and attention of every kind on models of random weights, through llama.h, against f16: shifted
positions, sequences, copied ones, saved states."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import head_models
import numpy as np
import pytest
from kv_drivers import ONE_THREAD, metric, run

from ggufrq.base import paths, proc
from ggufrq.base.loopback import free_port, session
from ggufrq.build.project import Build
from ggufrq.cache.kv import kv_type, parse_kv, parse_plan
from ggufrq.drive.serve import Draft, started
from ggufrq.tools import server
from ggufrq.tools.logs import parse_context, parse_draft

pytestmark = [pytest.mark.build, pytest.mark.models]

TEXT = paths.data_dir("texts") / "heldout.txt"
#: Normalised errors of logits: what four and three bits lose here, and what anything read wrongly is above.
FOUR, THREE = 0.15, 0.5

MODELS: dict[str, Callable[[Path], Path]] = {
    "80": lambda path: head_models.ordinary(path, 80),
    "80, an odd number of heads": lambda path: head_models.ordinary(path, 80, heads=3, kv_heads=3),
    "96": lambda path: head_models.ordinary(path, 96),
    "112": lambda path: head_models.ordinary(path, 112),
    "192/128": lambda path: head_models.expanded(path, 128, 64, 128),
    "96/64": lambda path: head_models.expanded(path, 64, 32, 64),
    "112/80": lambda path: head_models.expanded(path, 64, 48, 80),
    "256 in windows, 512": head_models.gemma4,
    "80 in windows, 112": lambda path: head_models.gemma4(path, 80, 112),
    "MLA 576/512": head_models.latent,
    "MLA 640/512": lambda path: head_models.latent(path, 512, 128),
    "MLA 256/192": lambda path: head_models.latent(path, 192, 64),
}
#: Heads in which four bits are no fewer than q4_0's, when they are filled up.
ONLY_THREE = ("96", "96/64")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(name): the model of that name in MODELS."""
    folder = tmp_path_factory.mktemp("heads")
    found: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in found:
            found[name] = MODELS[name](folder / f"{len(found)}.gguf")
        return found[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_what_any_cache_survives(
    driver: Path, made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    kind, bound = ("iso3", THREE) if name in ONLY_THREE else ("iso4", FOUR)
    arguments = (made(name), TEXT, kind, kind, "1", tmp_path / "state.bin")
    got = run(driver, *arguments, "write")
    assert 0 < max(got[step] for step in ("plain", "next", "shifted")) < bound, got
    assert max(got[step] for step in got if step[0] in "sc" and step != "shifted") < 1e-3, got
    restored = run(driver, *arguments, "read")
    assert restored == {"restored": True, "state": pytest.approx(0, abs=1e-3)}


@pytest.mark.parametrize(("k", "v"), [("iso4", "f16"), ("f16", "rotor4"), ("planar3", "iso4")])
def test_one_side_is_filled_up_and_pairs(
    driver: Path, made: Callable[[str], Path], tmp_path: Path, k: str, v: str
) -> None:
    got = run(driver, made("80"), TEXT, k, v, "1", tmp_path / "state.bin", "write")
    assert 0 < max(got[step] for step in ("plain", "next", "shifted")) < THREE, got


def test_layers_of_upstream_types_beside_heads_that_are_filled_up(
    driver: Path, made: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = (made("80"), TEXT, "iso4", "iso4", "1", tmp_path / "state.bin", "write")
    alike, beside = run(driver, *arguments), run(driver, *arguments, layers="0:f16;1:q8_0/iso4")
    assert 0 < beside["plain"] < FOUR and beside["plain"] != alike["plain"]


@pytest.mark.parametrize("name", ["80", "96"])
def test_newest_tokens_and_a_profile_beside_heads_that_are_filled_up(
    driver: Path, made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    model = made(name)
    arguments = (model, TEXT, "iso3", "iso3", "1", tmp_path / "state.bin", "write")
    assert run(driver, *arguments, recent=1024)["next"] < 1e-3 * run(driver, *arguments)["next"]
    profile = metric(
        model, tmp_path / "kv.gguf", spread=1.3, layers=range(head_models.LAYERS), head_dim=int(name)
    )
    got = run(driver, *arguments, profile=profile)
    assert 0 < max(got[step] for step in ("plain", "next", "shifted")) < THREE, got


@pytest.mark.parametrize(
    ("name", "kind"), [("MLA 576/512", "iso2"), ("MLA 640/512", "rotor3"), ("192/128", "planar2")]
)
def test_newest_tokens_beside_compressed_keys(
    driver: Path, made: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    """With MLA rows of K alone are held, and V is the first values of these, too."""
    arguments = (made(name), TEXT, kind, kind, "1", tmp_path / "state.bin")
    without, got = run(driver, *arguments, "write"), run(driver, *arguments, "write", recent=1024)
    for step in ("plain", "next", "sequences_unified", "sequences_streams", "copied"):
        assert got[step] < without["plain"] / 300, (step, got, without)
    some = run(driver, *arguments, "write", recent=32, first=1)
    assert got["next"] < some["next"] < without["next"]
    assert run(driver, *arguments, "read", recent=32)["restored"]


def _log(build: Build, model: Path, k: str, v: str, n_ctx: int = 256) -> proc.Completed:
    command = [build.tool("llama-completion"), "-m", model, "-ctk", k, "-ctv", v, "-lv", "4"]
    command += ["-p", "1 2 3", "-n", "1", "-no-cnv", "-t", "1", "-c", str(n_ctx)]
    return proc.run(command, env=ONE_THREAD, check=False, timeout=120)


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        (
            "96",
            "iso4",
            r"K head_dim of 96 in fewer bits than q4_0: .* 5\.50 .*, use q4_0 \(4\.50\) or iso3 \(4\.17\)",
        ),
        ("96/64", "rotor4", r"K head_dim of 96 .* or rotor3 \(4\.17\)"),
    ],
)
def test_heads_that_do_not_pay_are_refused(
    llama_build: Build, made: Callable[[str], Path], name: str, kind: str, sentence: str
) -> None:
    done = _log(llama_build, made(name), kind, kind)
    assert done.rc > 0 and re.search(sentence, done.stderr), done.stderr[-2000:]


def test_the_bytes_are_as_they_are_told(llama_build: Build, made: Callable[[str], Path]) -> None:
    """Of heads that are filled up, and of K alone where V is a view of it."""
    for name, k_head, v_head, heads in (("80", 80, 80, 2), ("112/80", 112, 80, 4), ("MLA 576/512", 64, 0, 9)):
        done = _log(llama_build, made(name), "iso3", "iso3", 4096)
        context = parse_context(done.stderr)
        assert context is not None, done.stderr[-2000:]
        kinds = [kv_type("iso3").for_heads(head) for head in (k_head, v_head)]
        row = sum(kind.bytes_for(heads * head) for kind, head in zip(kinds, (k_head, v_head), strict=True))
        assert context.kv_bytes == 4096 * head_models.LAYERS * row
        assert context.filled == (k_head % 64 != 0)


@pytest.mark.parametrize(("mode", "kind"), [("none", "iso4"), ("hadamard", "planar4"), ("full", "rotor4")])
def test_the_values_of_latent_keys_are_turned_back_in_every_mode(
    driver: Path, made: Callable[[str], Path], tmp_path: Path, mode: str, kind: str
) -> None:
    """Also where 128 or 256 values are turned together, which once was wrong."""
    for name in ("MLA 576/512", "MLA 640/512"):
        arguments = (made(name), TEXT, kind, kind, "1", tmp_path / "state.bin", "write")
        assert run(driver, *arguments, mode=mode)["plain"] < FOUR, name


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("deepseek32-moe", "MLA with an indexer"),
        ("glm-dsa-moe", "the same, not in every layer"),
        ("hy_v4-moe", "the same with hyper-connections"),
        ("dots3note-moe", "the same with windows"),
        ("minimax-m3-moe", "an indexer, its graph attends by itself"),
        ("qwen4exp-moe", "an indexer beside recurrent layers"),
    ],
)
def test_an_indexer_keeps_its_keys_in_f16(
    llama_build: Build, driver: Path, tiny_models: dict[str, Path], tmp_path: Path, name: str, what: str
) -> None:
    arguments = (tiny_models[name], TEXT, "iso4", "iso4", "1", tmp_path / "state.bin")
    got = run(driver, *arguments, "write")
    coarse = run(driver, tiny_models[name], TEXT, "iso2", "iso2", "1", tmp_path / "coarse.bin", "write")
    assert 0 < got["plain"] < coarse["plain"] / 4 < 1e-2, what
    if "shifted" in got:
        assert got["shifted"] < 4 * got["plain"], got
    assert max(got[step] for step in got if step[0] in "sc" and step != "shifted") < got["plain"] / 10, got
    assert run(driver, *arguments, "read")["restored"]

    done = _log(llama_build, tiny_models[name], "iso4", "iso4")
    printed = re.findall(r"K \((\w+)\): +[\d.]+ MiB, V \((\w+)\)", done.stderr)
    assert "f16" in {k for k, _ in printed} and ("iso4", "iso4") in printed
    context = parse_context(done.stderr)
    assert context is not None and context.k_types == {"iso4"}


@pytest.mark.parametrize(
    ("name", "why"),
    [("deepseek4-moe", "copies the keys of its window"), ("glm5-next-moe", "reads keys past attention")],
)
def test_graphs_that_read_keys_otherwise_are_refused(
    llama_build: Build, tiny_models: dict[str, Path], name: str, why: str
) -> None:
    done = _log(llama_build, tiny_models[name], "iso3", "iso3")
    assert done.rc > 0
    assert re.search(rf"do not work with this model, whose graph {why}.*: use q8_0 instead", done.stderr)
    assert _log(llama_build, tiny_models[name], "q8_0", "q8_0").rc == 0


@pytest.mark.parametrize("name", ["gpt-oss-moe", "gemma2-dense"])
def test_sinks_and_capped_scores_with_a_profile(
    driver: Path, tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The matrices of a profile leave scores as they are, so that nothing is lost beside the rounding; its
    means would be added to the scores of sinks and caps, and are left out."""
    model = tiny_models[name]
    profile = metric(model, tmp_path / "kv.gguf", spread=1.3, layers=range(2), head_dim=128, mean=30.0)
    arguments = (model, TEXT, "f16", "iso4", "1", tmp_path / "state.bin", "write")
    without = run(driver, *arguments)
    arguments = (model, TEXT, "iso4", "iso4", "1", tmp_path / "state.bin", "write")
    got = run(driver, *arguments, profile=profile)
    assert 0 < got["plain"] < 4 * without["plain"], got
    exact = run(driver, *arguments, profile=profile, recent=1024, first=1)
    assert exact["plain"] < got["plain"] / 20 and exact["next"] < got["next"] / 20, exact
    assert np.isfinite(list(got.values())).all()


def test_a_draft_that_reads_the_cache_of_its_model(llama_build: Build, tmp_path: Path) -> None:
    """Heads are filled up in it, too, whatever types are asked for it. All tokens are one, so that what is
    guessed depends on the cache alone: the nearer to what it is in f16 the more bits that has."""
    model, draft = tmp_path / "model.gguf", tmp_path / "draft.gguf"
    head_models.gemma4(model, 80, 112)
    head_models.gemma4_assistant(draft, 80, 112)
    body = {"n_predict": 32, "temperature": 0, "ignore_eos": True, "logit_bias": [[66, 1000]]}
    prompt = [3 + i * i % (head_models.TOKENS - 3) for i in range(300)]
    alike, exact = {}, []
    for kv in ("f16", "iso4", "iso2"):
        port, log = free_port(), tmp_path / "server.log"
        how = Draft(draft, parse_kv("f16")).arguments()
        args = server.arguments(
            model, parse_plan(kv), host="127.0.0.1", port=port, n_ctx=512, threads=1, extra=how
        )
        url = f"http://127.0.0.1:{port}"
        command = [llama_build.tool("llama-server"), *args, "-lv", "5"]
        with started(command, url, log_path=log, env=ONE_THREAD):
            assert session().post(f"{url}/completion", json=body | {"prompt": prompt}, timeout=60).ok
        told = log.read_text()
        guesses = re.findall(r"draft candidate +(\d+, pos +\d+: +\d+) ", told)
        exact = exact or guesses
        alike[kv] = sum(a == b for a, b in zip(exact, guesses, strict=True)) / len(exact)
        found = parse_draft(told)
        assert found is not None and found[0] == draft.name and found[1].filled == (kv != "f16")
    assert alike["f16"] == 1 > alike["iso4"] > 0.4 and alike["iso2"] < 0.8 * alike["iso4"], alike

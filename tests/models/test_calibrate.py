"""Calibration with the real build: what llama-rq-moments sums is what goes into RoPE, and a profile from a
text pays where K has a constant part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import biased
import numpy as np
import pytest
import random_models
from click.testing import CliRunner
from kv_capture import captured
from kv_state import read_kv_state

from ggufrq.base import paths, proc
from ggufrq.base.errors import ModelError, ToolError
from ggufrq.build.project import Build
from ggufrq.cache.kv import Sought, parse_kv, parse_plan
from ggufrq.cli import cli
from ggufrq.drive.profiles import Found, find
from ggufrq.ggufs.header import read_header
from ggufrq.make.plan import Family
from ggufrq.measure.calibrate import profile_from_text
from ggufrq.models.convert import convert
from ggufrq.profile.file import read_profile
from ggufrq.profile.layers import layer_input, sides
from ggufrq.profile.sums import LayerSums, read_sums
from ggufrq.profile.text import noise
from ggufrq.profile.whole import Whole
from ggufrq.tools import moments, perplexity

pytestmark = pytest.mark.build

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"
TEXT = paths.data_dir("texts") / "calibration.txt"
HELDOUT = paths.data_dir("texts") / "heldout.txt"


@pytest.mark.parametrize(("name", "layers", "dim"), [(DENSE, range(8), 128), (HYBRID, (3, 7), 256)])
def test_a_capture_has_k_and_v_of_all_layers(
    llama_build: Build,
    families: dict[str, Family],
    tmp_path: Path,
    name: str,
    layers: tuple[int, ...],
    dim: int,
) -> None:
    """And they are those that llama-completion keeps for the same text, in f32."""
    model = families[name].file("Q8_0")
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    states = captured(model, text, llama_build, n_ctx=256, chunks=2, threads=1)
    (first, first_k), (second, second_k) = ((s, {il: s.layers[il].k.copy() for il in layers}) for s in states)
    assert list(first.layers) == list(second.layers) == list(layers)
    assert first.tokens != second.tokens and len(first.tokens) == 256
    for il in layers:
        assert first_k[il].shape == (256, 2, dim) and first_k[il].dtype == np.float16
        assert not np.array_equal(first_k[il], second_k[il])

    saved = tmp_path / "state.bin"
    command = [
        llama_build.tool("llama-completion"),
        "-m",
        model,
        "-f",
        text,
        "--no-escape",
        "-no-cnv",
        "-n",
        "1",
    ]
    command += ["-c", "2048", "-fa", "on", "-ctk", "f32", "-ctv", "f32", "-t", "1", "--prompt-cache", saved]
    proc.run(command)
    whole = read_kv_state(saved, model)
    assert whole.tokens[:256] == first.tokens
    for il in layers:
        exact = whole.layers[il].k[:256]
        assert exact.dtype == np.float32
        assert np.abs(exact - first_k[il]).max() < 0.01 * np.abs(exact).max()


def kld(build: Build, model: Path, base: Path, kv: str, *options: str) -> float:
    """Mean divergence from ``base`` over two chunks of held-out text; without ``kv`` makes ``base``."""
    common = ["-m", model, "-f", HELDOUT, "-c", "1024", "--chunks", "2", "-t", "1", "-fa", "on"]
    args = [*common, "--kl-divergence-base", base]
    if kv:
        args += ["--kl-divergence", *parse_kv(kv).arguments(), "-lv", "4", *options]
    done = proc.run([build.tool("llama-perplexity"), *args])
    return perplexity.parse_divergence(done.stdout, done.stderr).kld_mean if kv else 0.0


@pytest.fixture(scope="session")
def tokenizer(families: dict[str, Family]) -> dict[str, Any]:
    """The metadata of an embedded model."""
    return read_header(families[DENSE].file("Q8_0")).values


def summed(build: Build, model: Path, out: Path, n_ctx: int, chunks: int) -> dict[int, LayerSums]:
    """What the program sums over the first chunks of TEXT."""
    args = moments.arguments(model, TEXT, out, n_ctx=n_ctx, chunks=chunks, threads=1)
    done = proc.run([build.tool(moments.PROGRAM), *args])
    moments.check(done.stdout, done.stderr)
    return read_sums(out).all


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "qwen3moe", "smollm3", "granite", "gemma", "gemma2", "gemma3"]
)
def test_sums_of_the_first_layer_are_those_of_numpy(
    llama_build: Build, tokenizer: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """Norm, rows, bias and QK-norm in numpy give K and Q as they go into RoPE, and K behind it is that which
    the cache has."""
    model = random_models.write(name, tmp_path / "model.gguf", tokenizer)
    # states of models with windows cannot be read: the tokens are of another one, and K is not compared
    windows = name in ("gemma2", "gemma3")
    like = random_models.write("llama", tmp_path / "like.gguf", tokenizer) if windows else model
    sums = summed(llama_build, model, tmp_path / "sums.gguf", 128, 2)
    tokens, kept = [], []
    for state in captured(like, TEXT, llama_build, n_ctx=128, chunks=2, threads=1, kv=parse_plan("f32")):
        tokens += list(state.tokens)
        kept.append(np.asarray(state.layers[0].k, np.float64).copy())

    whole = Whole.of(model)
    q, k = sides(whole.tensors, whole.facts, whole.shape, 0, 0)
    source = layer_input(whole.tensors, whole.facts, 0)
    assert source.weight is not None
    x = whole.tensors.rows("token_embd.weight").astype(np.float64)[tokens]
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True)) * source.weight
    found = {}
    for side in (q, k):
        y = x @ whole.tensors.rows(f"{side.tensor}.weight").T.astype(np.float64)
        bias = whole.tensors.vector(f"{side.tensor}.bias")
        y = (y if bias is None else y + bias).reshape(-1, side.heads, side.dim)
        weight = whole.tensors.vector(f"blk.0.attn_{side.letter}_norm.weight")
        if weight is not None:
            y = y / np.sqrt((y**2).mean(axis=2, keepdims=True)) * weight
        found[side.letter] = y
    rope = whole.rope(0, k.dim)
    assert rope is not None and sums[0].how == "rope" and sums[0].tokens == 256
    turned = np.stack([y @ rope.matrix(i % 128).T for i, y in enumerate(found["k"])])
    off = 0.0 if windows else np.abs(turned - np.concatenate(kept)).max()
    assert off < 2e-3 * np.abs(turned).max()

    by_group = found["q"].reshape(256, k.heads, -1, k.dim)
    expected = {
        "k": found["k"].sum(axis=0),
        "kk": np.einsum("thi,thj->hij", found["k"], found["k"]),
        "qq": np.einsum("thgi,thgj->hij", by_group, by_group),
    }
    for what, values in expected.items():
        got = getattr(sums[0], what)
        if what == "qq":  # what scales Q as a whole, before RoPE or behind it, is of no consequence
            got, values = (part / np.trace(part, axis1=1, axis2=2).sum() for part in (got, values))
        assert got.shape == values.shape
        assert np.abs(got - values).max() < 3e-3 * np.abs(values).max(), what


@pytest.mark.parametrize(("name", "layers"), [(DENSE, range(8)), (HYBRID, (3, 7))])
def test_sums_of_all_layers_are_those_of_the_cache(
    llama_build: Build, families: dict[str, Family], tmp_path: Path, name: str, layers: tuple[int, ...]
) -> None:
    """K in the cache, turned back from its position."""
    model = families[name].file("Q8_0")
    sums = summed(llama_build, model, tmp_path / "sums.gguf", 256, 1)
    assert list(sums) == list(layers)
    (state,) = captured(model, TEXT, llama_build, n_ctx=256, chunks=1, threads=1)
    whole = Whole.of(model)
    for il in layers:
        k = np.asarray(state.layers[il].k, np.float64)
        rope = whole.rope(il, k.shape[2])
        assert rope is not None and rope.scale == 1
        k = np.stack([row @ rope.matrix(p) for p, row in enumerate(k)])
        second = np.einsum("thi,thj->hij", k, k)
        assert np.abs(sums[il].kk - second).max() < 0.01 * np.abs(second).max()
        assert np.abs(sums[il].k - k.sum(axis=0)).max() < 0.01 * np.abs(k.sum(axis=0)).max()


def test_a_stopped_run_goes_on(llama_build: Build, families: dict[str, Family], tmp_path: Path) -> None:
    """And comes to the same, to the bit; what is damaged is made anew."""
    model = families[DENSE].file("Q8_0")
    whole, out = tmp_path / "whole.gguf", tmp_path / "stopped.gguf"
    summed(llama_build, model, whole, 256, 5)
    args = moments.arguments(model, TEXT, out, n_ctx=256, chunks=5, threads=1)
    command = [llama_build.tool(moments.PROGRAM), *args]

    def stop(text: str) -> None:
        if "[2]" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        proc.run(command, on_stdout=stop)
    with pytest.raises(ModelError, match="of 5 chunks only"):
        read_sums(out)
    rest = proc.run(command).stdout
    planned = moments.plan(rest)
    assert planned is not None and planned[0] == 5 and planned[1] >= 2 and "[1]" not in rest
    assert out.read_bytes() == whole.read_bytes()
    out.write_bytes(out.read_bytes()[:-1000])
    assert moments.plan(proc.run(command).stdout) == (5, 0)
    assert out.read_bytes() == whole.read_bytes()


def test_a_profile_from_a_text_pays_where_k_is_biased(llama_build: Build, tmp_path: Path) -> None:
    """K of most channels varies by about 1; four channels of each head are made to be about 40."""
    plain = convert(paths.data_dir("models") / DENSE, tmp_path / "plain.gguf", llama_build.source)
    model = biased.plant(plain, tmp_path / "biased.gguf", 40.0)
    base, out = tmp_path / "base.kld", tmp_path / "kv.gguf"
    made = profile_from_text(model, TEXT, llama_build, positions=1024, chunks=4, threads=1)
    assert (made.tokens, made.held) == (4096, 1024)
    assert all(gain.text < 0.2 for gain in made.gains)
    for layer in made.profile.layers.values():
        assert layer.k_mean is not None
        assert (np.abs(layer.k_mean[:, biased.CHANNELS]) > 20).all()
        assert (np.abs(np.delete(layer.k_mean, biased.CHANNELS, axis=1)) < 5).all()
    made.profile.write(out)
    kld(llama_build, model, base, "")
    without = kld(llama_build, model, base, "iso3/f16")
    with_profile = kld(llama_build, model, base, "iso3/f16", "--kv-profile", str(out))
    assert without > 0.05
    assert with_profile < without / 5


@pytest.mark.usefixtures("cache")
def test_a_model_without_one_gets_one_from_a_little_text(
    llama_build: Build, families: dict[str, Family], tmp_path: Path
) -> None:
    """Once, and it leaves less noise on another text than that from the weights."""
    model = tmp_path / "some.gguf"
    model.symlink_to(families[DENSE].file("Q8_0"))
    first = find(model, Sought.AUTO, 512, llama_build)
    assert first.file is not None and first.said.startswith("profile from a text, made in ")
    assert find(model, Sought.AUTO, 512, llama_build) == Found(first.file, "profile from a text")
    weights = find(model, Sought.WEIGHTS, 512, llama_build)
    assert weights.said.startswith("profile from the weights, made in ") and weights.file is not None
    args = moments.arguments(model, HELDOUT, tmp_path / "sums.gguf", n_ctx=512, chunks=1, threads=1)
    proc.run([llama_build.tool(moments.PROGRAM), *args])
    whole, sums = Whole.of(model, 512), read_sums(tmp_path / "sums.gguf").all
    of_text, of_weights = (
        np.mean([np.log(heads).mean() for heads in noise(whole, read_profile(file), sums, 0, 512).values()])
        for file in (first.file, weights.file)
    )
    assert of_text < of_weights  # by a twentieth: K of a model as small as this has few directions that count


def test_the_command_makes_a_file_that_llama_cpp_takes(
    llama_build: Build, families: dict[str, Family], tmp_path: Path
) -> None:
    """Made from one quantization of the hybrid model, used with another."""
    out = tmp_path / "its kv.gguf"
    model = families[HYBRID].file("Q8_0")
    command = ["calibrate", str(model), "-o", str(out), "--ctx", "256", "--chunks", "4", "-t", "1"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "from this text" in done.stdout and "256 tokens held out" in done.stdout
    other = families[HYBRID].file("IQ4_XS")
    run = [llama_build.tool("llama-completion"), "-m", other, "-no-cnv", "-p", "a", "-n", "1", "-lv", "4"]
    got = proc.run([*run, "-ctk", "planar3", "--kv-profile", out, "-t", "1"])
    assert re.search(rf"profile {re.escape(str(out))}: from text, \d+ positions, 2 layers", got.stderr)


def test_a_text_that_is_too_short_is_an_error(
    llama_build: Build, families: dict[str, Family], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(ModelError, match="less than one chunk of 2048"):
        next(captured(families[DENSE].file("Q8_0"), text, llama_build, threads=1))
    with pytest.raises(ToolError, match=r"the text has \d+ tokens, less than one chunk of 1024"):
        profile_from_text(families[DENSE].file("Q8_0"), text, llama_build, threads=1)

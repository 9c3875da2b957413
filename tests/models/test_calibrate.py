"""Calibration with the real build: what llama-server computed is read right, and the means pay where K has
them."""

from __future__ import annotations

from pathlib import Path

import biased
import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from ggufrq.base import paths, proc
from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.cache.kv import parse_kv
from ggufrq.cli import cli
from ggufrq.codec import rotate
from ggufrq.drive.kv_capture import captured
from ggufrq.ggufs.kv_state import read_kv_state
from ggufrq.make.plan import Family
from ggufrq.measure.calibrate import calibrate
from ggufrq.models.convert import convert
from ggufrq.tools import perplexity

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


def test_means_pay_where_k_is_biased(llama_build: Build, tmp_path: Path) -> None:
    """K of most channels varies by about 1; four channels of each head are made to be about 40."""
    plain = convert(paths.data_dir("models") / DENSE, tmp_path / "plain.gguf", llama_build.source)
    model = biased.plant(plain, tmp_path / "biased.gguf", 40.0)
    base, out = tmp_path / "base.kld", tmp_path / "calib.gguf"
    made = calibrate(
        model, TEXT, out, llama_build, k_type=parse_kv("iso3").k, n_ctx=1024, chunks=4, threads=1
    )
    assert made.tokens == 4096 and made.rotation == "iso/full/128"
    assert all(layer.share > 0.8 for layer in made.layers)
    for layer, tensor in zip(made.layers, gguf.GGUFReader(out).tensors, strict=True):
        assert tensor.name == f"blk.{layer.layer}.k_mean"
        back = rotate(tensor.data, "iso", "full")  # its own inverse
        assert (np.abs(back[:, biased.CHANNELS]) > 20).all()
        assert (np.abs(np.delete(back, biased.CHANNELS, axis=1)) < 5).all()
    kld(llama_build, model, base, "")
    without = kld(llama_build, model, base, "iso3/f16")
    with_means = kld(llama_build, model, base, "iso3/f16", "--kv-calib", str(out))
    assert without > 0.05
    assert with_means < without / 5


def test_the_command_makes_a_file_that_llama_cpp_takes(
    llama_build: Build, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made from one quantization of the hybrid model, used with another."""
    monkeypatch.setattr("ggufrq.cli.calibrate.require_build", lambda: llama_build)
    out = tmp_path / "kv calib.gguf"
    model = families[HYBRID].file("Q8_0")
    command = ["calibrate", str(model), "-o", str(out), "--ctx", "256", "--chunks", "2", "--kv", "planar4"]
    done = CliRunner().invoke(cli, [*command, "-t", "1"])
    assert done.exit_code == 0, done.output
    other = families[HYBRID].file("IQ4_XS")
    run = [llama_build.tool("llama-completion"), "-m", other, "-no-cnv", "-p", "a", "-n", "1", "-lv", "4"]
    got = proc.run([*run, "-ctk", "planar3", "--kv-calib", out, "-t", "1"])
    assert f"llama_rq: calibration {out}: 2 layers" in got.stderr


def test_a_text_that_is_too_short_is_an_error(
    llama_build: Build, families: dict[str, Family], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(ModelError, match="less than one chunk of 2048"):
        next(captured(families[DENSE].file("Q8_0"), text, llama_build, threads=1))

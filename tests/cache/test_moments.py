"""llama-rq-moments on upstream's tiny models of many architectures: it finds what goes into RoPE."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from kv_drivers import ONE_THREAD

from ggufrq.base import paths, proc
from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.profile.sums import read_sums
from ggufrq.profile.text import profile_from_sums
from ggufrq.profile.whole import Whole
from ggufrq.tools import moments, passed_on

pytestmark = pytest.mark.build

#: Windows with a RoPE of their own, layers without RoPE, no RoPE at all, Q, K and V in one tensor, RoPE of a
#: part of a head, recurrent layers between, a factor on K, sinks, a bias, gated queries, several axes, norms
#: behind RoPE with weights and without.
NAMES = (
    "gemma3-dense", "smallthinker-moe", "smollm3-dense", "cohere2-dense", "mpt-dense", "phi3-dense",
    "phi2-dense", "lfm2-dense", "falcon-h1-dense", "gpt-oss-moe", "qwen2-dense", "qwen35-dense",
    "qwen3vl-dense", "chatglm-dense", "hunyuan-dense-dense", "llama4-moe",
)  # fmt: skip


def sums_of(build: Build, model: Path, folder: Path) -> Path:
    text, out = folder / "text.txt", folder / "sums.gguf"
    text.write_text(" ".join(str(3 + i % 120) for i in range(300)))
    args = moments.arguments(model, text, out, n_ctx=32, chunks=4, threads=1)
    done = proc.run([build.tool(moments.PROGRAM), *args], env=ONE_THREAD)
    moments.check(done.stdout, done.stderr)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_sums_in_every_kind_of_layer(
    llama_build: Build, tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    sums = read_sums(sums_of(llama_build, tiny_models[name], tmp_path))
    whole = Whole.of(tiny_models[name], 64)
    assert list(sums.fit) == list(sums.held) == list(whole.readers)
    for il, layer in sums.all.items():
        kept = whole.shape.layers[il]
        assert layer.tokens == 128
        assert layer.kk.shape == layer.qq.shape == (kept.k // kept.head_k, kept.head_k, kept.head_k)
        for square in (layer.kk, layer.qq):
            assert np.linalg.eigvalsh(square).min() > -1e-3 * np.abs(square).max()
        mean = layer.k / layer.tokens
        assert (np.einsum("hi,hi->h", mean, mean) <= np.trace(layer.kk, axis1=1, axis2=2) / 128).all()
    profile_from_sums(whole, sums.all)


def test_where_it_is_not_found_is_said(
    llama_build: Build, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Behind RoPE there is a norm, and behind it a factor for each head."""
    with pytest.raises(ModelError, match="it is not known what RoPE is given in layer 0") as error:
        read_sums(sums_of(llama_build, tiny_models["talkie-dense"], tmp_path))
    assert "--kv-profile weights" in str(error.value.remedy)


@pytest.mark.parametrize("program", [moments.PROGRAM, "llama-server", "llama-cli", "llama-completion"])
def test_options_for_the_models_place_are_known_to_it(llama_build: Build, program: str) -> None:
    told = proc.run([llama_build.tool(program), "--help"], check=False).stdout
    assert set(passed_on.PLACES) <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", told))


def test_sums_of_a_model_on_two_devices(
    llama_build: Build, twins: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    """The same to the bit with layers apart or K and V in the host's memory, and within rounding where each
    device has a part of the heads."""

    def run(*extra: str) -> list[npt.NDArray[np.float64]]:
        text, out = paths.data_dir("texts") / "calibration.txt", tmp_path / "sums.gguf"
        out.unlink(missing_ok=True)
        model = f16_models["docs-qwen3-8m"]
        args = moments.arguments(model, text, out, n_ctx=64, chunks=1, threads=1, extra=extra)
        env = {"GGML_BACKEND_PATH": str(twins), **ONE_THREAD}
        done = proc.run([llama_build.tool(moments.PROGRAM), *args], env=env)
        assert ("Twin1" in done.stderr) == bool(extra)
        return [part for layer in read_sums(out).all.values() for part in (layer.k, layer.kk, layer.qq)]

    want, on = run(), ("-dev", "Twin0,Twin1")
    for extra in ((*on, "-sm", "layer"), (*on, "-nkvo"), (*on, "-ot", "attn=CPU")):
        assert all(map(np.array_equal, want, run(*extra))), extra
    split = run(*on, "-sm", "tensor")
    assert max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(want, split, strict=True)) < 1e-3

"""Profiles from a text without llama.cpp: what is made of sums, kept, refused; with it in tests/models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from attention_models import DIM, HEADS, KV_HEADS, QK_NORM, SPLIT, numbers, write
from click.testing import CliRunner

from ggufrq.base import paths, proc
from ggufrq.base.errors import GgufrqError, ModelError, ToolError, UsageError
from ggufrq.cli import cli
from ggufrq.measure.calibrate import profile_from_text
from ggufrq.profile import Profile, profile_from_weights, read_profile
from ggufrq.profile.solve import solve
from ggufrq.profile.sums import How, LayerSums, read_sums
from ggufrq.profile.text import averaged, noise, profile_from_sums
from ggufrq.profile.weights import moments_from_weights
from ggufrq.profile.whole import Whole

F64 = npt.NDArray[np.float64]

CHUNK, CHUNKS, HELD = 16, 4, 1
Layer = tuple[F64, F64]  # K [tokens, kv heads, dim] and Q [tokens, heads, dim] before RoPE


def drawn(seed: int = 3, tokens: int = CHUNK * CHUNKS, layers: int = 2) -> list[Layer]:
    rng = np.random.default_rng(seed)

    def side(heads: int) -> F64:
        spread = np.exp(rng.standard_normal((heads, DIM)))
        return rng.standard_normal((tokens, heads, DIM)) * spread + rng.standard_normal((heads, DIM))

    return [(side(KV_HEADS), side(HEADS)) for _ in range(layers)]


def summed(k: F64, q: F64) -> dict[str, F64]:
    q = q.reshape(len(q), KV_HEADS, -1, DIM)
    return {
        "k": k.sum(axis=0)[:, :, None],
        "kk": np.einsum("thi,thj->hij", k, k),
        "qq": np.einsum("thgi,thgj->hij", q, q),
    }


def layer_sums(k: F64, q: F64, *, how: How = "rope") -> LayerSums:
    found = summed(k, q)
    return LayerSums(len(k), found["k"][:, :, 0], found["kk"], found["qq"], how)


def sums_file(path: Path, layers: list[Layer], done: int = CHUNKS, how: str = "rope", **change: Any) -> Path:
    """As llama-rq-moments writes it."""
    writer = gguf.GGUFWriter(path, "kv-moments")
    writer.add_type(change.get("type", "kv-moments"))
    writer.add_uint32("rq.moments.version", change.get("version", 1))
    for key, value in {"n_ctx": CHUNK, "chunks": CHUNKS, "held": HELD, "done": done}.items():
        writer.add_uint32(f"rq.moments.{key}", value)
    fit = CHUNK * (CHUNKS - HELD)
    for il, (k, q) in enumerate(layers):
        for which, part in (("fit", slice(fit)), ("held", slice(fit, None))):
            for name, values in summed(k[part], q[part]).items():
                if name == change.get("missing"):
                    continue
                writer.add_tensor(f"{which}.{il}.{name}.{how}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-Q8_0.gguf"
    write(path, "qwen3", numbers(), [{**SPLIT, **QK_NORM}] * 2)
    return path


@pytest.mark.parametrize(("first", "n"), [(0, 1), (0, 24), (5, 7)])
def test_moments_are_those_at_every_position(model: Path, first: int, n: int) -> None:
    """K and Q of each token turned to each of the positions, against the closed form."""
    whole = Whole.of(model, 24)
    k, q = drawn()[0]
    found, queries = averaged(whole, 0, layer_sums(k, q), first, n)
    rope = whole.rope(0, DIM)
    assert rope is not None
    turns = [rope.matrix(p) for p in range(first, first + n)]
    ks = np.concatenate([k @ turn.T for turn in turns])
    qs = np.concatenate([q @ turn.T for turn in turns]).reshape(len(q) * n, KV_HEADS, -1, DIM)
    assert np.allclose(found.mean, ks.mean(axis=0))
    assert np.allclose(found.second, np.einsum("thi,thj->hij", ks, ks) / len(ks))
    assert np.allclose(queries, np.einsum("thgi,thgj->hij", qs, qs) / len(qs))


def mixed(text: np.ndarray, foretold: np.ndarray) -> np.ndarray:
    """Four parts of the text's, one of those foretold, made as large by head."""
    return np.stack([4 * a + b * np.trace(a) / np.trace(b) for a, b in zip(text, foretold, strict=True)]) / 5


def test_the_profile_is_the_best_one_for_these_moments(model: Path) -> None:
    whole = Whole.of(model, 24)
    sums = {il: layer_sums(*layer) for il, layer in enumerate(drawn())}
    profile = profile_from_sums(whole, sums)
    assert (profile.source, profile.n_ctx) == ("text", 24)
    for il, layer in profile.layers.items():
        k, q = averaged(whole, il, sums[il], 0, 24)
        foretold, of_q = moments_from_weights(whole, il)
        metric = solve(mixed(k.covariance, foretold.covariance), mixed(q, of_q))
        assert layer.k_mean is not None and np.allclose(layer.k_mean, k.mean, atol=1e-5)
        assert np.allclose(layer.k_map, metric.forward, rtol=1e-4, atol=1e-4)
        assert np.allclose(layer.q_map, metric.inverse, rtol=1e-4, atol=1e-4)


def test_the_noise_is_that_of_white_errors(model: Path) -> None:
    """Errors of the same size in all directions of what is stored, met by the queries."""
    whole = Whole.of(model, 24)
    layers = drawn(tokens=200)
    sums = {il: layer_sums(*layer) for il, layer in enumerate(layers)}
    made = profile_from_sums(whole, sums)
    for profile in (None, made, profile_from_weights(model, 24)):
        found = noise(whole, profile, sums, 3, 1)
        for il, (k, q) in enumerate(layers):
            rope = whole.rope(il, DIM)
            assert rope is not None
            turn = rope.matrix(3)
            stored, met = k @ turn.T, (q @ turn.T).reshape(len(q), KV_HEADS, -1, DIM)
            if profile is not None:
                layer = profile.layers[il]
                stored = stored - (0 if layer.k_mean is None else layer.k_mean)
                stored = np.einsum("thi,hij->thj", stored, layer.k_map)
                met = np.einsum("thgi,hij->thgj", met, layer.q_map)
            size = np.square(stored).sum(axis=2).mean(axis=0)
            expected = size * np.square(met).sum(axis=(2, 3)).mean(axis=0)
            assert np.allclose(found[il], expected, rtol=1e-3)
    best, plain = noise(whole, made, sums, 0, 24), noise(whole, None, sums, 0, 24)
    assert all((best[il] < plain[il]).all() for il in plain)


@pytest.mark.parametrize(
    "change", [{"attn_logit_softcapping": 50.0}, {"extra": {"blk.0.attn_sinks.weight": np.ones(HEADS)}}]
)
def test_where_a_mean_matters_none_is_taken_out(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "model.gguf"
    extra = change.pop("extra", None)
    write(path, "qwen3", numbers(**change), [SPLIT] * 2, extra)
    whole = Whole.of(path, 24)
    sums = {il: layer_sums(*layer) for il, layer in enumerate(drawn())}
    profile = profile_from_sums(whole, sums)
    k, q = averaged(whole, 1, sums[1], 0, 24)
    assert profile.layers[1].k_mean is None
    foretold, of_q = moments_from_weights(whole, 1)
    means = np.einsum("hi,hj->hij", k.mean, k.mean)
    second = mixed(k.second - means, foretold.second) + means  # no bias: the mean foretold is 0
    expected = solve(second, mixed(q, of_q)).forward
    assert np.allclose(profile.layers[1].k_map, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_the_text_does_not_reach_are_from_the_weights(model: Path) -> None:
    whole = Whole.of(model, 24)
    profile = profile_from_sums(whole, {0: layer_sums(*drawn()[0])})
    assert np.array_equal(profile.layers[1].k_map, profile_from_weights(model, 24).layers[1].k_map)


def test_rope_where_it_should_not_be_is_refused(model: Path) -> None:
    whole = Whole.of(model, 24)
    with pytest.raises(ModelError, match="it is not known what RoPE is given in layer 0 of qwen3"):
        averaged(whole, 0, layer_sums(*drawn()[0], how="plain"), 0, 24)


def test_a_norm_behind_rope_has_its_weights_there(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = write(path, "hunyuan-dense", numbers(), [{**SPLIT, **QK_NORM}] * 2)
    k, q = drawn()[1]
    whole = Whole.of(path, 24)
    found, queries = averaged(whole, 1, layer_sums(k, q, how="norm"), 3, 1)
    rope = whole.rope(1, DIM)
    assert rope is not None
    ks = k @ rope.matrix(3).T * tensors["blk.1.attn_k_norm.weight"]
    qs = (q @ rope.matrix(3).T * tensors["blk.1.attn_q_norm.weight"]).reshape(len(q), KV_HEADS, -1, DIM)
    assert np.allclose(found.mean, ks.mean(axis=0), rtol=1e-5)
    assert np.allclose(found.second, np.einsum("thi,thj->hij", ks, ks) / len(ks), rtol=1e-5)
    assert np.allclose(queries, np.einsum("thgi,thgj->hij", qs, qs) / len(qs), rtol=1e-5)


def test_a_layer_without_rope_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, "smollm3", numbers(), [SPLIT] * 4)
    k, q = drawn()[0]
    found, queries = averaged(Whole.of(path, 24), 3, layer_sums(k, q, how="plain"), 7, 9)
    assert np.allclose(found.mean, k.mean(axis=0))
    assert np.allclose(queries, layer_sums(k, q).qq / len(k))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"type": "model"}, "has no moments"),
        ({"version": 2}, "or of another version"),
        ({"done": 3}, "is over 3 of 4 chunks only"),
        ({"missing": "qq"}, "it is not known what RoPE is given in layer 0"),
        ({"how": "roped"}, "has a tensor that it should not have, fit.0.k.roped"),
    ],
)
def test_a_file_of_sums_that_is_not_sound(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        read_sums(sums_file(tmp_path / "sums.gguf", drawn(), **change))


def test_sums_that_are_not_finite(tmp_path: Path) -> None:
    layers = drawn()
    layers[1][0][5, 1, 2] = np.nan
    with pytest.raises(ModelError, match="of layer 1 are NaN or infinite"):
        read_sums(sums_file(tmp_path / "sums.gguf", layers))


class Program:
    """Stands for llama-rq-moments."""

    def __init__(self, layers: list[Layer], answer: str | None = None) -> None:
        self.layers, self.answer = layers, answer
        self.runs: list[list[str]] = []

    def __call__(self, args: list[Any], *, on_stdout: Callable[[str], None], **_: object) -> proc.Completed:
        words = [str(arg) for arg in args]
        self.runs.append(words)
        if self.answer is not None:
            return proc.Completed(words, 1, "", self.answer, 0.0)
        out = Path(words[words.index("-o") + 1])
        sums_file(out, self.layers)
        said = f"moments: {CHUNKS} chunks of {CHUNK} tokens, {HELD} held out, 0 done\n[1][2][3][4]\n"
        for start in range(0, len(said), 7):
            on_stdout(said[start : start + 7])
        return proc.Completed(words, 0, said, "", 0.0)


BUILD: Any = SimpleNamespace(key="build", tool=lambda name: Path(name))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("words")
    return path


def run_by(program: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr("ggufrq.drive.moments.proc.run", program)
    monkeypatch.setattr("ggufrq.cli.calibrate.require_build", lambda: BUILD)
    return program


def test_what_was_held_out_tells_the_gain(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the profile is from all of the text."""
    layers = drawn(tokens=CHUNK * CHUNKS)
    run_by(Program(layers), monkeypatch)
    made = profile_from_text(model, text, BUILD, positions=5000, n_ctx=CHUNK, chunks=CHUNKS)
    assert (made.tokens, made.held) == (CHUNK * CHUNKS, CHUNK * HELD)
    whole = Whole.of(model, 5000)
    expected = profile_from_sums(whole, {il: layer_sums(*layer) for il, layer in enumerate(layers)})
    assert np.allclose(made.profile.layers[1].k_map, expected.layers[1].k_map, rtol=1e-4, atol=1e-5)

    seen = {il: layer_sums(k[:48], q[:48]) for il, (k, q) in enumerate(layers)}
    rest = {il: layer_sums(k[48:], q[48:]) for il, (k, q) in enumerate(layers)}
    profile = profile_from_sums(whole, seen)
    assert [(gain.first, gain.last) for gain in made.gains] == [(0, 2047), (2952, 4999)]
    for gain in made.gains:
        by, plain = (noise(whole, which, rest, gain.first, 2048) for which in (profile, None))
        ratios = np.array([by[il] / plain[il] for il in (0, 1)])
        assert gain.text == pytest.approx(np.exp(np.log(ratios).mean()))
        assert gain.layers[1][1] == pytest.approx(np.exp(np.log(ratios[1]).mean()))
        assert gain.weights is not None and gain.text < gain.weights


def test_the_command(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the file that is found by its name, once computed it is kept, and damaged it is made anew."""
    program = run_by(Program(drawn()), monkeypatch)
    command = ["calibrate", str(model), str(text), "--positions", "24", "--json"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    told = json.loads(done.stdout)
    out = model.parent / "tiny-kv.gguf"
    assert told["file"] == str(out) and told["tokens"] == 64 and told["held_out"] == 16
    (noise_told,) = told["noise"]
    assert noise_told["none"] == 1 and 0 < noise_told["text"] < noise_told["weights"]
    assert [layer["layer"] for layer in noise_told["layers"]] == [0, 1]
    profile = read_profile(out)
    assert (profile.source, profile.n_ctx) == ("text", 24)
    written = out.read_bytes()

    plain = CliRunner().invoke(cli, command[:-1], catch_exceptions=False)
    assert len(program.runs) == 1 and out.read_bytes() == written
    assert "no profile" in plain.stdout and "find tiny-kv.gguf by its name" in plain.stdout
    (kept,) = (paths.cache_dir() / "calibration").glob("*.gguf")
    kept.write_bytes(kept.read_bytes()[:-100])
    CliRunner().invoke(cli, command[:-1], catch_exceptions=False)
    assert len(program.runs) == 2 and out.read_bytes() == written


def test_sums_of_other_builds_are_not_kept(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor those of a run that was stopped; those of other texts are."""
    program = run_by(Program(drawn()), monkeypatch)
    other = text.with_name("other.txt")
    other.write_text("other words")

    def kept(key: str, of: Path = text) -> set[Path]:
        build: Any = SimpleNamespace(key=key, tool=lambda name: Path(name))
        profile_from_text(model, of, build, positions=24)
        return set((paths.cache_dir() / "calibration").glob("*.gguf"))

    (first,) = kept("a")
    assert kept("a") == {first} and len(program.runs) == 1
    assert len(kept("a", other)) == 2
    last = kept("b")
    assert len(last) == 2 and first not in last and len(program.runs) == 3


def test_a_profile_of_another_model_is_not_written_over(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = run_by(Program(drawn()), monkeypatch)
    other = tmp_path / "other.gguf"
    write(other, "qwen3", numbers(), [SPLIT] * 3)
    there = tmp_path / "tiny-kv.gguf"
    profile_from_weights(other, 24).write(there)
    before = there.read_bytes()
    done = CliRunner().invoke(cli, ["calibrate", str(model), str(text)])
    assert isinstance(done.exception, UsageError) and "no profile of tiny-Q8_0.gguf" in str(done.exception)
    assert there.read_bytes() == before and not program.runs


def test_a_program_that_fails_says_why(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "0.01.002.003 E main: the text has 3 tokens, less than one chunk of 16\n"
    run_by(Program([], said), monkeypatch)
    with pytest.raises(ToolError, match="the text has 3 tokens, less than one chunk of 16") as caught:
        profile_from_text(model, text, BUILD, n_ctx=16)
    assert caught.value.remedy == "a longer text, or a shorter context"


def test_options_and_texts_that_make_no_sense(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(Program(drawn()), monkeypatch)
    for kv in ("iso3", "planar4"):
        done = CliRunner().invoke(cli, ["calibrate", str(model), str(text), "--kv", kv])
        assert isinstance(done.exception, UsageError) and "--kv means nothing" in str(done.exception)
    with pytest.raises(UsageError, match="there is no text"):
        profile_from_text(model, tmp_path / "none.txt", BUILD)
    (tmp_path / "folder").mkdir()
    profile: Profile = profile_from_text(model, text, BUILD, positions=24).profile
    with pytest.raises(GgufrqError, match="cannot write"):
        profile.write(tmp_path / "folder")

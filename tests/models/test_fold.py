"""Folding with the real build: what is folded computes the same, on every architecture that can be folded,
and the files that are made of it are named, described, resumed and refused as they should be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import random_models
from click.testing import CliRunner
from families import family_of

from ggufrq.base import paths, proc
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.build.project import Build
from ggufrq.cli.quantize import quantize as command
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import read_header
from ggufrq.make import matrix
from ggufrq.make.family import parse_wants, plan_family
from ggufrq.make.fold import awq, fold_file, imatrix, kv
from ggufrq.make.fold.changes import Change
from ggufrq.make.fold.facts import Pair, architecture_of, heads, pairs
from ggufrq.make.fold.folding import Folding, scaled
from ggufrq.make.fold.weights import Weights, write_changed
from ggufrq.make.plan import Family, Request
from ggufrq.tools import perplexity

MODELS = ("docs-qwen3-8m", "docs-qwen3.5-8m")
HELDOUT = paths.data_dir("texts") / "heldout.txt"
CALIBRATION = paths.data_dir("texts") / "calibration.txt"
#: Nats; logits kept in 16 bits and f16 caches make up to 1e-5, a wrong fold more than 0.1.
SAME, OTHER = 5e-5, 1e-2


def score(build: Build, model: Path, base: Path, *, first: bool = False) -> float:
    """Mean divergence from what ``base`` holds; ``first`` makes it."""
    args = ["-m", model, "-f", HELDOUT, "-c", "128", "--chunks", "2", "-t", "1", "-fa", "on", "-lv", "4"]
    args += ["--kl-divergence-base", base] + ([] if first else ["--kl-divergence"])
    done = proc.run([build.tool("llama-perplexity"), *args])
    return 0.0 if first else perplexity.parse_divergence(done.stdout, done.stderr).kld_mean


class Model:
    """A model whose logits are known, and copies of it to be compared."""

    def __init__(self, path: Path, build: Build, folder: Path) -> None:
        self.weights, self.build, self.folder = Weights(path), build, folder
        self.architecture = architecture_of(self.weights.header.values, path.name)
        self.pairs = pairs(self.architecture, self.weights.tensors)
        score(build, path, folder / "base.bin", first=True)

    def divergence(self, folding: Folding) -> float:
        """That of a copy that is folded like this."""
        out = self.folder / "folded.gguf"
        write_changed(self.weights, out, folding.changes, {"ggufrq.fold": "test"})
        return score(self.build, out, self.folder / "base.bin")


@pytest.fixture
def made(families: dict[str, Family], llama_build: Build, tmp_path: Path) -> Iterator[Callable[[str], Model]]:
    tokenizer = read_header(families[MODELS[0]].file("Q8_0")).values
    with ExitStack() as opened:

        def make(name: str) -> Model:
            path = random_models.write(name, tmp_path / f"{name}.gguf", tokenizer)
            model = Model(path, llama_build, tmp_path)
            opened.enter_context(model.weights)
            return model

        yield make


def random_scales(model: Model, some: list[Pair]) -> Folding:
    """Far more than a search would ask for, for each of these pairs."""
    rng, folding = np.random.default_rng(2), Folding()
    for pair in some:
        experts, rows, columns = model.weights.shape(pair.source)
        factors = np.exp(0.7 * rng.standard_normal((experts, rows if pair.rule.rows else columns)))
        shape = heads(model.weights.header, pair.layer) if pair.rule.rows == "heads" else None
        folding.add(scaled(pair, factors, model.weights, shape))
    return folding


def random_keys(model: Model, *, tied: bool) -> Folding:
    """Factors of K for every layer with attention."""
    rng, folding = np.random.default_rng(2), Folding()
    for pair in model.pairs:
        if pair.rule.rows != "heads":
            continue
        shape = heads(model.weights.header, pair.layer)
        factors = np.exp(0.7 * rng.standard_normal((shape.kv, shape.k_dim)))
        if tied:
            factors = np.sqrt(factors * factors[:, kv.rope_partner(shape, model.architecture.rope)])
        folding.add(kv.key_changes(model.weights, pair.layer, shape, factors))
    return folding


@pytest.mark.parametrize("name", random_models.LAYERS)
def test_a_folded_model_computes_the_same(made: Callable[[str], Model], name: str) -> None:
    model = made(name)
    assert abs(model.divergence(random_scales(model, model.pairs))) < SAME
    assert abs(model.divergence(random_keys(model, tied=True))) < SAME


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen35"])
def test_these_comparisons_notice_a_wrong_fold(made: Callable[[str], Model], name: str) -> None:
    """A reader that was forgotten, and channels that RoPE mixes scaled apart."""
    model = made(name)
    folding = random_scales(model, model.pairs[:1])
    del folding.changes[model.pairs[0].readers[-1]]
    assert model.divergence(folding) > OTHER
    if name != "qwen35":  # whose few random channels of K hardly matter
        assert model.divergence(random_keys(model, tied=False)) > OTHER


def bf16(families: dict[str, Family], name: str) -> Path:
    return families[name].folder / f"{name}-BF16.gguf"


@pytest.fixture(scope="module")
def matrices(
    families: dict[str, Family], llama_build: Build, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Short importance matrices of the embedded models."""
    folder = tmp_path_factory.mktemp("matrices")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "CHUNKS", 4)
        for name in MODELS:
            found[name] = folder / f"{name}-imatrix.gguf"
            matrix.make_alone(bf16(families, name), found[name], [CALIBRATION], llama_build)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_embedded_models_compute_the_same(
    families: dict[str, Family], llama_build: Build, matrices: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """In f16 instead of bf16: the base is the same model in f16."""
    source = bf16(families, name)
    plain, base = tmp_path / "plain.gguf", tmp_path / "base.bin"
    with Weights(source) as weights:
        write_changed(weights, plain, random_scales_of_one(weights), {})
        types = {info.name: "q4_0" if len(info.shape) > 1 else "f32" for info in weights.tensors}
    score(llama_build, plain, base, first=True)
    for kind in fold_file.KINDS:
        folded = fold_file.fold(
            kind,
            source,
            tmp_path / kind,
            types,
            llama_build,
            matrix=matrices[name] if kind == "awq" else None,
        )
        assert folded.folding.changes and all(found.gain >= 1 for found in folded.folding.found[:1])
        assert abs(score(llama_build, folded.model, base)) < SAME
        assert read_header(folded.model).values["ggufrq.fold"] == kind
        with pytest.raises(ModelError, match="is folded already"):
            fold_file.fold(kind, folded.model, tmp_path / "again", types, llama_build, matrix=matrices[name])


def random_scales_of_one(weights: Weights) -> dict[str, Change]:
    """Changes that change nothing but the type."""
    return {
        info.name: Change(columns=np.ones((1, 1)))
        for info in weights.tensors
        if weights.kind(info.name) == "bf16" and info.name.startswith("blk.")
    }


def test_the_search_finds_what_was_planted(
    families: dict[str, Family], llama_build: Build, matrices: dict[str, Path]
) -> None:
    """A few inputs that are much larger than the others: scaling them up must pay."""
    name = MODELS[0]
    power = imatrix.read(matrices[name])
    for tensor in power.values():
        tensor[:, ::32] *= 1e4
    with Weights(bf16(families, name)) as weights, pytest.MonkeyPatch.context() as patch:
        types = {info.name: "q4_0" for info in weights.tensors}
        patch.setattr(imatrix, "read", lambda _: power)
        folding = awq.find(weights, matrices[name], types, llama_build)
        assert len(folding.found) == 4 * 8
        assert np.mean([found.gain for found in folding.found]) > 1.2
        floats = dict.fromkeys(types, "f16")
        with pytest.raises(ModelError, match="the importance matrix knows none of the tensors"):
            awq.find(weights, matrices[name], floats, llama_build)


def test_files_of_a_folded_family(
    families: dict[str, Family], llama_build: Build, matrices: dict[str, Path], tmp_path: Path
) -> None:
    name = MODELS[1]
    source, given = str(bf16(families, name)), matrices[name]
    request = Request(
        source, parse_wants(["Q4_K_M", "proposal-c"], llama_build), tmp_path, (given,), fold="awq"
    )
    plan = plan_family(request, llama_build)
    assert not list(tmp_path.iterdir())
    assert plan.disk_needed == Path(source).stat().st_size + sum(o.forecast.file_bytes for o in plan.outputs)
    published = plan.outputs[0].job.imatrix
    assert published is not None
    arguments = [request.wants[0].label, "proposal-c"]
    first = family_of(source, arguments, llama_build, out=tmp_path, imatrix=given, fold="awq")
    assert [made.name for made in first.files] == [
        f"{name}-awq-Q4_K_M.gguf",
        f"{name}-awq-proposal-c-Q8_0.gguf",
    ]
    for made, output in zip(first.files, plan.outputs, strict=True):
        assert made.bytes == output.forecast.file_bytes and (made.fold, made.imatrix) == ("awq", True)
        assert read_gguf(made.path).tensor_types == output.forecast.types
        values = read_header(made.path).values
        assert values["ggufrq.fold"] == "awq" and "attention" in values["ggufrq.fold.parts"]
        assert values["quantize.imatrix.file"] == published.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [
            *(made.name for made in first.files),
            published.name,
            f"{name}-awq-kv.gguf",
            f"{name}.ggufrq.json",
        ]
    )
    again = family_of(source, arguments, llama_build, out=tmp_path, imatrix=given, fold="awq")
    assert not any(made.fresh for made in again.files)
    plain = family_of(source, ["Q4_K_M"], llama_build, out=tmp_path, imatrix=given)
    assert plain.files[0].name == f"{name}-Q4_K_M.gguf" and plain.files[0].fresh
    assert plain.files[0].path.read_bytes() != first.files[0].path.read_bytes()
    record = json.loads((tmp_path / f"{name}.ggufrq.json").read_text())["files"]
    assert {entry.get("fold") for entry in record.values()} == {"awq", "", None}


def test_folding_is_refused_before_anything_is_made(
    families: dict[str, Family], llama_build: Build, matrices: dict[str, Path], tmp_path: Path
) -> None:
    source = str(bf16(families, MODELS[0]))
    with pytest.raises(UsageError, match="--fold awq is for quantized types"):
        family_of(source, ["F16"], llama_build, out=tmp_path, imatrix=matrices[MODELS[0]], fold="awq")
    with pytest.raises(UsageError, match="--fold is awq or kv; not 'gptq'"):
        family_of(source, ["Q4_0"], llama_build, out=tmp_path, fold="gptq")
    quantized = str(families[MODELS[0]].file("Q8_0"))
    with pytest.raises(ModelError, match="is quantized; only models in 16 or 32 bits can be folded"):
        family_of(quantized, ["Q4_0"], llama_build, out=tmp_path, fold="kv", requantize=True)
    assert not list(tmp_path.glob("*.gguf"))


def test_the_command_folds_for_caches(families: dict[str, Family], tmp_path: Path) -> None:
    source = str(bf16(families, MODELS[0]))
    options = [source, "--types", "F16", "--fold", "kv", "-o", str(tmp_path)]
    shown = CliRunner().invoke(command, [*options, "--dry-run"])
    assert (
        shown.exit_code == 0 and "docs-qwen3-8m-kv-F16.gguf" in shown.stdout and "kv folded" in shown.stdout
    )
    done = CliRunner().invoke(command, [*options, "--json"])
    assert done.exit_code == 0, done.output
    (made,) = json.loads(done.stdout)["files"]
    assert made["fold"] == "kv" and made["fresh"]
    assert read_header(Path(made["path"])).values["ggufrq.fold.parts"] == "keys"

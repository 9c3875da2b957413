"""Models and matrices that are legal in form and wrong in content, as people report them: docs/faults.md."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import sources
from click.testing import CliRunner
from families import family_of

from ggufrq.base.errors import GgufrqError, ModelError
from ggufrq.build.project import Build
from ggufrq.card.facts import collect
from ggufrq.card.head import metadata
from ggufrq.cli import cli
from ggufrq.ggufs import imatrix, values
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.imatrix import Entry, Matrix
from ggufrq.make import matrix
from ggufrq.make.family import parse_wants, plan_family
from ggufrq.make.plan import Family, Request

pytestmark = [pytest.mark.build]

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def model(families: dict[str, Family]) -> Path:
    return families[DENSE].folder / f"{DENSE}-BF16.gguf"


@pytest.fixture(scope="module")
def known(model: Path, llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """A matrix of the dense model, from random activations: two columns of each tensor matter much."""
    rng = np.random.default_rng(1)
    entries = {}
    for tensor in read_header(model).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            sums = rng.chisquare(1, (1, tensor.shape[0])).astype(np.float32) * 100
            sums[0, :2] *= 1000
            entries[tensor.name] = Entry(sums, np.array([100.0], np.float32))
    return Matrix(entries, ("text",), 1, 512)


def with_entry(whole: Matrix, name: str, sums: np.ndarray, counts: float = 100.0) -> Matrix:
    entry = Entry(sums.astype(np.float32), np.array([counts], np.float32))
    return Matrix({**whole.entries, name: entry}, whole.datasets, whole.chunks, whole.chunk_size)


def errors(source: Path, made: Path) -> dict[str, float]:
    return {loss.tensor: loss.error for loss in values.losses(source, made)}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


TYPES = ("Q2_K", "Q4_K_M", "IQ2_XXS")


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sums_of_zero_count_as_not_seen(
    model: Path,
    known: Matrix,
    llama_build: Build,
    tmp_path: Path,
    share: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
    whole = known
    for name in names:
        sums = known.entries[name].sums.copy()
        sums[0, : int(share * sums.shape[1])] = 0
        whole = with_entry(whole, name, sums)
    given = tmp_path / "given.gguf"
    imatrix.write(whole, given)
    made = family_of(str(model), TYPES, llama_build, out=tmp_path / "out", imatrix=given, run=False)
    told = capsys.readouterr().err
    for name in names:
        assert f"importance matrix: {name}: " in told and "taken as not seen" in told
    for kind in TYPES:
        found = errors(model, made.file(kind))
        for name in names:
            assert found[name] < 0.68, (kind, name)


@pytest.mark.parametrize(
    ("sums", "counts"),
    [(np.full((1, 1), 1e38), 1.0), (np.ones((1, 1)), np.inf), (np.ones((1, 1)), 1e-30)],
)
def test_sums_that_no_activations_give_are_refused(
    model: Path, known: Matrix, llama_build: Build, tmp_path: Path, sums: np.ndarray, counts: float
) -> None:
    name = "blk.0.attn_q.weight"
    columns = known.entries[name].sums.shape[1]
    imatrix.write(with_entry(known, name, np.repeat(sums, columns, axis=1), counts), tmp_path / "given.gguf")
    with pytest.raises(ModelError, match="no sums of squares"):
        family_of(str(model), ["Q2_K"], llama_build, out=tmp_path / "out", imatrix=tmp_path / "given.gguf")
    assert not left_in(tmp_path / "out")


LAYER = "model.layers.1.mlp.up_proj.weight"


def test_weights_in_32_bits_stay_so(llama_build: Build, tmp_path: Path) -> None:
    folder = sources.copy(tmp_path / "Fine-8M")
    weights = sources.tensors(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    fine = {k: (x * (1 + rng.uniform(-1, 1, x.shape) / 4096)).astype(np.float32) for k, x in weights.items()}
    sources.write(folder / "model.safetensors", fine)
    made = family_of(str(folder), ["F32", "Q8_0"], llama_build, out=tmp_path / "out", run=False)
    name = "blk.1.ffn_up.weight"
    assert read_gguf(made.file("F32")).tensor_types[name] == "f32"
    (tensor,) = (t for t in gguf.GGUFReader(made.file("F32")).tensors if t.name == name)
    assert np.array_equal(tensor.data, fine[LAYER])
    assert left_in(made.folder)[:1] == ["Fine-8M-F32.gguf"]


def test_the_type_follows_the_tensors(llama_build: Build, tmp_path: Path) -> None:
    """BF16 that is declared F16, with a value that F16 does not hold."""

    def change(weights: sources.Tensors) -> None:
        weights[LAYER][3, 5] = 1e5

    folder = sources.changed(tmp_path / "Large-8M", change)
    sources.config(folder, dtype="float16", torch_dtype="float16")
    out = tmp_path / "out"
    made = family_of(str(folder), ["BF16"], llama_build, out=out, run=False)
    assert values.first_odd(made.file("BF16")) is None
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight has values that F16 does not hold"):
        family_of(str(folder), ["F16"], llama_build, out=out, run=False)
    assert not [name for name in left_in(out) if name.endswith("-F16.gguf") or name.startswith(".")]
    assert "Large-8M-F16.gguf" not in (out / "Large-8M.ggufrq.json").read_text()


@pytest.fixture(scope="module")
def spoilt(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model with one NaN, as GGUF."""
    path = tmp_path_factory.mktemp("spoilt") / "spoilt.gguf"
    data = bytearray(model.read_bytes())
    header = read_header(model)
    (tensor,) = (t for t in header.tensors if t.name == "blk.1.ffn_up.weight")
    at = header.data_offset + tensor.offset + 2 * 1000
    data[at : at + 2] = b"\xc0\x7f"
    path.write_bytes(data)
    return path


def test_a_source_that_is_no_numbers(llama_build: Build, tmp_path: Path) -> None:
    def change(weights: sources.Tensors) -> None:
        weights[LAYER][3, 5] = np.nan

    folder = sources.changed(tmp_path / "Spoilt-8M", change)
    with pytest.raises(ModelError, match=f"{LAYER} of model.safetensors, in the source itself, has NaN"):
        family_of(str(folder), ["BF16"], llama_build, out=tmp_path / "out", run=False)
    assert not left_in(tmp_path / "out")


def test_nothing_is_made_of_a_file_that_is_no_numbers(
    spoilt: Path, llama_build: Build, tmp_path: Path
) -> None:
    says = r"spoilt\.gguf computes no numbers: blk\.1\.ffn_up\.weight has 1 NaN"
    with pytest.raises(ModelError, match=says):
        family_of(str(spoilt), ["Q8_0"], llama_build, out=tmp_path / "out")
    with pytest.raises(ModelError, match=says):
        matrix.make_alone(spoilt, tmp_path / "out" / "matrix.gguf", [], llama_build)
    assert not left_in(tmp_path / "out")
    done = CliRunner().invoke(cli, ["calibrate", str(spoilt), "-o", str(tmp_path / "m"), "--chunks", "1"])
    assert isinstance(done.exception, ModelError)
    assert "computes no numbers" in done.exception.message and "of layer 2" in done.exception.message
    done = CliRunner().invoke(cli, ["validate", str(spoilt), "--quick", "-o", str(tmp_path / "report")])
    assert isinstance(done.exception, GgufrqError)
    assert "the base that all is compared with computes no numbers" in done.exception.message


def test_a_matrix_without_what_few_bits_need(
    model: Path, known: Matrix, llama_build: Build, tmp_path: Path
) -> None:
    left = {name: entry for name, entry in known.entries.items() if not name.startswith("blk.1.")}
    given = tmp_path / "given.gguf"
    imatrix.write(Matrix(left, known.datasets, 1, 512), given)
    request = Request(str(model), parse_wants(["IQ2_M"], llama_build), tmp_path / "out", (given,))
    says = r"IQ2_M would give blk\.1\.\S+ the type iq\w+, which is not made without .*: it has nothing on it"
    with pytest.raises(ModelError, match=says):
        plan_family(request, llama_build)
    with pytest.raises(ModelError, match=says):
        family_of(str(model), ["IQ2_M"], llama_build, out=tmp_path / "out", imatrix=given)
    assert not left_in(tmp_path / "out")
    family_of(str(model), ["Q2_K"], llama_build, out=tmp_path / "out", imatrix=given, run=False)


def test_no_text_runs_through_layers_that_predict_further_tokens(llama_build: Build, tmp_path: Path) -> None:
    def change(weights: sources.Tensors) -> None:
        prefix = "model.layers.3."
        head = {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
        weights |= {f"mtp.layers.0.{name}": x for name, x in head.items()}
        size = len(head["input_layernorm.weight"])
        weights["mtp.fc.weight"] = np.full((size, 2 * size), 0.01, np.float32)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            weights[f"mtp.{name}.weight"] = np.ones(size, np.float32)

    folder = sources.changed(tmp_path / "Headed-8M", change, name=HYBRID)
    sources.config(folder, mtp_num_hidden_layers=1)
    says = "no text runs through the layers that predict"
    with pytest.raises(ModelError, match=says) as caught:
        plan_family(Request(str(folder), parse_wants(["IQ2_M"], llama_build), tmp_path / "out"), llama_build)
    assert "--mtp drop" in str(caught.value.remedy)
    with pytest.raises(ModelError, match=says):
        family_of(str(folder), ["IQ2_M"], llama_build, out=tmp_path / "out")
    assert not left_in(tmp_path / "out")
    told = plan_family(
        Request(str(folder), parse_wants(["Q3_K_M"], llama_build), tmp_path / "out"), llama_build
    )
    assert (
        "tensors of the head for further tokens are quantized without the importance matrix" in told.told[0]
    )


@pytest.mark.parametrize("rows", [-64, 64])
def test_an_embedding_with_other_rows_than_tokens(llama_build: Build, tmp_path: Path, rows: int) -> None:
    def change(weights: sources.Tensors) -> None:
        name = "model.embed_tokens.weight"
        whole = weights[name]
        weights[name] = whole[:rows] if rows < 0 else np.concatenate([whole, whole[:rows]])

    folder = sources.changed(tmp_path / "Cut-8M", change)
    says = "llama.cpp does not load this model: .*token_embd.weight"
    if rows > 0:
        with pytest.raises(ModelError, match=says):
            plan_family(
                Request(str(folder), parse_wants(["Q8_0"], llama_build), tmp_path / "out"), llama_build
            )
        return
    with pytest.raises(ModelError, match=says):
        family_of(str(folder), ["Q8_0"], llama_build, out=tmp_path / "out")
    assert not left_in(tmp_path / "out")


@pytest.mark.parametrize("alignment", [8, 4096])
def test_other_alignments(model: Path, llama_build: Build, tmp_path: Path, alignment: int) -> None:
    path = realigned(model, tmp_path / f"other-{alignment}-BF16.gguf", alignment)
    request = Request(str(path), parse_wants(["Q8_0"], llama_build), tmp_path / "out")
    size = plan_family(request, llama_build).outputs[0].forecast.file_bytes
    made = family_of(str(path), ["Q8_0"], llama_build, out=tmp_path / "out").file("Q8_0")
    assert made.stat().st_size == size
    assert read_header(made).alignment == 32


def realigned(source: Path, out: Path, alignment: int) -> Path:
    """A GGUF with another alignment, else the same."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_custom_alignment(alignment)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        sub_type = field.types[-1] if array else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_what_the_converter_would_misread(llama_build: Build, tmp_path: Path) -> None:
    """A README that is no YAML and names an ancestor, and templates in several places; then one changes."""
    folder, out = sources.copy(tmp_path / "Told-8M"), tmp_path / "out"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "in config"}))
    (folder / "chat_template.jinja").write_text("in a file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    head = b"base_model: Qwen/Qwen3-8B\nlicense: mit\nauthor: M\xfcller\ntags: [1, {a: b}, c]\n"
    (folder / "README.md").write_bytes(b"---\n" + head + b"---\nText.")
    sources.config(folder, _name_or_path="Qwen/Qwen3-8B")

    made = family_of(str(folder), ["BF16"], llama_build, out=out, run=False)
    found = read_header(made.file("BF16")).values
    assert found["tokenizer.chat_template"] == "in a file"
    assert found["tokenizer.chat_template.tool_use"] == "with tools"
    assert (found["general.license"], found["general.author"]) == ("mit", "Müller")
    facts = collect(made.folder)
    assert "base_model" not in metadata(facts) and "base_model_relation" not in metadata(facts)
    assert facts.name == "Told 8M"

    (folder / "chat_template.jinja").write_text("in a file, changed")
    (folder / "README.md").write_text("---\nbase_model: foo: bar\n---\n")
    made = family_of(str(folder), ["BF16"], llama_build, out=out, run=False)
    assert read_header(made.file("BF16")).values["tokenizer.chat_template"] == "in a file, changed"

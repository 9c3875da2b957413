from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from heard import Heard

from ggufrq.base.errors import ModelError
from ggufrq.models import convert

# A converter that treats tokenizers as the real one does: it knows one, and refuses others.
_BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        if tokenizer == "known":
            return "llama-bpe"
        raise NotImplementedError("BPE pre-tokenizer was not recognized")
"""
_SCRIPT = """
import pathlib, sys
import build  # would be found in our own folder if that were on the path
EXTRA
from conversion.base import TextModel
folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
name = TextModel().get_vocab_base_pre((folder / "tokenizer.json").read_text())
sys.stderr.write("Writing:  50%|\\rWriting: 100%|\\n")
out.write_text(f"GGUF {name} {' '.join(sys.argv[2:4])}{' --no-mtp' if '--no-mtp' in sys.argv else ''}")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tree = tmp_path / "llama.cpp"
    (tree / "conversion").mkdir(parents=True)
    (tree / "conversion" / "__init__.py").write_text("def get_model_class(): ...\n")
    (tree / "conversion" / "base.py").write_text(_BASE)
    (tree / "build.py").touch()
    (tree / "convert_hf_to_gguf.py").write_text(_SCRIPT.replace("EXTRA", ""))
    (tree / "src").mkdir()
    (tree / "src" / "llama-vocab.cpp").write_text(
        'tokenizer_pre == "qwen2" ||\n tokenizer_pre == "llama-bpe"'
    )
    return tree


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tiny")


def make_model(folder: Path, tokenizer: str = "strange", architecture: str = "Qwen3ForCausalLM") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text(tokenizer)
    write_safetensors(folder / "model.safetensors", {"a.weight": 8, "b.weight": 24})
    return folder


def write_safetensors(path: Path, tensors: dict[str, int]) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def test_inspect(model: Path) -> None:
    found = convert.inspect(model)
    assert (found.tensors, found.data_bytes, found.out_type, found.has_mtp) == (
        ("a.weight", "b.weight"),
        32,
        "bf16",
        False,
    )


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"torch_dtype": "float16"}, "f16"),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float32"}, "bf16"),
        ({"text_config": {"dtype": "float16"}}, "f16"),
        ({}, "bf16"),
    ],
)
def test_out_type(model: Path, config: dict[str, object], kind: str) -> None:
    (model / "config.json").write_text(json.dumps(config))
    assert convert.inspect(model).out_type == kind


def test_shards_of_the_index_count(model: Path) -> None:
    index = {"weight_map": {"a.weight": "model.safetensors", "mtp.fc.weight": "more.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"more\.safetensors is missing from"):
        convert.inspect(model)
    write_safetensors(model / "more.safetensors", {"other": 4})
    with pytest.raises(ModelError, match=r"more\.safetensors has no mtp\.fc\.weight, which the index says"):
        convert.inspect(model)
    write_safetensors(model / "more.safetensors", {"mtp.fc.weight": 4})
    found = convert.inspect(model)
    assert found.has_mtp and found.data_bytes == 36


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', "{}"])
def test_damaged_index(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json (is damaged|cannot be read)"):
        convert.inspect(model)


@pytest.mark.parametrize("shard", ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"])
def test_each_shard_is_looked_at(model: Path, shard: str) -> None:
    (model / "model.safetensors").unlink()
    names = [f"model-{i}.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        write_safetensors(model / name, {f"t{i}": 8})
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert.inspect(model).data_bytes == 24
    _cut(model / shard)
    with pytest.raises(ModelError, match=f"{shard} is damaged"):
        convert.inspect(model)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [9], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "U8", "shape": [8], "data_offsets": [1, 9]},
        {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]},
        {"dtype": "U8", "shape": [8]},
        7,
    ],
)
def test_headers_that_make_no_sense(model: Path, entry: object) -> None:
    text = json.dumps({"a": entry}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match="its header makes no sense"):
        convert.inspect(model)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _garbage(path: Path) -> None:
    path.write_bytes(b"<html>Not found</html>" * 20)


def _broken_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"}" + data[9:])


@pytest.mark.parametrize(
    "damage", [_cut, _longer, _garbage, _broken_header, lambda path: path.write_bytes(b"abc")]
)
def test_damaged_weights(model: Path, damage: object) -> None:
    damage(model / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"model\.safetensors is (damaged|not a safetensors)") as caught:
        convert.inspect(model)
    assert "download model.safetensors again" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "has no safetensors file"),
    ],
)
def test_missing_files(model: Path, missing: str, says: str) -> None:
    (model / missing).unlink()
    with pytest.raises(ModelError, match=says):
        convert.inspect(model)


def test_a_draft_without_a_tokenizer_is_told_as_one(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLMEagle3"]}))
    with pytest.raises(ModelError, match="is a draft that takes the tokenizer of its model") as caught:
        convert.inspect(model)
    assert "--target-model-dir" in str(caught.value.remedy)


def test_pytorch_weights_are_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"it has pytorch_model\.bin, which ggufrq does not convert"):
        convert.inspect(model)


def test_undeclared_pre_tokenizer_is_refused(model: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError, match="its pre-tokenizer must be declared") as caught:
        convert.convert(model, out, source)
    assert "--pre-tokenizer NAME" in str(caught.value.remedy)
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []


def test_declared_in_the_folder(model: Path, source: Path, tmp_path: Path) -> None:
    (model / "ggufrq.json").write_text('{"pre_tokenizer": "qwen2"}')
    heard = Heard()
    out = convert.convert(model, tmp_path / "out.gguf", source, listener=heard)
    assert out.read_text() == "GGUF qwen2 --outtype bf16"
    assert heard.reached == [50, 100]


def test_option_goes_first(model: Path, source: Path, tmp_path: Path) -> None:
    (model / "ggufrq.json").write_text('{"pre_tokenizer": "qwen2"}')
    out = convert.convert(model, tmp_path / "out.gguf", source, pre_tokenizer="llama-bpe")
    assert out.read_text().startswith("GGUF llama-bpe")


def test_known_tokenizer_needs_no_declaration(source: Path, tmp_path: Path) -> None:
    out = convert.convert(make_model(tmp_path / "m", "known"), tmp_path / "out.gguf", source)
    assert out.read_text().startswith("GGUF llama-bpe")


def test_wrong_declaration_of_a_known_tokenizer(source: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "known")
    with pytest.raises(ModelError, match="knows the pre-tokenizer of m as 'llama-bpe'") as caught:
        convert.convert(model, tmp_path / "out.gguf", source, pre_tokenizer="qwen2")
    assert "--pre-tokenizer llama-bpe" in str(caught.value.remedy)


def test_projector_and_head_are_parts_of_their_own(model: Path, source: Path, tmp_path: Path) -> None:
    (model / "ggufrq.json").write_text('{"pre_tokenizer": "qwen2"}')
    script = (source / "convert_hf_to_gguf.py").read_text()
    (source / "convert_hf_to_gguf.py").write_text(script + "out.write_text(' '.join(sys.argv[2:]))\n")
    out = tmp_path / "out.gguf"
    for part, says in (("mmproj", "has no vision encoder"), ("mtp", "has no head for further tokens")):
        with pytest.raises(ModelError, match=says):
            convert.convert(model, out, source, part=part)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vision_config": {}}))
    write_safetensors(model / "model.safetensors", {"a": 4, "mtp.fc.weight": 4})
    given = convert.convert(model, out, source, part="mmproj").read_text().split()
    assert given[:2] == ["--outtype", "f16"] and "--mmproj" in given
    given = convert.convert(model, out, source, part="mtp").read_text().split()
    assert given[:2] == ["--outtype", "bf16"] and "--mtp" in given
    assert "--no-mtp" in convert.convert(model, out, source, mtp=False).read_text()
    assert "mtp" not in convert.convert(model, out, source).read_text()


def test_a_model_is_converted_under_its_name(model: Path, source: Path, tmp_path: Path) -> None:
    (model / "ggufrq.json").write_text('{"pre_tokenizer": "qwen2"}')
    script = (source / "convert_hf_to_gguf.py").read_text()
    (source / "convert_hf_to_gguf.py").write_text(script + "out.write_text(folder.name)\n")
    out = tmp_path / "out.gguf"
    assert convert.convert(model, out, source).read_text() == "tiny"
    called = replace(convert.inspect(model), name="Some-Model-1B")
    assert convert.convert(called, out, source).read_text() == "Some-Model-1B"


def test_unknown_name_is_refused(model: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no pre-tokenizer 'qwen9'"):
        convert.convert(model, tmp_path / "out.gguf", source, pre_tokenizer="qwen9")


@pytest.mark.parametrize(
    ("architecture", "tensor", "expected"),
    [
        ("Qwen3_5ForCausalLM", "a", True),
        ("Qwen3_5ForCausalLM", "mtp.fc.weight", False),
        ("Qwen3ForCausalLM", "a", False),
        ("Glm4MoeForCausalLM", "model.layers.1.mlp.up_proj.weight", True),
        ("Glm4MoeForCausalLM", "model.layers.2.eh_proj.weight", False),
        ("Glm4MoeForCausalLM", "model.visual.layers.9.mlp.up_proj.weight", True),
    ],
)
def test_layers_that_predict_several_tokens(
    source: Path, tmp_path: Path, architecture: str, tensor: str, expected: bool
) -> None:
    model = make_model(tmp_path / "m", "known", architecture)
    if architecture.startswith("Glm"):
        config = json.loads((model / "config.json").read_text())
        layers = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
        (model / "config.json").write_text(json.dumps(config | layers))
    write_safetensors(model / "model.safetensors", {tensor: 4})
    out = convert.convert(model, tmp_path / "out.gguf", source)
    assert ("--no-mtp" in out.read_text()) is expected


@pytest.mark.parametrize(
    ("extra", "says", "remedy"),
    [
        (
            "import torch_that_is_missing",
            "needs the Python module 'torch_that_is_missing'",
            "-m pip install torch",
        ),
        (
            "sys.exit('ERROR:hf-to-gguf:Model FooForCausalLM is not supported')",
            "architecture FooForCausalLM",
            None,
        ),
        (
            "sys.exit('ERROR:hf-to-gguf:--mtp / --no-nextn are not supported for FooForCausalLM')",
            "does not take the head for further tokens of FooForCausalLM apart",
            "leave out --mtp",
        ),
        ("raise ValueError('odd shape')", "could not be converted: ValueError: odd shape", "see "),
        ("assert 1 > 2", "could not be converted: AssertionError at: assert 1 > 2", "see "),
        (
            "class tokenizer: vocab = {'a': 9}\nvocab_size = 5\n"
            "assert max(tokenizer.vocab.values()) < vocab_size",
            r"the tokenizer of tiny has more tokens than its config\.json says",
            "resize the embedding",
        ),
    ],
)
def test_failures(
    model: Path, source: Path, tmp_path: Path, extra: str, says: str, remedy: str | None
) -> None:
    (source / "convert_hf_to_gguf.py").write_text(_SCRIPT.replace("EXTRA", extra))
    with pytest.raises(ModelError, match=says) as caught:
        convert.convert(model, tmp_path / "out.gguf", source, log=tmp_path / "log")
    assert (remedy or "") in str(caught.value.remedy)
    assert not (tmp_path / "out.gguf").exists()

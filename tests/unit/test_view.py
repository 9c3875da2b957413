"""What a conversion gets to see of a folder: one model, and what the converter cannot misread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sources
import yaml

from ggufrq.base.errors import ModelError
from ggufrq.models import as_gguf, convert, view
from ggufrq.models.resolve import Model, resolve

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "some-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    (path / "tokenizer.json").write_text("{}")
    return path


def weights(path: Path, *names: str, kind: str = "float32") -> None:
    import numpy as np

    sources.write(path, {name: np.zeros((2, 4), kind) for name in names})


def shards(folder: Path, stem: str = "model", count: int = 2, *, index: bool = True) -> list[str]:
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        weights(folder / name, f"{stem}.{i}.weight")
    if index:
        listed = {f"{stem}.{i}.weight": name for i, name in enumerate(names)}
        (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    return names


def identity(folder: Path) -> str:
    return as_gguf.find(Model("folder", folder.name, folder), None, as_gguf.Options()).key


def seen(folder: Path) -> dict[str, bytes]:
    """What is in the view, read."""
    model = convert.inspect(folder)
    with view.view("a name", model.content) as path:
        assert path.name == "a name"
        return {
            inner.relative_to(path).as_posix(): inner.read_bytes()
            for inner in path.rglob("*")
            if inner.is_file()
        }


def test_a_single_file_goes_before_an_index_that_does_not_name_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shards(folder)
    weights(folder / SINGLE, "new.weight")
    assert convert.inspect(folder).tensors == ("new.weight",)
    assert f"{SINGLE} is taken, as transformers does; not {old[0]}, {old[1]}" in capsys.readouterr().err
    assert not {*old, INDEX} & seen(folder).keys()


def test_files_of_other_names_are_not_mixed_in(folder: Path) -> None:
    weights(folder / SINGLE, "a.weight")
    shards(folder, "model_old", index=False)
    assert convert.inspect(folder).tensors == ("a.weight",)
    before = identity(folder)
    (folder / "model_old-00001-of-00002.safetensors").unlink()
    assert identity(folder) == before  # what is not read tells nothing


def test_an_adapter_beside_a_model_is_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(folder / SINGLE, "a.weight")
    weights(folder / "adapter_model.safetensors", "lora_A.weight")
    (folder / "adapter_config.json").write_text("{}")
    assert convert.inspect(folder).tensors == ("a.weight",)
    assert "not adapter_model.safetensors" in capsys.readouterr().err
    assert not [name for name in seen(folder) if name.startswith("adapter_")]


def test_several_models_are_refused_by_their_names(folder: Path) -> None:
    old, new = shards(folder, "old", index=False), shards(folder, "new", 3, index=False)
    with pytest.raises(ModelError, match="has several models") as caught:
        convert.inspect(folder)
    assert all(name in caught.value.message for name in (*old, *new))
    for name in old:
        (folder / name).unlink()
    assert len(convert.inspect(folder).tensors) == 3
    (folder / new[1]).unlink()
    with pytest.raises(ModelError, match=rf"{new[1]} is missing from"):
        convert.inspect(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "a/b.safetensors", "model.bin", 7, None])
def test_an_index_names_files_of_the_folder(folder: Path, name: object) -> None:
    weights(folder.parent / "other.safetensors", "a.weight")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        convert.inspect(folder)


def test_a_tensor_that_is_there_twice(folder: Path) -> None:
    names = shards(folder, index=False)
    weights(folder / names[1], "model.0.weight")
    with pytest.raises(ModelError, match=rf"model\.0\.weight is in {names[0]} and in {names[1]}"):
        convert.inspect(folder)


@pytest.mark.parametrize("beside_a_config", [False, True])
def test_an_adapter_is_no_model(folder: Path, beside_a_config: bool) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/Base-1B"}))
    weights(folder / "adapter_model.safetensors", "lora_A.weight")
    if not beside_a_config:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"is an adapter \(LoRA\) of org/Base-1B") as caught:
        convert.inspect(resolve(str(folder)).path or folder)
    assert "merge it into org/Base-1B first" in str(caught.value.remedy)


def test_an_adapter_beside_a_config_is_known_by_every_command(folder: Path) -> None:
    """Before any of them says that it is not in GGUF yet, or lacks a tokenizer."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/Base-1B"}))
    weights(folder / "adapter_model.safetensors", "lora_A.weight")
    with pytest.raises(ModelError, match=r"is an adapter \(LoRA\) of org/Base-1B"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("kinds", "declared", "expected"),
    [
        ({"float32": 2}, "bfloat16", "F32"),
        ({"uint16": 2}, "float16", "BF16"),
        ({"float16": 2}, "bfloat16", "F16"),
        ({"uint16": 3, "float32": 1}, "float32", "BF16"),
        ({"uint8": 2}, "float16", "F16"),
    ],
)
def test_the_type_is_that_of_the_tensors(
    folder: Path, kinds: dict[str, int], declared: str, expected: str
) -> None:
    import numpy as np

    (folder / "config.json").write_text(json.dumps({"dtype": declared}))
    values = {f"{kind}.{i}": np.zeros((2, 4), kind) for kind, count in kinds.items() for i in range(count)}
    sources.write(folder / SINGLE, values)
    assert convert.inspect(folder).kind == expected


def test_the_file_with_a_template_goes_before_the_one_in_the_configuration(folder: Path) -> None:
    weights(folder / SINGLE, "a.weight")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "eos_token": "<e>"}))
    assert json.loads(seen(folder)["tokenizer_config.json"])["chat_template"] == "old"
    (folder / "chat_template.jinja").write_text("new")
    found = seen(folder)
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "<e>"}
    assert found["chat_template.jinja"] == b"new"


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "generation_config.json",
        SINGLE,
        "README.md",
    ],
)
def test_whatever_is_read_tells_models_apart(folder: Path, name: str) -> None:
    weights(folder / SINGLE, "a.weight")
    before = identity(folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if name == SINGLE:
        weights(path, "b.weight")
    else:
        path.write_text("---\nlicense: mit\n---\n" if name == "README.md" else '{"temperature": 0.5}')
    assert identity(folder) != before


def test_whatever_is_not_read_does_not(folder: Path) -> None:
    weights(folder / SINGLE, "a.weight")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nText.")
    before = identity(folder)
    for name in ("some-model-Q8_0.gguf", "picture.png", "optimizer.bin", ".hidden"):
        (folder / name).write_text("x")
    (folder / "some-model-GGUF").mkdir()
    (folder / "some-model-GGUF" / "x.gguf").write_text("x")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nOther text.")
    assert identity(folder) == before


def head(folder: Path) -> dict[str, object]:
    text = seen(folder)["README.md"].decode()
    found = yaml.safe_load(text.removeprefix("---\n").removesuffix("---\n"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("text", "kept", "told"),
    [
        ("license: mit\nlanguage:\n- en\n- no\n", {"license": "mit", "language": ["en", "no"]}, ""),
        ("base_model: org/Base\nversion: 2\n", {"base_model": ["org/Base"], "version": "2"}, ""),
        ("license: [mit, bsd]\ntags: [a, {b: c}]\n", {"tags": ["a"]}, "license is no text"),
        ("model-index:\n- name: x\n\tresults: []\n", {}, ""),
        ("license: gr\xfcn\n", {"license": "grün"}, "line 2, is not UTF-8"),
    ],
)
def test_the_head_of_a_readme(
    folder: Path, text: str, kept: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(folder / SINGLE, "a.weight")
    (folder / "README.md").write_bytes(f"---\n{text}---\nText.".encode("latin-1"))
    assert head(folder) == kept
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("text", ["---\nbase_model: foo: bar\n---\n", "---\n- a\n---\n", "No head.", ""])
def test_a_readme_without_a_head_stops_nothing(
    folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(folder / SINGLE, "a.weight")
    (folder / "README.md").write_text(text)
    assert "README.md" not in seen(folder)
    told = capsys.readouterr().err
    assert ("README.md, line 2 is no YAML" in told) is ("foo: bar" in text)


def test_settings_that_are_no_numbers_stop_nothing(folder: Path) -> None:
    weights(folder / SINGLE, "a.weight")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_k": "many", "top_p": None, "do_sample": True}))
    assert json.loads(seen(folder)["generation_config.json"]) == {"temperature": 0.6}
    for bad in (b"[]", b"\xff", b"{"):
        path.write_bytes(bad)
        assert json.loads(seen(folder)["generation_config.json"]) == {}


def test_the_name_that_a_model_was_loaded_by_is_that_of_its_ancestor(folder: Path) -> None:
    weights(folder / SINGLE, "a.weight")
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "org/Base", "vocab_size": 4}))
    assert json.loads(seen(folder)["config.json"]) == {"vocab_size": 4}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "mxfp4"}, "MXFP4_MOE"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "NVFP4"),
        ({"quant_method": "fp8"}, "BF16"),
        (None, "BF16"),
    ],
)
def test_codes_that_stay_name_the_file(folder: Path, settings: object, named: str) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    weights(folder / SINGLE, "a.weight", kind="uint8")
    assert convert.inspect(folder).kind == named


def test_floats_that_are_declared_codes(folder: Path) -> None:
    """Decoded by somebody, who left in the configuration what they were."""
    settings: dict[str, str] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    weights(folder / SINGLE, "a.weight")
    found = convert.inspect(folder)
    assert found.kind == found.out_type.upper()
    for method in ("awq", "mxfp4"):
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        with pytest.raises(ModelError, match=rf"by {method.upper()}, but they are floats") as caught:
            convert.convert(folder, folder / "out.gguf", folder / "no tree")
        assert "take quantization_config out of" in str(caught.value.remedy)


@pytest.mark.parametrize(("method", "named"), [("awq", "AWQ"), ("bitsandbytes", "bitsandbytes"), ("x", "x")])
def test_codes_that_the_converter_does_not_read(folder: Path, method: str, named: str) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    weights(folder / SINGLE, "a.weight", kind="uint8")
    with pytest.raises(ModelError, match=f"are quantized by {named}, which llama.cpp's converter does not"):
        convert.convert(folder, folder / "out.gguf", folder / "no tree")

"""Settings for runtimes without our types: the data, the files, the figures."""

from __future__ import annotations

import configparser
import datetime
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.cache.kv import kv_types
from ggufrq.cli.fallback import fallback as command
from ggufrq.runtimes import fallback, runtime, runtimes

LLAMA_CPP = set(kv_types()) - {name for name, kind in kv_types().items() if kind.ours}


def model(
    folder: Path,
    name: str = "Small-1B-Q8_0.gguf",
    *,
    head: int = 128,
    source: str = "",
    fold: str = "",
    norms: bool = False,
) -> Path:
    """A model of two layers with two KV heads, made for 65,536 tokens; ``norms`` of Q and K or none."""
    import gguf

    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / name, "llama")
    writer.add_context_length(65536)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if source:
        writer.add_string("ggufrq.source.repo", source)
    if fold:
        writer.add_string("ggufrq.fold", fold)
    for layer in range(2):
        if norms:
            writer.add_tensor(f"blk.{layer}.attn_k_norm.weight", np.ones(head, dtype=np.float32))
        for side in "kv":
            writer.add_tensor(f"blk.{layer}.attn_{side}.weight", np.zeros((2 * head, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / name


def test_what_metadata_does_not_tell_is_no_no(tmp_path: Path) -> None:
    """Heads of which nothing is known are not heads that iso3 cannot hold."""
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = CliRunner().invoke(command, ["llama.cpp", str(path)], catch_exceptions=False).output
    assert "whether iso3 can hold this model's heads its metadata does not tell" in text
    small = model(tmp_path, head=32)
    text = CliRunner().invoke(command, ["llama.cpp", str(small)], catch_exceptions=False).output
    assert "iso3 cannot hold this model's cache" in text


@pytest.mark.parametrize("name", list(runtimes()))
def test_data(name: str) -> None:
    found = runtime(name)
    assert found.sources and all(source.startswith("https://") for source in found.sources)
    assert datetime.date(2026, 11, 1) <= found.checked <= datetime.datetime.now().date()
    assert found.version and found.flash_attention and found.steps
    assert not any(found.takes(kind) for kind in kv_types() if kind not in LLAMA_CPP)
    if name != "vllm":
        assert found.use == "q8_0" and set(found.types) <= LLAMA_CPP
    assert found.file is None or found.file.verified


def test_unknown_runtime() -> None:
    with pytest.raises(UsageError, match="nothing is known of a runtime 'tgi'") as caught:
        runtime("tgi")
    assert "lmstudio, ollama" in str(caught.value.remedy)


def test_lmstudio(tmp_path: Path) -> None:
    advice = fallback.advise(runtime("lmstudio"), model(tmp_path), 8192)
    (file,) = advice.files
    assert file.name == "Small-1B-Q8_0.gguf.json"
    fields = {entry["key"]: entry["value"] for entry in json.loads(file.text)["load"]["fields"]}
    assert fields == {
        "llm.load.contextLength": 8192,
        "llm.load.llama.flashAttention": True,
        "llm.load.llama.kCacheQuantizationType": {"checked": True, "value": "q8_0"},
        "llm.load.llama.vCacheQuantizationType": {"checked": True, "value": "q8_0"},
    }


def test_ollama(tmp_path: Path) -> None:
    path = model(tmp_path / "with blanks")
    advice = fallback.advise(runtime("ollama"), path, 8192)
    assert {file.name: file.text for file in advice.files} == {
        "Modelfile": f"FROM {path}\nPARAMETER num_ctx 8192\n",
        "ollama.env": "OLLAMA_FLASH_ATTENTION=1\nOLLAMA_KV_CACHE_TYPE=q8_0\n",
    }
    assert advice.steps[1] == "ollama create Small-1B -f Modelfile"


def test_koboldcpp(tmp_path: Path) -> None:
    path = model(tmp_path, 'a "name" of \\ mine.gguf')
    advice = fallback.advise(runtime("koboldcpp"), path, 8192)
    assert json.loads(advice.files[0].text) == {
        "model_param": str(path),
        "contextsize": 8192,
        "quantkv": "q8_0",
        "noflashattention": False,
    }
    assert shlex.split(advice.steps[0]) == ["koboldcpp", "--config", advice.files[0].name]


def test_jan_gets_lines_to_add(tmp_path: Path) -> None:
    (file,) = fallback.advise(runtime("jan"), model(tmp_path), 8192).files
    assert file.add
    assert yaml.safe_load(file.text) == {
        "ctx_size": 8192,
        "flash_attn": "on",
        "cache_type_k": "q8_0",
        "cache_type_v": "q8_0",
    }


@pytest.mark.parametrize("source", ["", "Qwen/Qwen3-0.6B"])
def test_vllm(tmp_path: Path, source: str) -> None:
    path = model(tmp_path, source=source)
    (file,) = fallback.advise(runtime("vllm"), path, 8192).files
    expected: dict[str, Any] = {"model": str(path), "kv-cache-dtype": "fp8", "max-model-len": 8192}
    assert yaml.safe_load(file.text) == expected | ({"tokenizer": source} if source else {})


def test_llama_cpp(tmp_path: Path) -> None:
    path = model(tmp_path / "with blanks")
    advice = fallback.advise(runtime("llama.cpp"), path)
    parser = configparser.ConfigParser()
    parser.read_string("[top]\n" + advice.files[0].text)
    assert dict(parser["Small-1B"]) == {
        "model": str(path),
        "ctx-size": "32768",
        "flash-attn": "on",
        "cache-type-k": "q8_0",
        "cache-type-v": "q8_0",
    }
    assert shlex.split(advice.steps[2])[1:3] == ["-m", str(path)]


def test_names_that_a_file_cannot_hold(tmp_path: Path) -> None:
    path = model(tmp_path / "number #1")
    with pytest.raises(UsageError, match="cannot be written in an ini file"):
        fallback.advise(runtime("llama.cpp"), path)
    assert fallback.advise(runtime("koboldcpp"), path).files


def test_how_much_longer_a_context(tmp_path: Path) -> None:
    path = model(tmp_path)
    advice = fallback.advise(runtime("ollama"), path, 8192)
    values = 2 * 2 * 2 * 128  # layers, sides, heads of 128
    assert advice.kv_bytes == 8192 * values * 34 // 32
    assert advice.ours_context == int(8192 * 8.5 / 3.125) and advice.times == 8.5 / 3.125
    assert fallback.advise(runtime("vllm"), path, 8192).times == 8 / 3.125
    small = fallback.advise(runtime("ollama"), model(tmp_path, "b.gguf", head=64), 8192)
    assert small.kv_bytes == 8192 * values // 2 * 34 // 32
    assert small.ours_context == int(8192 * 8.5 / 3.25) and small.times == 8.5 / 3.25
    filled = fallback.advise(runtime("ollama"), model(tmp_path, "c.gguf", head=96), 8192)
    assert filled.kv_bytes == 8192 * values * 3 // 4 * 34 // 32
    assert filled.ours_context == int(8192 * 8.5 / (50 / 12)) and filled.times == 8.5 / (50 / 12)
    odd = fallback.advise(runtime("ollama"), model(tmp_path, "d.gguf", head=32), 8192)
    assert odd.times is None and odd.ours_context is None


def test_what_fits() -> None:
    """By the size of heads, and whether they are filled up in fewer bits than they take otherwise."""

    def values(architecture: str, k: int, v: int | None = None, **more: int) -> dict[str, Any]:
        found = {"block_count": 2, "attention.head_count": 4, "embedding_length": 512, **more}
        found |= {"attention.key_length": k, "attention.value_length": k if v is None else v}
        keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in found.items()}
        return {"general.architecture": architecture, **keys}

    for head, kinds in (
        (80, "234"),
        (96, "23"),
        (112, "234"),
        (160, "23"),
        (32, ""),
        (48, "234"),
        (16, "23"),
    ):
        assert "".join(bits for bits in "234" if fallback.fits(values("llama", head), f"iso{bits}")) == kinds
    for head in (64, 80, 128):
        assert fallback.fits(values("llama", head), "iso3", gpu=True)
    assert fallback.fits(values("llama", 128), "iso5")
    assert not fallback.fits(values("llama", 128), "iso5", gpu=True)
    latent = {"attention__key_length_mla": 192}
    for gpu in (False, True):
        assert fallback.fits(values("deepseek2", 576, 512, **latent), "iso3", gpu=gpu)
    assert not fallback.fits(values("deepseek2", 608, 512, **latent), "iso3")
    assert not fallback.fits(values("deepseek4", 512), "iso3")
    assert fallback.fits(values("deepseek4", 512), "q8_0")


def test_folded_keys(tmp_path: Path) -> None:
    """Said where they were seen to be worth it, and of a model that has them."""

    def notes(path: Path) -> str:
        return " ".join(fallback.advise(runtime("ollama"), path).notes)

    plain, normed = model(tmp_path / "a"), model(tmp_path / "b", norms=True)
    folded = model(tmp_path / "c", norms=True, fold="kv")
    assert "--fold kv" not in notes(plain)
    assert "ggufrq quantize MODEL --fold kv makes files that compute the same" in notes(normed)
    assert "The keys of this model are folded" in notes(folded) and "--fold kv" not in notes(folded)
    said = CliRunner().invoke(command, ["ollama", str(normed)]).output
    assert "--fold kv" in said


def test_a_damaged_model(tmp_path: Path) -> None:
    path = model(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="is damaged"):
        fallback.advise(runtime("ollama"), path)


def test_command(tmp_path: Path) -> None:
    path, out = model(tmp_path), tmp_path / "out"
    shown = CliRunner().invoke(command, ["ollama", str(path), "-c", "8192"])
    assert shown.exit_code == 0, shown.output
    for part in (
        "Ollama takes f16, q8_0, q4_0, K and V alike",
        "looked up on 2026-",
        "8,192 tokens in 8.9 MB; iso3 would hold 22,282 in the same memory (2.72 times)",
        "environment      OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=q8_0",
        "    PARAMETER num_ctx 8192",
        "https://github.com/ollama/ollama/",
    ):
        assert part in shown.output
    told = CliRunner().invoke(command, ["ollama", str(path), "-c", "8192", "-o", str(out), "--json"])
    data = json.loads(told.stdout)
    assert data["written"] == [str(out / "Modelfile"), str(out / "ollama.env")]
    assert (out / "Modelfile").read_text() == data["files"][0]["text"]
    assert (data["use"], data["ours_context"], data["checked"][:4]) == ("q8_0", 22282, "2026")


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    path = model(tmp_path)
    (tmp_path / "Modelfile").write_text("FROM mine\n")
    result = CliRunner().invoke(command, ["ollama", str(path), "-o", str(tmp_path)])
    assert isinstance(result.exception, UsageError) and "Modelfile is there and differs" in str(
        result.exception
    )
    assert (tmp_path / "Modelfile").read_text() == "FROM mine\n"
    assert not (tmp_path / "ollama.env").exists()

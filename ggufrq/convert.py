"""A Hugging Face folder to GGUF, by llama.cpp's own converter from the tree that was built."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq import paths, proc
from ggufrq.errors import ModelError

#: Declares what the converter cannot know, beside the model's own files: ``{"pre_tokenizer": "qwen2"}``.
DECLARATION = "ggufrq.json"
NEEDED_MODULES = "torch transformers sentencepiece safetensors"

_WRAPPER = Path(__file__).with_name("_hf_to_gguf.py")
_WRITTEN = re.compile(r"Writing: +(\d+)%")
_PRE_TOKENIZER = re.compile(r'tokenizer_pre == "([\w.-]+)"')


@dataclass(frozen=True)
class HfModel:
    """A folder in Hugging Face form whose files are all there: tensor names, and the bytes of their data."""

    folder: Path
    config: dict[str, Any]
    tensors: tuple[str, ...]
    data_bytes: int

    @property
    def out_type(self) -> str:
        """The 16-bit type that keeps the weights as they are: ``bf16``, or ``f16``."""
        text = self.config.get("text_config", {})
        dtype = next(
            (c[k] for c in (self.config, text) for k in ("dtype", "torch_dtype") if k in c), "bfloat16"
        )
        return "f16" if dtype == "float16" else "bf16"

    @property
    def has_mtp(self) -> bool:
        """Whether it brings the layers that predict several tokens."""
        return any(name.startswith(("mtp.", "model.mtp.")) for name in self.tensors)


def inspect(folder: Path) -> HfModel:
    """Check a model folder without reading its weights: configuration, tokenizer, every shard whole.

    Raises ModelError that names what is missing or damaged.
    """
    config = _json(folder / "config.json", "this is not a model in Hugging Face form")
    if not any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    ):
        raise ModelError(f"{folder} has no tokenizer", remedy="download the model again, with tokenizer.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index, "the list of shards")["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        found = [n.name for p in ("*.bin", "*.pth", "*.gguf") for n in folder.glob(p)]
        hint = f"; it has {found[0]}, which ggufrq does not convert" if found else ""
        raise ModelError(f"{folder} has no safetensors file{hint}", remedy="download the model again")
    tensors: list[str] = []
    size = 0
    for name in names:
        header, data = read_safetensors_header(folder / name)
        tensors += header
        size += data
    return HfModel(folder, config, tuple(tensors), size)


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file by name, and the bytes of its data. Raises ModelError when it is not
    whole."""
    again = f"download {path.name} again"
    try:
        whole = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(whole - 8, 100_000_000):
                raise ModelError(f"{path} is not a safetensors file, or is damaged", remedy=again)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing from {path.parent}", remedy=again) from None
    except ValueError:
        raise ModelError(f"{path} is damaged: its header cannot be read", remedy=again) from None
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (KeyError, TypeError):
        raise ModelError(f"{path} is damaged: its header cannot be read", remedy=again) from None
    if 8 + length + end != whole:
        raise ModelError(f"{path} is damaged: {whole} bytes instead of {8 + length + end}", remedy=again)
    return tensors, end


def declared_pre_tokenizer(folder: Path) -> str | None:
    """The pre-tokenizer that the folder declares in ``ggufrq.json``, or None."""
    path = folder / DECLARATION
    if not path.is_file():
        return None
    name = _json(path, "the declaration of the pre-tokenizer").get("pre_tokenizer")
    return str(name) if name else None


def known_pre_tokenizers(source: Path) -> set[str]:
    """Names of the pre-tokenizers that the llama.cpp in ``source`` implements."""
    return set(_PRE_TOKENIZER.findall((source / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")))


def convert(
    folder: Path,
    out: Path,
    source: Path,
    *,
    pre_tokenizer: str | None = None,
    log: Path | None = None,
    on_percent: Callable[[int], None] | None = None,
) -> Path:
    """Convert the model in ``folder`` to ``out`` with the converter of the llama.cpp tree ``source``.

    ``pre_tokenizer`` goes before what the folder declares. ``out`` appears only when it is whole.
    Raises ModelError for a model that is damaged, unsupported or undeclared, and when torch is missing.
    """
    with paths.atomic_path(out) as temporary:
        convert_to(temporary, folder, source, pre_tokenizer=pre_tokenizer, log=log, on_percent=on_percent)
    return out


def convert_to(
    out: Path,
    folder: Path,
    source: Path,
    *,
    pre_tokenizer: str | None = None,
    log: Path | None = None,
    on_percent: Callable[[int], None] | None = None,
) -> None:
    """As ``convert``, but straight into ``out``, which is left half-made on failure."""
    model = inspect(folder)
    declared = pre_tokenizer or declared_pre_tokenizer(folder)
    if declared is not None and declared not in known_pre_tokenizers(source):
        raise ModelError(
            f"llama.cpp has no pre-tokenizer '{declared}'",
            remedy=f'the names are in {source / "src" / "llama-vocab.cpp"}: tokenizer_pre == "…"',
        )

    def progressed(line: str) -> None:
        found = _WRITTEN.findall(line)
        if found and on_percent is not None:
            on_percent(int(found[-1]))

    command = [sys.executable, str(_WRAPPER), str(source), declared or "-"]
    command += [str(folder), "--outtype", model.out_type, "--outfile", str(out)]
    if _takes_no_mtp(model):
        command.append("--no-mtp")
    completed = proc.run(
        command,
        log=log,
        check=False,
        env={"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": None},
        on_stderr=progressed,
    )
    if completed.rc != 0 or not out.is_file():
        raise _failure(folder, completed, log)


def _takes_no_mtp(model: HfModel) -> bool:
    """Upstream takes it for granted that these architectures bring the layers that predict several tokens."""
    names = model.config.get("architectures") or [""]
    return str(names[0]).startswith(("Qwen3_5", "Qwen3Next")) and not model.has_mtp


def _failure(folder: Path, completed: proc.Completed, log: Path | None) -> ModelError:
    output = completed.stdout + completed.stderr
    if "ggufrq: unknown pre-tokenizer" in output:
        return ModelError(
            f"llama.cpp does not know the tokenizer of {folder.name}: its pre-tokenizer must be declared",
            remedy=f'--pre-tokenizer NAME, or {{"pre_tokenizer": "NAME"}} in {folder / DECLARATION}; NAME '
            "as the model's authors say, e.g. qwen2 or llama-bpe: a wrong one costs quality silently",
        )
    conflict = re.search(r"ggufrq: known pre-tokenizer (\S+)", output)
    if conflict is not None:
        return ModelError(
            f"llama.cpp knows the pre-tokenizer of {folder.name} as '{conflict[1]}', another one is declared",
            remedy=f"--pre-tokenizer {conflict[1]}, or correct {folder / DECLARATION}",
        )
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", output)
    if missing is not None:
        return ModelError(
            f"conversion needs the Python module '{missing[1]}', which is not installed",
            remedy=f"{os.fspath(sys.executable)} -m pip install {NEEDED_MODULES}",
        )
    unsupported = re.search(r"Model (\S+) is not supported", output)
    if unsupported is not None:
        return ModelError(f"llama.cpp does not support the architecture {unsupported[1]} of {folder.name}")
    lines = [line.strip() for line in completed.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit status {completed.rc}"
    return ModelError(f"{folder.name} could not be converted: {reason}", remedy=f"see {log}" if log else None)


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {what}") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} is damaged")
    return data

"""A Hugging Face folder to GGUF, by llama.cpp's own converter from the tree that was built."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufrq.base import paths, proc, texts
from ggufrq.base.errors import ModelError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.foreign import foreign
from ggufrq.ggufs.tensors import is_float
from ggufrq.models import view
from ggufrq.models.packed import FLOATS, codes, not_read, packed_as, told
from ggufrq.models.view import Content

#: Declares what the converter cannot know, beside the model's own files: ``{"pre_tokenizer": "qwen2"}``.
DECLARATION = "ggufrq.json"
NEEDED_MODULES = "torch transformers sentencepiece safetensors"

#: In place of the name of a pre-tokenizer, where only headers are wanted: whichever it is.
ANY_TOKENIZER = "*"

#: What a conversion makes: the model, its vision projector, or the head that predicts further tokens.
PARTS = ("model", "mmproj", "mtp")
#: What the architecture of a draft that was made for one model is called.
_DRAFT = re.compile("eagle3|dflash|dspark", re.IGNORECASE)
#: Bytes of a value by safetensors' name of its type.
_VALUE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_WRAPPER = Path(__file__).with_name("_hf_to_gguf.py")
_WRITTEN = re.compile(r"Writing: +(\d+)%")
#: A layer of the language model, in safetensors.
_LAYER = re.compile(r"(?:language_model\.)?model\.(?:language_model\.)?layers\.(\d+)\.")
_PRE_TOKENIZER = re.compile(r'tokenizer_pre == "([\w.-]+)"')


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: the file, safetensors' name of its type, its shape, and where its data
    begin in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def values(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class HfModel:
    """A folder in Hugging Face form whose files are all there: tensor names, and the bytes of their data.

    ``name`` is what the model is called where the folder is not (the Hub's cache names folders by commits);
    ``weights`` are the files that were chosen, ``entries`` what is in them.
    """

    folder: Path
    config: dict[str, Any]
    tensors: tuple[str, ...]
    data_bytes: int
    name: str = ""
    weights: view.Weights = field(default_factory=lambda: view.Weights((), {}))
    entries: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def out_type(self) -> str:
        """The type that keeps the weights as they are: ``bf16``, ``f16`` or ``f32``, that of most of them.
        Where they are codes, what the configuration declares of the two in 16 bits."""
        kinds: Counter[str] = Counter()
        for name, entry in self.entries.items():
            if len(entry.shape) > 1 and entry.dtype in FLOATS and "scale" not in name.rpartition(".")[2]:
                kinds[FLOATS[entry.dtype]] += entry.values
        if kinds:
            return max(kinds, key=lambda kind: kinds[kind])
        text = self.config.get("text_config", {})
        dtype = next(
            (c[k] for c in (self.config, text) for k in ("dtype", "torch_dtype") if k in c), "bfloat16"
        )
        return "f16" if dtype == "float16" else "bf16"

    @property
    def kind(self) -> str:
        """The type that the converted file is named by: that of the weights, or of the codes that stay."""
        packed = packed_as(self.config, self.folder) if self.has_codes else None
        return packed or self.out_type.upper()

    @property
    def has_codes(self) -> bool:
        """Whether any weights are codes, whatever the configuration declares."""
        return bool(codes(self.entries))

    @property
    def quantized_by(self) -> str:
        """How the weights are quantized, for people; empty where they are floats."""
        return told(self.config, self.folder) if self.has_codes else ""

    @property
    def called(self) -> str:
        """The name of the model."""
        return self.name or self.folder.absolute().name

    @property
    def content(self) -> Content:
        """What the converter gets to see of the folder."""
        return view.files(self.folder, self.weights)

    @property
    def has_mtp(self) -> bool:
        """Whether it brings the layers that predict several tokens: by their names, or as layers behind the
        last one (GLM, MiMo, DeepSeek)."""
        return any(self._is_head(name) for name in self.tensors)

    @property
    def mtp_has_codes(self) -> bool:
        """Whether codes are among these layers."""
        return any(self._is_head(name) for name in codes(self.entries))

    def _is_head(self, name: str) -> bool:
        if name.startswith(("mtp.", "model.mtp.")):
            return True
        layers, layer = self._number("num_hidden_layers"), _LAYER.match(name)
        further = self._number("num_nextn_predict_layers")
        return bool(layer and layers and further and int(layer[1]) >= layers)

    @property
    def assumes_mtp(self) -> bool:
        """Whether the converter takes it for granted that the model brings such layers."""
        names = self.config.get("architectures") or [""]
        return str(names[0]).startswith(("Qwen3_5", "Qwen3Next")) or bool(
            self._number("num_nextn_predict_layers")
        )

    def _number(self, key: str) -> int:
        """A number of the configuration, of its text part first; 0 when there is none."""
        text = self.config.get("text_config")
        places = [text if isinstance(text, dict) else {}, self.config]
        found = next((place[key] for place in places if key in place), 0)
        return found if isinstance(found, int) else 0

    @property
    def has_vision(self) -> bool:
        """Whether it brings an encoder of images, whose projector can be converted."""
        return "vision_config" in self.config


def inspect(folder: Path) -> HfModel:
    """Check a model folder without reading its weights: configuration, tokenizer, every shard whole.

    Raises ModelError that names what is missing or damaged.
    """
    config = _json(folder / "config.json", "this is not a model in Hugging Face form")
    if not any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    ):
        if any(_DRAFT.search(str(name)) for name in config.get("architectures") or ()):
            raise ModelError(
                f"{folder} is a draft that takes the tokenizer of its model, which ggufrq does not convert",
                remedy=f"$(ggufrq where source)/convert_hf_to_gguf.py {folder} --target-model-dir MODEL",
            )
        raise ModelError(f"{folder} has no tokenizer", remedy="download the model again, with tokenizer.json")
    chosen = view.weights(folder)
    entries: dict[str, Entry] = {}
    size = 0
    for name in chosen.files:
        header, data = read_safetensors_header(folder / name)
        lacking = [
            tensor for tensor, shard in chosen.listed.items() if shard == name and tensor not in header
        ]
        if lacking:
            raise ModelError(f"{name} has no {lacking[0]}, which the index says is in it")
        twice = sorted(entries.keys() & header.keys())
        if twice:
            raise ModelError(
                f"{twice[0]} is in {entries[twice[0]].file} and in {name}",
                remedy=f"leave in {folder} the files of one model only",
            )
        start = (folder / name).stat().st_size - data
        entries |= {
            tensor: Entry(name, str(e["dtype"]), tuple(e["shape"]), start + e["data_offsets"][0])
            for tensor, e in header.items()
        }
        size += data
    return HfModel(folder, config, tuple(entries), size, weights=chosen, entries=entries)


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
                raise foreign(path, f"{path} is not a safetensors file, or is damaged", again)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing from {path.parent}", remedy=again) from None
    except ValueError:
        raise ModelError(f"{path} is damaged: its header cannot be read", remedy=again) from None
    try:
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = _check_layout(tensors)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelError(f"{path} is damaged: its header makes no sense", remedy=again) from None
    if 8 + length + end != whole:
        raise ModelError(f"{path} is damaged: {whole} bytes instead of {8 + length + end}", remedy=again)
    return tensors, end


def _check_layout(tensors: dict[str, Any]) -> int:
    """Where the data of a safetensors file ends; its tensors must lie one behind the other, each as long as
    its shape says. Raises ValueError."""
    end = 0
    for entry in sorted(tensors.values(), key=lambda entry: entry["data_offsets"][0]):
        start, stop = entry["data_offsets"]
        size = _VALUE_BYTES.get(entry["dtype"])
        if start != end or stop < start or (size and stop - start != size * math.prod(entry["shape"])):
            raise ValueError(entry)
        end = stop
    return end


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
    folder: Path | HfModel,
    out: Path,
    source: Path,
    *,
    pre_tokenizer: str | None = None,
    part: str = "model",
    mtp: bool = True,
    what: str = "all",
    log: Path | None = None,
    listener: Listener = SILENT,
) -> Path:
    """Convert the model in ``folder``, which may have been inspected, to ``out`` with the converter of the
    llama.cpp tree ``source``.

    ``pre_tokenizer`` goes before what the folder declares. ``part`` is one of ``PARTS``; ``mtp`` tells
    whether the model keeps its head for further tokens. ``what``: with ``header`` a hole takes the place of
    the weights, with ``keys`` those alone are there that Q and K come from; ``sources:FILE`` and
    ``only:FILE`` as in ``_hf_to_gguf.py``. ``out`` appears only when it is whole. Raises ModelError for a
    model that is damaged, unsupported, undeclared or without that part, and when torch is missing.
    """
    with paths.atomic_path(out) as temporary:
        convert_to(
            temporary,
            folder if isinstance(folder, HfModel) else inspect(folder),
            source,
            pre_tokenizer=pre_tokenizer,
            part=part,
            mtp=mtp,
            what=what,
            log=log,
            listener=listener,
        )
    return out


def convert_to(
    out: Path,
    model: HfModel,
    source: Path,
    *,
    pre_tokenizer: str | None = None,
    part: str = "model",
    mtp: bool = True,
    what: str = "all",
    log: Path | None = None,
    listener: Listener = SILENT,
) -> None:
    """As ``convert``, but straight into ``out``, which is left half-made on failure."""
    folder = model.folder
    require_part(model, part)
    require_readable(model)
    declared = pre_tokenizer or declared_pre_tokenizer(folder)
    if declared not in (None, ANY_TOKENIZER) and declared not in known_pre_tokenizers(source):
        raise ModelError(
            f"llama.cpp has no pre-tokenizer '{declared}'",
            remedy=f'the names are in {source / "src" / "llama-vocab.cpp"}: tokenizer_pre == "…"',
        )

    def progressed(line: str) -> None:
        found = _WRITTEN.findall(line)
        if found:
            listener.reach(int(found[-1]))

    command = [
        sys.executable,
        *("-E", "-B", "-X", "utf8"),  # no variable of Python's changes what it does
        str(_WRAPPER),
        str(source),
        declared or "-",
        what,
    ]
    with view.view(texts.clean(model.called), model.content) as path:
        command += [str(path), "--outtype", part_type(model, part), "--outfile", str(out.absolute())]
        command += _part_options(model, part, mtp)
        completed = proc.run(command, log=log, check=False, env={"HF_HUB_OFFLINE": "1"}, on_stderr=progressed)
    if completed.rc != 0 or not out.is_file():
        raise _failure(folder, completed, log)


def require_readable(model: HfModel) -> None:
    """Raise ModelError when the weights are quantized in a way that the converter does not read, or are said
    to be, and are not."""
    unread = not_read(model.config, model.folder, model.entries)
    if unread is not None and not model.has_codes:
        raise ModelError(
            f"the configuration of {model.called} says that its weights are quantized by {unread}, but they "
            "are floats",
            remedy=f"take quantization_config out of {model.folder / 'config.json'}",
        )
    if unread is not None:
        raise ModelError(
            f"the weights of {model.called} are quantized by {unread}, which llama.cpp's converter does "
            "not read",
            remedy="start from the original model, in 16 bits",
        )


def require_kind(made: Path, model: HfModel, part: str = "model") -> None:
    """Raise ModelError when the file of a part would be called BF16, F16 or F32 and holds codes, or the model
    the other way round: whatever the converter makes of weights that were quantized before."""
    held = sorted(kind for kind in read_gguf(made).types if not is_float(kind.lower()))
    kind = part_kind(model, part)
    floats = is_float(kind.lower())
    if (held and floats) or (part == "model" and not held and not floats):
        raise ModelError(
            f"{model.called} would be called {kind}, but the converter made of it "
            f"{', '.join(held) if held else 'floats alone'}",
            remedy="start from the original model, in 16 bits",
        )


def part_type(model: HfModel, part: str) -> str:
    """The type that a part is converted to: projectors to f16, which every backend computes in."""
    return "f16" if part == "mmproj" else model.out_type


def part_kind(model: HfModel, part: str) -> str:
    """The type that the file of a part is named by (``BF16``)."""
    codes_stay = part == "mtp" and model.mtp_has_codes
    return model.kind if part == "model" or codes_stay else part_type(model, part).upper()


def require_part(model: HfModel, part: str) -> None:
    """Raise ModelError when the model does not have this part."""
    if part == "mmproj" and not model.has_vision:
        raise ModelError(f"{model.folder.name} has no vision encoder", remedy="leave out --mmproj")
    if part == "mtp" and not model.has_mtp:
        raise ModelError(
            f"{model.folder.name} has no head for further tokens", remedy="leave out --mtp apart"
        )


def _part_options(model: HfModel, part: str, mtp: bool) -> list[str]:
    """Options of the converter, which must be told when the layers that predict several tokens are not there
    or not wanted."""
    if part != "model":
        return [f"--{part}"]
    unwanted = model.has_mtp and not mtp
    return ["--no-mtp"] if unwanted or (model.assumes_mtp and not model.has_mtp) else []


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
    early = re.search(r"ggufrq: reads (.+) before it writes", output)
    if early is not None:
        return ModelError(
            f"{folder.name} cannot be made shard by shard: its conversion reads {early[1]} before "
            "anything is written",
            remedy="without --stream, where the disk has room for the whole model",
        )
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", output)
    if missing is not None:
        return ModelError(
            f"conversion needs the Python module '{missing[1]}', which is not installed",
            remedy=f"{os.fspath(sys.executable)} -m pip install {NEEDED_MODULES}",
        )
    if "assert max(tokenizer.vocab.values()) < vocab_size" in output:
        return ModelError(
            f"the tokenizer of {folder.name} has more tokens than its config.json says (vocab_size)",
            remedy="download the model again; where tokens were added, resize the embedding by them",
        )
    no_head = re.search(r"--mtp / --no-nextn are not supported for (\S+)", output)
    if no_head is not None:
        return ModelError(
            f"llama.cpp's converter does not take the head for further tokens of {no_head[1]} apart",
            remedy="leave out --mtp",
        )
    unsupported = re.search(r"Model (\S+) is not supported", output)
    if unsupported is not None:
        return ModelError(f"llama.cpp does not support the architecture {unsupported[1]} of {folder.name}")
    return ModelError(
        f"{folder.name} could not be converted: {_reason(completed)}", remedy=f"see {log}" if log else None
    )


def _reason(completed: proc.Completed) -> str:
    """The last words of the converter, and where an error has none, the line of its source that failed."""
    lines = [line.strip() for line in completed.stderr.splitlines() if line.strip()]
    if not lines:
        return f"exit status {completed.rc}"
    if re.fullmatch(r"\w+(Error|Exception):?", lines[-1]):
        code = next((line for line in reversed(lines[:-1]) if not set(line) <= set("^~ ")), "")
        return f"{lines[-1].rstrip(':')} at: {code}" if code else lines[-1]
    return lines[-1]


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

"""What a conversion gets to see of a model's folder: its weights, once, and all else that the converter
reads, in a form that it cannot misread. What is not in the view changes nothing, and all that is in it tells
one model from another.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ggufrq.base import log
from ggufrq.base.errors import ModelError
from ggufrq.base.results import file_sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
#: Up to this size a file is known by its content, beyond it by its size and time.
_HASHED = 256 << 20
_SHARD = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")
#: Weights in other forms, models made of this one, and what says nothing of the model.
_LEFT_OUT = (".safetensors", ".bin", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md", ".png", ".jpg")
#: Folders that the converter looks into.
_FOLDERS = re.compile(r"^(additional_chat_templates|\w*_tokenizer|\d+_[A-Z]\w*)$")
#: What the converter takes from the head of a README.
_HEAD_TEXTS = frozenset(
    f"{prefix}{key}"
    for prefix in ("", "model_")
    for key in (
        *("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"),
        *("url", "doi", "uuid", "repo_url", "creator", "type"),
    )
) | {"license", "license_name", "license_link"}
_HEAD_LISTS = frozenset(
    {"base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources"}
    | {"tags", "pipeline_tag", "languages", "language"}
)


#: Files of a view by their names there: of the folder, or what stands in for them.
Content = dict[str, "Path | bytes"]


@dataclass(frozen=True)
class Weights:
    """The safetensors files that are the model, with the index that lists them, if there is one: tensor by
    tensor the name of its file."""

    files: tuple[str, ...]
    listed: dict[str, str]


def weights(folder: Path) -> Weights:
    """The files that ``from_pretrained`` of transformers takes: ``model.safetensors`` before an index that
    does not name it; a whole set of shards without an index is taken, too.

    Raises ModelError where there are several that could be meant, or none.
    """
    found_files = sorted(path.name for path in folder.glob("*.safetensors"))
    there = [name for name in found_files if not name.startswith("adapter_")]
    listed = _listed(folder / INDEX)
    if SINGLE in there and SINGLE not in listed.values():
        others = [name for name in found_files if name != SINGLE]
        if others:
            _say(f"{folder}: {SINGLE} is taken, as transformers does; not {', '.join(others)}")
        return Weights((SINGLE,), {})
    if listed:
        return Weights(tuple(sorted(set(listed.values()))), listed)
    sets: dict[str, list[str]] = {}
    for name in there:
        found = _SHARD.match(name)
        sets.setdefault(f"{found[1]} of {found[3]}" if found else name, []).append(name)
    if len(sets) > 1:
        raise ModelError(
            f"{folder} has several models, and none is named {SINGLE}: {', '.join(there)}",
            remedy=f"leave one model there, as {SINGLE} or with its {INDEX}",
        )
    if not there:
        found_others = [n.name for p in ("*.bin", "*.pth", "*.gguf") for n in folder.glob(p)]
        hint = f"; it has {found_others[0]}, which ggufrq does not convert" if found_others else ""
        if is_adapter(folder):
            raise adapter(folder)
        raise ModelError(f"{folder} has no safetensors file{hint}", remedy="download the model again")
    shard = _SHARD.match(there[0])
    if shard is not None and len(there) != int(shard[3]):
        whole = {f"{shard[1]}-{i:05d}-of-{shard[3]}.safetensors" for i in range(1, int(shard[3]) + 1)}
        missing = sorted(whole - set(there))[0]
        raise ModelError(f"{missing} is missing from {folder}", remedy=f"download {missing} again")
    return Weights(tuple(there), {})


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter and no weights of a model beside it."""
    names = (path.name for path in folder.glob("*.safetensors"))
    return (folder / ADAPTER).is_file() and all(name.startswith("adapter_") for name in names)


def adapter(folder: Path) -> ModelError:
    """What there is to say of a folder with a LoRA adapter."""
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return ModelError(
        f"{folder} is an adapter (LoRA) of {base or 'a model that it does not name'}, and no model",
        remedy=f"merge it into {base or 'its model'} first: PeftModel.from_pretrained(…).merge_and_unload(), "
        "then save_pretrained",
    )


def _listed(index: Path) -> dict[str, str]:
    """Which file each tensor is in, as the index has it; empty without one."""
    if not index.is_file():
        return {}
    try:
        listed = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    except (ValueError, OSError, AttributeError) as error:
        if isinstance(error, AttributeError):
            raise ModelError(f"{index} is damaged", remedy=f"download {index.name} again") from None
        raise ModelError(f"{index} cannot be read: {error}", remedy=f"download {index.name} again") from None
    plain = isinstance(listed, dict) and all(
        isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
        for name in listed.values()
    )
    if not listed or not plain:
        raise ModelError(f"{index} is damaged", remedy=f"download {index.name} again")
    return dict(listed)


def files(folder: Path, chosen: Weights) -> Content:
    """What the view is made of, by its name there: files of the folder, or what stands in for them."""
    found: Content = {name: folder / name for name in chosen.files}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == ADAPTER or path.suffix in _LEFT_OUT:
            continue
        if path.is_dir():
            if _FOLDERS.match(path.name):
                found |= {
                    f"{path.name}/{inner.relative_to(path).as_posix()}": inner for inner in _inside(path)
                }
        elif path.name != INDEX or chosen.listed:
            found[path.name] = path
    for name, made in (
        ("README.md", _card_head(folder)),
        ("config.json", _config(folder)),
        ("generation_config.json", _generation(folder)),
        ("tokenizer_config.json", _tokenizer_config(folder)),
    ):
        if made is not None:
            found[name] = made
    return found


def digest(content: Content) -> str:
    """A hash of all that is in a view; large files count by their size and time."""
    whole = hashlib.sha256()
    for name, what in sorted(content.items()):
        if isinstance(what, bytes):
            said = hashlib.sha256(what).hexdigest()
        else:
            facts = what.stat()
            large = facts.st_size > _HASHED
            said = f"{facts.st_size}/{facts.st_mtime_ns}" if large else file_sha256(what)
        whole.update(f"{name} {said}\n".encode())
    return whole.hexdigest()


@contextmanager
def view(name: str, content: Content) -> Iterator[Path]:
    """A folder of this name with links to the files, for as long as the context lasts. From its name the
    converter takes that of the model."""
    with TemporaryDirectory(prefix="ggufrq-") as temporary:
        folder = Path(temporary) / name
        for inner, what in content.items():
            path = folder / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(what, bytes):
                path.write_bytes(what)
                continue
            try:
                path.symlink_to(what.absolute())
            except OSError:  # Windows without the right to make links
                try:
                    path.hardlink_to(what.absolute())
                except OSError:
                    if what.stat().st_size > _HASHED:  # weights are not copied
                        raise ModelError(
                            f"{what} cannot be linked into {folder}",
                            remedy="the developer mode of Windows, or TMP on the drive of the model",
                        ) from None
                    shutil.copyfile(what, path)
        yield folder


@cache
def _say(message: str) -> None:
    """Told once, however often a view is made."""
    log.say(message)


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _tokenizer_config(folder: Path) -> bytes | None:
    """Without a chat template where there is a file with one: transformers takes that, the converter this."""
    path = folder / "tokenizer_config.json"
    templates = [folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")]
    if not path.is_file() or not any(template.is_file() for template in templates):
        return None
    data = _object(path)
    if data is None or "chat_template" not in data:
        return None
    del data["chat_template"]
    return json.dumps(data, ensure_ascii=False).encode()


def _config(folder: Path) -> bytes | None:
    """Without the name that the model was loaded by: that of its ancestor, where it was trained on."""
    data = _object(folder / "config.json")
    if data is None or "_name_or_path" not in data:
        return None
    del data["_name_or_path"]
    return json.dumps(data, ensure_ascii=False).encode()


def _generation(folder: Path) -> bytes | None:
    """Only numbers: the converter stops at others."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    data = _object(path)
    if data is None:
        _say(f"{path} is no JSON object: the model gets no settings from it")
        return b"{}"
    kept = {k: v for k, v in data.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return json.dumps(kept).encode()


def _object(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _card_head(folder: Path) -> bytes | None:
    """The head of the README with what the converter takes of it; what it cannot take is told of, and left
    out."""
    import yaml  # type: ignore[import-untyped]

    path = folder / "README.md"
    if not path.is_file():
        return None
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _say(f"{path}, line {line}, is not UTF-8; it is read as Latin-1")
        text = raw.decode("latin-1")
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    inner = []
    for line_text in lines[1:]:
        if line_text.rstrip() == "---":
            break
        inner.append(line_text.replace("\t", "  "))
    try:
        head = yaml.safe_load("\n".join(re.sub(r"^(\s*- )no$", r'\1"no"', each) for each in inner))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 2}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        _say(f"the head of {path}{where} is no YAML ({reason}): nothing is taken from it")
        return None
    if not isinstance(head, dict):
        return None
    kept: dict[str, Any] = {}
    for key, value in head.items():
        if key in _HEAD_TEXTS and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            kept[key] = str(value)
        elif key in _HEAD_LISTS:
            listed = value if isinstance(value, list) else [value]
            kept[key] = [item for item in listed if isinstance(item, str)]
            if len(kept[key]) != len(listed):
                _say(f"{path}: not all of {key} is text: the rest is left out")
        elif key in _HEAD_TEXTS and value is not None:
            _say(f"{path}: {key} is no text: it is left out")
    return f"---\n{yaml.safe_dump(kept, allow_unicode=True, sort_keys=False)}---\n".encode()

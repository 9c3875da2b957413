"""What a user's MODEL means: an embedded model, a folder in Hugging Face form, a GGUF file, or a Hub id."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

from ggufrq.base import log, paths
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.ggufs.files import first_file
from ggufrq.ggufs.foreign import foreign
from ggufrq.ggufs.header import is_gguf, read_header
from ggufrq.models import hub, view
from ggufrq.models.names import base_name

#: What GGUF files are that are no models, by what they say of themselves.
_NO_MODEL = {
    "adapter": "an adapter (LoRA)",
    "imatrix": "an importance matrix",
    "kv-calib": "means of a KV cache",
    "kv-moments": "sums that a profile is made from",
    "kv-profile": "the profile of a KV cache",
    "mmproj": "a projector for images or sound",
}


@dataclass(frozen=True)
class Model:
    """``kind`` is ``embedded``, ``folder``, ``gguf`` or ``hub``; ``name`` the base of file names made from
    it.

    ``path`` is the folder or file, None for the Hub, where ``repo`` and ``label`` are set.
    """

    kind: str
    name: str
    path: Path | None = None
    repo: str | None = None
    label: str | None = None


def embedded_models() -> dict[str, Path]:
    """The models that come with ggufrq: name -> folder in Hugging Face form."""
    folder = paths.data_dir("models")
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def embedded_folder(name: str) -> Path:
    """Where the GGUF files of an embedded model are kept."""
    shared = paths.find_cache()
    if shared is not None and (shared / "models" / name).is_dir():
        return shared / "models" / name
    return paths.own_dir("models") / name


def resolve(text: str, *, original: bool = False) -> Model:
    """Find out what ``text`` means, without touching the network. Of a folder with GGUF files, such as a
    family, it is the one that a repository of the Hub with these files would mean, which is said; where the
    ``original`` is wanted, one has to be named. Raises UsageError or ModelError."""
    embedded = embedded_models()
    if text in embedded:
        return Model("embedded", text, embedded[text])
    path = paths.expanded(text)
    if path.is_dir() or path.is_symlink():
        hub.require_downloaded(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            if view.is_adapter(path):
                raise view.adapter(path)
            of_hub = hub.snapshot_of(path)
            name = of_hub[0].partition("/")[2] if of_hub is not None else path.absolute().name
            return Model("folder", base_name(name), path)
        ggufs = [file.name for file in sorted(path.glob("*.gguf")) if hub.is_model(file.name)]
        if ggufs:
            if original:
                _original(path, ggufs)
            chosen = _to_run(path, ggufs)
            return Model("gguf", base_name(chosen.stem), first_file(chosen))
        if (path / view.ADAPTER).is_file():
            raise view.adapter(path)
        raise ModelError(f"{path} is not a model: it has no config.json")
    if path.is_file():
        if is_gguf(path):
            _require_model(path)
            return Model("gguf", base_name(path.stem), first_file(path))
        if path.suffix == ".safetensors":
            raise ModelError(f"{path} is one file of a model", remedy=f"the folder: {path.absolute().parent}")
        raise foreign(
            path, f"{path} is not a GGUF file", "a folder with config.json and safetensors, or a .gguf file"
        )
    hub_id = hub.parse_id(text)
    if hub_id is not None and not text.endswith(".gguf") and not text.startswith((".", "~")):
        repo, label = hub_id
        if path.parent.is_dir():
            _tell(f"{path.parent} has no {path.name}: {text} is taken for a model on the Hub")
        return Model("hub", base_name(repo.partition("/")[2]), repo=repo, label=label)
    raise ModelError(
        f"there is no model '{text}': no such file or folder, and none of the embedded models",
        remedy=f"one of {', '.join(embedded)}; a .gguf file; a folder; or a Hub id such as Qwen/Qwen3-0.6B",
    )


def require_revision(model: Model, revision: str | None) -> None:
    """Raise UsageError for a ``revision`` of a model that is here, where there is no other."""
    if revision is not None and model.kind != "hub":
        raise UsageError(
            f"--revision is for models on the Hub, and {model.name} is here", remedy="without --revision"
        )


def _require_model(path: Path) -> None:
    """Raise ModelError for a GGUF file that says that it is no model; what is damaged is told where it is
    read."""
    kind = ""
    with suppress(ModelError):
        kind = str(read_header(path).values.get("general.type"))
    if kind in _NO_MODEL:
        raise ModelError(f"{path} is no model but {_NO_MODEL[kind]}", remedy="the GGUF of a model")


def _to_run(folder: Path, names: list[str]) -> Path:
    """Of several GGUF files the one that runs where none is named."""
    try:
        chosen = folder / hub.choose_gguf(folder.absolute().name, names, None)[0]
    except ModelError:
        if len({first_file(folder / name) for name in names}) == 1:
            raise  # a shard is missing
        raise UsageError(
            f"{folder} holds several models, and none is just Q4_K_M: {', '.join(names)}",
            remedy=f"name one of them: {folder / names[0]}",
        ) from None
    _tell(f"taking {chosen.name} of {chosen.parent}")
    return chosen


def _original(folder: Path, names: list[str]) -> NoReturn:
    """Raise UsageError: which of several GGUF files is to be quantized has to be said."""
    whole = [name for name in names if re.search(r"-(?:BF16|F16|F32)\b", name)]
    raise UsageError(
        f"{folder} holds GGUF files; name the one that is the original",
        remedy=str(folder / (whole or names)[0]),
    )


@cache
def _tell(what: str) -> None:
    """Say something once, however often a model is resolved."""
    log.say(what)

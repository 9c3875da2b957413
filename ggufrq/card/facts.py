"""What is known of a family: its manifest, the metadata of its files, and the shape of its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.paths import read_json
from ggufrq.cache.kv import KvPair, KvPlan, KvType, kv_types
from ggufrq.ggufs.files import model_header, model_headers, read_model
from ggufrq.ggufs.memory_shape import MemoryShape, memory_shape
from ggufrq.ggufs.tensors import is_float
from ggufrq.make.profile import TYPE as PROFILE
from ggufrq.models.names import names_beside
from ggufrq.models.tags import DRAFTS
from ggufrq.runtimes.fallback import fits, heads

_MANIFEST = ".ggufrq.json"


@dataclass(frozen=True)
class CardFile:
    """One file of the family: its type and recipe, bytes of all its parts, bits per weight, and the sha256 of
    the importance matrix that was used, if any. ``kind`` is ``model``, ``mmproj``, ``mtp``, ``draft`` or
    ``profile``."""

    name: str
    path: Path
    type: str
    recipe: str
    bytes: int
    bits: float
    parts: tuple[str, ...]
    sha256: tuple[str, ...]
    imatrix: str
    kind: str = "model"

    @property
    def is_reference(self) -> bool:
        """Whether it is the model in 16 or 32 bits."""
        return self.kind == "model" and is_float(self.type.lower())


@dataclass(frozen=True)
class Facts:
    """A family: ``values`` is the metadata of its smallest model file, ``shape`` what it keeps of tokens and
    sequences where that can be told, ``matrix`` the manifest's entry and the metadata of its importance
    matrix."""

    folder: Path
    base: str
    source: Mapping[str, Any]
    files: tuple[CardFile, ...]
    values: Mapping[str, Any]
    parameters: int
    shape: MemoryShape | None
    matrix: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> tuple[CardFile, ...]:
        """The quantized models, the largest first; without any, those in 16 bits."""
        models = sorted((f for f in self.files if f.kind == "model"), key=lambda f: -f.bytes)
        quantized = [f for f in models if not f.is_reference]
        return tuple(quantized or models)

    @property
    def smallest(self) -> CardFile:
        """The smallest model."""
        return self.models[-1]

    @property
    def profile(self) -> str | None:
        """The name of the profile of K that lies beside the smallest model, None without one."""
        names = names_beside(self.smallest.path, self.smallest.recipe)
        return next((name for name in names if (self.folder / name).is_file()), None)

    @property
    def head(self) -> CardFile | None:
        """The file of the head that predicts further tokens, where it is one of its own."""
        return next((file for file in self.files if file.kind == "mtp"), None)

    @property
    def guesses(self) -> bool:
        """Whether there is such a head, in the files of the model or beside them."""
        return self.head is not None or bool(self.number("nextn_predict_layers"))

    @property
    def tag(self) -> str:
        """What ``-hf USER/MODEL:TAG`` of llama.cpp calls the smallest model."""
        return self.smallest.name.removesuffix(".gguf").removeprefix(f"{self.base}-")

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of all files that the commands of the quickstarts need: the smallest model's, and the
        profile."""
        return (*self.smallest.parts, *([self.profile] if self.profile is not None else []))

    @property
    def arch(self) -> str:
        """The architecture, as llama.cpp names it."""
        return str(self.values.get("general.architecture", ""))

    @property
    def n_ctx(self) -> int | None:
        """The context that the model was made for, in tokens."""
        return self.number("context_length")

    @property
    def name(self) -> str:
        """The name of the model."""
        return str(self.values.get("general.name") or self.base)

    @property
    def template(self) -> str:
        """The chat template, empty when there is none."""
        return str(self.values.get("tokenizer.chat_template") or "")

    @property
    def thinks(self) -> bool:
        """Whether the chat template has thinking as a switch."""
        return "enable_thinking" in self.template

    def number(self, key: str) -> int | None:
        """A number of the architecture's own metadata, None when there is none."""
        value = self.values.get(f"{self.arch}.{key}")
        return value if isinstance(value, int) else None

    def takes(self, kind: KvType) -> bool:
        """Whether the model's cache can be kept in a type, which is known of it."""
        found = fits(self.values, kind.name)
        return bool(found) if kind.ours else found is not False

    def why_not(self, kind: KvType) -> str | None:
        """Why the model's cache cannot be kept in a type, None where it can or that is not known."""
        found = heads(self.values)
        return None if found is None else found.why_not(KvPlan(KvPair(kind, kind)))

    def bits(self, kind: KvType) -> float:
        """Bits per value of the model's cache in a type."""
        return kind.bits if self.shape is None else KvPlan(KvPair(kind, kind)).bits(self.shape)

    @property
    def cache_type(self) -> str:
        """The type that the quickstarts use: iso3, or what stands in for it."""
        return next((name for name in ("iso3", "q8_0") if self.takes(kv_types()[name])), "f16")


def collect(folder: Path, exclude: Sequence[str] = ()) -> Facts:
    """The facts of the family in a folder. Raises UsageError when there is not exactly one manifest, or no
    model; ModelError when a file is missing or damaged."""
    manifests = sorted(folder.glob(f"*{_MANIFEST}")) if folder.is_dir() else []
    if len(manifests) != 1:
        raise UsageError(
            f"{folder} has {len(manifests) or 'no'} manifests of families, where one is needed",
            remedy="the folder that ggufrq quantize wrote",
        )
    data = read_json(manifests[0])
    if data is None or not isinstance(data.get("files"), dict):
        raise ModelError(f"{manifests[0]} is no manifest, or damaged")
    entries = {name: e for name, e in data["files"].items() if isinstance(e, dict) and e.get("parts")}
    files = [_file(folder, name, entry) for name, entry in entries.items() if entry.get("type") != "imatrix"]
    files = [file for file in files if not any(fnmatch(part, p) for part in file.parts for p in exclude)]
    missing = [part for file in files for part in file.parts if not (folder / part).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks files of its manifest: {', '.join(missing)}",
            remedy="ggufrq quantize makes them again, or --exclude NAME",
        )
    for file in files:
        if sum((folder / part).stat().st_size for part in file.parts) != file.bytes:
            raise ModelError(
                f"{file.name} is not what the manifest says it is: it was changed or damaged since",
                remedy="ggufrq quantize makes it again",
            )
    if not any(file.kind == "model" for file in files):
        raise UsageError(f"{folder} has no model to write a card for")
    files.sort(key=lambda file: (file.kind != "model", file.bytes))
    base = manifests[0].name.removesuffix(_MANIFEST)
    found = Facts(folder, base, data.get("source") or {}, tuple(files), {}, 0, None)
    small = found.smallest.path
    header, parameters = model_header(small), read_model(small).weights
    matrices = [(n, e) for n, e in entries.items() if e.get("type") == "imatrix" and (folder / n).is_file()]
    matrix = {"name": matrices[0][0], **matrices[0][1]} if matrices else {}
    shape = None
    with suppress(ModelError):  # of a kind whose memory is not computed
        shape = memory_shape(model_headers(small))
    if shape is not None and not shape.cached:  # a recurrent model, which keeps no K and V
        shape = None
    return replace(found, values=header.values, parameters=parameters, shape=shape, matrix=matrix)


def _file(folder: Path, name: str, entry: Mapping[str, Any]) -> CardFile:
    parts = entry["parts"]
    kind = next((k for k in ("mmproj", "mtp") if name.startswith(f"{k}-")), "model")
    kind = "draft" if kind == "model" and name.startswith(DRAFTS) else kind
    kind = "profile" if entry.get("type") == PROFILE else kind
    return CardFile(
        name=name,
        path=folder / parts[0]["name"],
        type=str(entry.get("type", "")),
        recipe=str(entry.get("recipe") or ""),
        bytes=sum(part["bytes"] for part in parts),
        bits=float(entry.get("bits", 0.0)),
        parts=tuple(part["name"] for part in parts),
        sha256=tuple(part["sha256"] for part in parts),
        imatrix=str(entry.get("imatrix") or ""),
        kind=kind,
    )

"""The settings that serve best where our cache types are missing: for LM Studio, Ollama and others.

What each runtime takes is data, see ``ggufrq.runtimes``. Templates there name ``$model`` (the path of the
file), ``$model_quoted`` (for a shell), ``$name``, ``$short`` (names of the file and of the model, the latter
fit for any program), ``$context``, ``$source`` (the Hub id of the original model) and ``$file`` (the settings
file). A line that names something that is not known is left out.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ggufrq.base import paths, texts
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.cache.kv import kv_type, kv_types, parse_plan
from ggufrq.ggufs.files import first_file, model_header, read_model, shards
from ggufrq.ggufs.header import Header
from ggufrq.ggufs.heads import Heads
from ggufrq.ggufs.kv_shape import KvShape, find_kv_shape
from ggufrq.models.names import base_name
from ggufrq.runtimes import Runtime

#: What the comparison is with.
OURS = "iso3"
#: Without a wish the context is the model's own, but no longer than this.
_CONTEXT = 32768
_NAME = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class SettingsFile:
    """A file for a runtime: its name, its text, how its form was verified, and whether it is only lines to
    add to a file that the runtime makes."""

    name: str
    text: str
    verified: str
    add: bool = False


@dataclass(frozen=True)
class Advice:
    """Settings of a runtime for a model. ``kv_bytes`` are the bytes of the cache for ``context`` tokens in
    ``use``, ``ours_context`` the tokens that iso3 would hold in as many (None where the shape of the cache
    cannot be told), ``times`` their ratio, None when the model cannot be kept in iso3, for the reason
    ``why_not``, or, with ``holds`` None, its metadata does not tell whether it can. ``unusable`` is why the
    model cannot be kept in ``use`` either."""

    runtime: Runtime
    model: Path
    context: int
    trained: int | None
    kv_bytes: int | None
    ours_context: int | None
    times: float | None
    files: tuple[SettingsFile, ...]
    steps: tuple[str, ...]
    holds: bool | None = None
    why_not: str | None = None
    unusable: str | None = None
    folding: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What else there is to know: of a model that the settings do not fit, of the runtime, and of folded
        keys."""
        before = [] if self.unusable is None else [f"Leave the cache type out: {self.unusable}."]
        return (*before, *self.runtime.notes, *([self.folding] if self.folding is not None else []))

    @property
    def use(self) -> str:
        """The cache type that serves best there."""
        return self.runtime.use

    def as_data(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        r = self.runtime
        return {
            "runtime": r.id,
            "name": r.name,
            "checked": r.checked.isoformat(),
            "version": r.version,
            "sources": list(r.sources),
            "types": list(r.types),
            "model": str(self.model),
            "use": r.use,
            "bits_per_value": r.bits_per_value,
            "flash_attention": r.flash_attention,
            "context": self.context,
            "kv_bytes": self.kv_bytes,
            "ours": OURS,
            "ours_context": self.ours_context,
            "times": self.times,
            "holds": self.holds,
            "why_not": self.why_not,
            "unusable": self.unusable,
            "environment": dict(r.environment),
            "files": [vars(file) for file in self.files],
            "steps": list(self.steps),
            "notes": list(self.notes),
        }


def advise(runtime: Runtime, model: Path, context: int | None = None, *, place: str | None = None) -> Advice:
    """The settings of a runtime for a GGUF file and a context of so many tokens (by default the model's own,
    at most 32,768). ``place`` is how they name the file, its absolute path by default. Raises ModelError
    for a damaged one, and UsageError when the path cannot be written in the runtime's file."""
    model = first_file(model)
    read_model(model)
    header = model_header(model)
    values = header.values
    arch = values.get("general.architecture", "")
    trained = values.get(f"{arch}.context_length")
    trained = trained if isinstance(trained, int) else None
    chosen = context or min(trained or _CONTEXT, _CONTEXT)
    shape = find_kv_shape(model)
    taken = None if shape is None else _bytes(runtime, shape, chosen)
    times, ours = None, None
    kept = heads(values)
    why_not = None if kept is None else kept.why_not(parse_plan(OURS))
    unusable = None
    if kept is not None and runtime.use in kv_types():
        unusable = kept.why_not(parse_plan(runtime.use))
    holds = None if kept is None else why_not is None
    if holds:
        times = runtime.bits_per_value / (
            kv_type(OURS).bits if shape is None else parse_plan(OURS).bits(shape)
        )
        ours = None if shape is None or taken is None else int(taken / parse_plan(OURS).bytes_for(shape, 1))
    path = place or str(model.absolute())
    merge: list[str] = []
    if not runtime.shards and len(shards(model)) > 1:
        whole = re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", path)
        merge = [f"$(ggufrq where bin)/llama-gguf-split --merge {shlex.quote(path)} {shlex.quote(whole)}"]
        path = whole
    known: dict[str, Any] = {
        "model": path,
        "model_quoted": shlex.quote(path),
        "name": model.name,
        "short": re.sub(r"[^\w.-]+", "-", base_name(model.stem)),
        "context": chosen,
        "source": values.get("ggufrq.source.repo"),
    }
    files = tuple(_files(runtime, known))
    known["file"] = shlex.quote(files[0].name) if files else None
    steps = tuple(step for line in runtime.steps if (step := _fill(line, known, "plain")) is not None)
    steps = (*merge, *steps)
    return Advice(
        runtime,
        model,
        chosen,
        trained,
        taken,
        ours,
        times,
        files,
        steps,
        holds,
        why_not,
        unusable,
        _folding(header),
    )


def _folding(header: Header) -> str | None:
    """What folded keys are worth in any runtime's cache; None where that was not seen to be much, which is
    without norms of Q and K."""
    if header.values.get("ggufrq.fold") == "kv":
        return "The keys of this model are folded: it loses less in q8_0 and q4_0 than the plain file."
    if not any(tensor.name.endswith(".attn_k_norm.weight") for tensor in header.tensors):
        return None
    return (
        "ggufrq quantize MODEL --fold kv makes files that compute the same and lose less in the cache of any "
        "runtime: on Gemma 3 270M q4_0 has a quarter of its KLD, q8_0 a fifth (docs/families.md)."
    )


def write(advice: Advice, folder: Path) -> list[Path]:
    """Write the files of an advice into a folder. Raises UsageError when one is there with other content."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / file.name for file in advice.files]
    for path, file in zip(written, advice.files, strict=True):
        if path.is_file() and path.read_bytes() != texts.to_bytes(file.text):
            raise UsageError(f"{path} is there and differs", remedy="-o with another folder")
    for path, file in zip(written, advice.files, strict=True):
        paths.atomic_write(path, file.text)
    return written


def heads(values: Mapping[str, Any]) -> Heads | None:
    """What a model with this metadata keeps of K and V, None where it does not tell."""
    try:
        found = Heads.of_metadata(values)
    except ModelError:
        return None
    return found if found.layers else None


def fits(values: Mapping[str, Any], name: str, *, gpu: bool = False) -> bool | None:
    """Whether K and V of a model with this metadata can be kept in a type, None where it does not tell.
    ``gpu``: on one without five bits (``Build.lacks_five_bits``)."""
    found = heads(values)
    return None if found is None else found.why_not(parse_plan(name), gpu=gpu) is None


def _files(runtime: Runtime, known: dict[str, Any]) -> list[SettingsFile]:
    form = runtime.file
    if form is None or not form.verified:
        return []
    lines = (_fill(line, known, form.format) for line in form.text.strip().splitlines())
    text = "\n".join(line for line in lines if line is not None) + "\n"
    files = [SettingsFile(str(_fill(form.name, known, "plain")), text, form.verified, form.add)]
    if runtime.environment:
        text = "".join(f"{name}={value}\n" for name, value in runtime.environment.items())
        files.append(SettingsFile(f"{runtime.id}.env", text, form.verified))
    return files


def _fill(line: str, known: dict[str, Any], form: str) -> str | None:
    """A line of a template with its values; None when one is not known."""
    names = _NAME.findall(line)
    if any(known.get(name) is None for name in names):
        return None
    return Template(line).substitute({name: _written(known[name], form) for name in names})


def _written(value: str | int, form: str) -> str:
    """A value as a file of this form has it. Raises UsageError when it cannot hold it."""
    text = str(value)
    if form in ("json", "yaml"):
        return json.dumps(value, ensure_ascii=False)
    if form == "ini" and re.search(r"[;#\[\]]", text):
        raise UsageError(
            f"'{text}' cannot be written in an ini file of llama.cpp, where ; and # begin a comment",
            remedy="give the file or its folder another name",
        )
    if "\n" in text:
        raise UsageError(f"the name {text!r} has a line break in it", remedy="give it another name")
    return text


def _bytes(runtime: Runtime, shape: KvShape, tokens: int) -> int:
    values = (shape.k_values + shape.v_values) * tokens
    return round(values * runtime.bits_per_value / 8)

"""Where the headers of a model come from: a GGUF here or on the Hub, or a model that is not converted yet."""

from __future__ import annotations

from dataclasses import dataclass

from ggufrq import hub, paths
from ggufrq import source as pristine
from ggufrq.convert import ANY_TOKENIZER
from ggufrq.family import source
from ggufrq.gguf_file import shards
from ggufrq.gguf_header import Header, read_header
from ggufrq.pin import load_pin
from ggufrq.project import Build
from ggufrq.resolve import Model


@dataclass(frozen=True)
class Metadata:
    """The headers of a model's files, the first one first, and what they are of, in words."""

    headers: tuple[Header, ...]
    name: str


def read(model: Model, build: Build | None = None, revision: str | None = None) -> Metadata:
    """The headers of a model; of one on the Hub nothing else is downloaded. A model that is not in GGUF yet
    is converted without its weights, by the converter of the build or else of the pinned source.

    Raises ModelError.
    """
    if model.kind == "gguf":
        assert model.path is not None
        files = shards(model.path)
        return Metadata(tuple(map(read_header, files)), model.path.name)
    if model.kind == "hub":
        assert model.repo is not None
        if model.label or not hub.has_safetensors(model.repo, revision):
            names, sha, headers = hub.fetch_gguf_headers(model.repo, model.label, revision)
            return Metadata(headers, f"{names[0]} of {model.repo} at {sha[:12]}")
    found = source.find(model, revision, source.Options(), weights=False)
    tree = build.source if build is not None else pristine.pristine(load_pin())
    log = paths.logs_dir() / "memory.log"
    options = source.Options(pre_tokenizer=ANY_TOKENIZER)
    with source.header(found, tree, options, log) as path:
        header = read_header(path)
    where = f" at {str(found.identity['revision'])[:12]}" if "revision" in found.identity else ""
    return Metadata((header,), f"{model.repo or model.name}{where}, as converted to {found.kind}")

"""Where the headers of a model come from: a GGUF here or on the Hub, or a model that is not converted yet."""

from __future__ import annotations

from dataclasses import dataclass

from ggufrq.base import paths
from ggufrq.build.project import Build
from ggufrq.ggufs.files import model_headers
from ggufrq.ggufs.header import Header, read_header
from ggufrq.models import as_gguf, hub
from ggufrq.models.convert import ANY_TOKENIZER
from ggufrq.models.resolve import Model, require_revision
from ggufrq.source import obtain as pristine
from ggufrq.source.pin import load_pin


@dataclass(frozen=True)
class Metadata:
    """The headers of a model's files, the first one first, and what they are of, in words."""

    headers: tuple[Header, ...]
    name: str


def read(model: Model, build: Build | None = None, revision: str | None = None) -> Metadata:
    """The headers of a model; of one on the Hub nothing else is downloaded. A model that is not in GGUF yet
    is converted without its weights, by the converter of the build or else of the pinned source.

    Raises ModelError, and UsageError as ``resolve.require_revision``.
    """
    require_revision(model, revision)
    if model.kind == "gguf":
        assert model.path is not None
        return Metadata(model_headers(model.path), model.path.name)
    if model.kind == "hub":
        assert model.repo is not None
        if model.label or not hub.has_safetensors(model.repo, revision):
            names, sha, headers = hub.fetch_gguf_headers(model.repo, model.label, revision)
            return Metadata(headers, f"{names[0]} of {model.repo} at {sha[:12]}")
    found = as_gguf.find(model, revision, as_gguf.Options(), weights=False)
    tree = build.source if build is not None else pristine.pristine(load_pin())
    log = paths.logs_dir() / "memory.log"
    options = as_gguf.Options(pre_tokenizer=ANY_TOKENIZER)
    with as_gguf.header(found, tree, options, log) as path:
        header = read_header(path)
    where = f" at {str(found.identity['revision'])[:12]}" if "revision" in found.identity else ""
    return Metadata((header,), f"{model.repo or model.name}{where}, as converted to {found.kind}")

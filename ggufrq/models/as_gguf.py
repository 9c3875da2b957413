"""Where a family comes from: a Hub id, a folder, or a GGUF file, and the 16-bit GGUF that is made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ggufrq.base import texts
from ggufrq.base.results import file_sha256
from ggufrq.ggufs.files import shards
from ggufrq.models import convert, hub, view
from ggufrq.models.convert import HfModel
from ggufrq.models.resolve import Model, require_revision

#: Up to this size a source file is known by its content, beyond it by its size and time.
_HASHED = 256 << 20


@dataclass(frozen=True)
class Source:
    """``identity`` tells people where the model is from, ``key`` one model from another. Either ``gguf`` is
    set, or ``hf`` for a model that is to be converted."""

    identity: dict[str, Any]
    key: str
    gguf: Path | None = None
    hf: HfModel | None = None

    @property
    def kind(self) -> str:
        """The type of the converted file, as in its name (``BF16``)."""
        return self.hf.kind if self.hf is not None else ""

    @property
    def metadata(self) -> dict[str, str]:
        """What new files say of their source; no paths of this machine."""
        quantized = self.hf.quantized_by if self.hf is not None else ""
        more = {"ggufrq.source.weights": texts.clean(quantized)} if quantized else {}
        repo, revision = self.identity.get("repo"), self.identity.get("revision")
        if repo:
            return {
                **more,
                "general.source.repo_url": f"https://huggingface.co/{repo}",
                "ggufrq.source.repo": str(repo),
                "ggufrq.source.revision": str(revision),
            }
        name = str(self.identity.get("file") or self.identity.get("folder"))
        return {**more, "ggufrq.source.name": texts.clean(name)}


@dataclass(frozen=True)
class Options:
    """How a model is converted: ``pre_tokenizer`` when it must be declared, ``mtp`` whether it keeps its head
    for further tokens."""

    pre_tokenizer: str | None = None
    mtp: bool = True


def find(model: Model, revision: str | None, options: Options, *, weights: bool = True) -> Source:
    """Find or fetch the source of a model. Without ``weights`` a model on the Hub is not downloaded: holes
    take the place of its weights. Raises ModelError when something is missing or damaged, and as
    ``resolve.require_revision``."""
    require_revision(model, revision)
    if model.kind == "gguf":
        assert model.path is not None
        return _of_gguf(model.path, {"file": model.path.name})
    if model.kind == "hub":
        assert model.repo is not None
        if model.label:
            path, sha = hub.fetch_gguf_at(model.repo, model.label, revision)
            return _of_gguf(path, {"repo": model.repo, "revision": sha, "file": path.name})
        fetched = (hub.fetch_model if weights else hub.fetch_headers)(model.repo, revision)
        identity = {"repo": fetched.repo, "revision": fetched.revision}
        identity["id"] = f"{fetched.repo}@{fetched.revision}"
        found = _of_folder(fetched.folder, identity, options)
        assert found.hf is not None
        return replace(found, hf=replace(found.hf, name=model.name))
    assert model.path is not None
    folder = model.path
    identity = {"folder": folder.absolute().name}
    of_hub = hub.snapshot_of(folder)
    if of_hub is None:
        return _of_folder(folder, identity, options)
    identity |= {"folder": model.name, "repo": of_hub[0], "revision": of_hub[1]}
    found = _of_folder(folder, identity, options)
    assert found.hf is not None
    return replace(found, hf=replace(found.hf, name=model.name))


@contextmanager
def header(
    source: Source,
    tree: Path,
    options: Options,
    log: Path,
    sources: Path | None = None,
    part: str = "model",
) -> Iterator[Path]:
    """A GGUF with everything but the weights of a model, or a ``part`` of it (``convert.PARTS``), that is not
    converted yet, for as long as the context lasts: a second or two, and no space on disk. The converter is
    that of the llama.cpp ``tree``. The file ``sources`` is told where tensors come from, see
    ``convert.convert``."""
    assert source.hf is not None
    with TemporaryDirectory(prefix="ggufrq-") as folder:
        made = convert.convert(
            source.hf,
            Path(folder) / "header.gguf",
            tree,
            pre_tokenizer=options.pre_tokenizer,
            part=part,
            mtp=options.mtp,
            what="header" if sources is None else f"sources:{sources}",
            log=log,
        )
        convert.require_kind(made, source.hf, part)
        yield made


def _of_gguf(path: Path, identity: dict[str, Any]) -> Source:
    identity["id"] = _digest_of(shards(path))
    return Source(identity, str(identity["id"]), gguf=shards(path)[0])


def _of_folder(folder: Path, identity: dict[str, Any], options: Options) -> Source:
    found = convert.inspect(folder)
    if "id" not in identity:
        identity["id"] = view.digest(found.content)
    key = str(identity["id"])
    if options.pre_tokenizer:
        key += f"+{options.pre_tokenizer}"
    if not options.mtp:
        key += "+no-mtp"
    return Source(identity, key, hf=found)


def _digest_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        facts = path.stat()
        what = file_sha256(path) if facts.st_size <= _HASHED else f"{facts.st_size}/{facts.st_mtime_ns}"
        digest.update(texts.to_bytes(f"{path.name} {what}\n"))
    return digest.hexdigest()

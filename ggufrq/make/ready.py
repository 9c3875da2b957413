"""The file that is run or measured for a user's MODEL, made now where it has to be."""

from __future__ import annotations

from pathlib import Path

from ggufrq.base import log
from ggufrq.base.errors import ModelError
from ggufrq.build.builds import require_build
from ggufrq.ggufs.drafts import SIMPLE, draft_kind, has_head
from ggufrq.ggufs.files import model_header
from ggufrq.make.family import make_family
from ggufrq.make.plan import Request, Want
from ggufrq.models import hub
from ggufrq.models.names import RECIPE
from ggufrq.models.resolve import resolve
from ggufrq.models.tags import head_of

#: The weights of embedded models that caches are tried on: close to the original, so that the loss is the
#: cache's.
WEIGHTS = "Q8_0"


def model_file(
    model: str,
    *,
    revision: str | None = None,
    original: bool = False,
    draft: bool = False,
    head: bool = False,
) -> Path:
    """The GGUF file to run for a user's MODEL: itself, the Hub's, or Q8_0 of an embedded model (made now if
    absent); ``original`` as for ``resolve``, ``head`` as for ``hub.fetch_gguf``.

    Raises ModelError for a model that is not in GGUF yet, and, unless it is to be a ``draft``, for one that
    only guesses for another: llama.cpp ends by a signal where it runs alone.
    """
    chosen = resolve(model, original=original)
    if chosen.kind == "folder":
        raise ModelError(
            f"{chosen.path} is not in GGUF yet", remedy=f"ggufrq quantize {chosen.path} --types Q8_0"
        )
    if chosen.kind == "embedded":
        return _embedded(model, chosen.name)
    if chosen.kind == "gguf":
        assert chosen.path is not None
        path = chosen.path
    else:
        assert chosen.repo is not None
        path = hub.fetch_gguf(chosen.repo, chosen.label, revision, head=head)
    if not draft and draft_kind(path) != SIMPLE:
        raise ModelError(
            f"{path.name} does not run alone: it guesses tokens for another model",
            remedy=f"ggufrq serve MODEL --draft {path}",
        )
    return path


def _embedded(model: str, name: str) -> Path:
    build = require_build()
    ready = build.root / "models" / f"{name}-{WEIGHTS}.gguf"  # where the build was made elsewhere
    if ready.is_file():
        return ready
    return make_family(Request(model, (Want(WEIGHTS),)), build).file(WEIGHTS)


def head_beside(model: Path) -> Path | None:
    """The head for further tokens that lies in a file of its own beside a model without one, as ``quantize
    --mtp apart`` makes it (``tags.head_of``)."""
    header = model_header(model)
    if has_head(tensor.name for tensor in header.tensors):
        return None
    there = [path.name for path in model.parent.glob("mtp-*.gguf")]
    found = head_of(Path(model.name), there, header.values.get(RECIPE))
    if found is None:
        return None
    log.say(f"taking {found}, the head for further tokens beside it")
    return model.parent / found


def weights_of(name: str) -> str:
    """The label of the weights that a model is measured with."""
    chosen = resolve(name)
    return (
        WEIGHTS if chosen.kind == "embedded" else chosen.label or (chosen.path.name if chosen.path else name)
    )

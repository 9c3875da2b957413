"""The file that is run or measured for a user's MODEL, made now where it has to be."""

from __future__ import annotations

from pathlib import Path

from ggufrq.base.errors import ModelError
from ggufrq.build.builds import require_build
from ggufrq.make.family import make_family
from ggufrq.make.plan import Request, Want
from ggufrq.models import hub
from ggufrq.models.resolve import resolve

#: The weights of embedded models that caches are tried on: close to the original, so that the loss is the
#: cache's.
WEIGHTS = "Q8_0"


def model_file(model: str, *, revision: str | None = None, original: bool = False) -> Path:
    """The GGUF file to run for a user's MODEL: itself, the Hub's, or Q8_0 of an embedded model (made now if
    absent); ``original`` as for ``resolve``.

    Raises ModelError for a model that is not in GGUF yet.
    """
    chosen = resolve(model, original=original)
    if chosen.kind == "gguf":
        assert chosen.path is not None
        return chosen.path
    if chosen.kind == "hub":
        assert chosen.repo is not None
        return hub.fetch_gguf(chosen.repo, chosen.label, revision)
    if chosen.kind == "folder":
        raise ModelError(
            f"{chosen.path} is not in GGUF yet", remedy=f"ggufrq quantize {chosen.path} --types Q8_0"
        )
    build = require_build()
    ready = build.root / "models" / f"{chosen.name}-{WEIGHTS}.gguf"  # where the build was made elsewhere
    if ready.is_file():
        return ready
    return make_family(Request(model, (Want(WEIGHTS),)), build).file(WEIGHTS)


def weights_of(name: str) -> str:
    """The label of the weights that a model is measured with."""
    chosen = resolve(name)
    return (
        WEIGHTS if chosen.kind == "embedded" else chosen.label or (chosen.path.name if chosen.path else name)
    )

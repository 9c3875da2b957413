"""GGUF files that guess tokens for another model, and how."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ggufrq.ggufs.files import model_header

#: How a model guesses for one of its vocabulary; it runs alone, too, which no other kind does.
SIMPLE = "draft-simple"


def has_head(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold a head that predicts further tokens."""
    return any(".nextn." in name for name in names)


def draft_kind(model: Path) -> str:
    """How a GGUF guesses tokens for another model, as ``--spec-type`` calls it: by what it is made of. Raises
    ModelError for a damaged one."""
    header = model_header(model)
    arch = str(header.values.get("general.architecture", ""))
    names = {tensor.name for tensor in header.tensors}
    if arch == "eagle3":
        return "draft-eagle3"
    if arch == "dflash":
        return "draft-dspark" if "markov_w1.weight" in names else "draft-dflash"
    # a head without the model that it belongs to, which may read the cache of that
    lone = has_head(names) and not any(name.startswith("blk.0.") for name in names)
    return "draft-mtp" if lone or arch == "gemma4-assistant" else SIMPLE

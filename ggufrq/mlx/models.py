"""Models of ggufrq as mlx-lm has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_lm

from ggufrq.base.errors import ModelError
from ggufrq.models.resolve import resolve

#: By this attribute a model says what it was loaded from.
SOURCE = "ggufrq_source"


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration in a folder as mlx-lm takes it: Qwen3.5's text model alone, ``qwen3_5_text``, is to
    mlx-lm a whole one that has it inside."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") == "qwen3_5_text":
        tied = config.get("tie_word_embeddings", False)
        return {"model_type": "qwen3_5", "tie_word_embeddings": tied, "text_config": config}
    return config


def load(model: str) -> tuple[Any, Any]:
    """``mlx_lm.load``, the model and its tokenizer, of a model as commands of ggufrq take it: an embedded one
    by its name, a folder or the id of a repository on the Hub. Raises ModelError for others."""
    found = resolve(model)
    if found.kind == "gguf":
        raise ModelError(f"{model} is a GGUF file, which mlx-lm does not read", remedy="the model's folder")
    if found.path is None:
        loaded = mlx_lm.load(model)
    else:
        loaded = mlx_lm.load(str(found.path), model_config=config_of(found.path))
    setattr(loaded[0], SOURCE, model)
    return loaded[0], loaded[1]

"""Profiles for models of transformers, by their configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ggufrq.models import profiles
from ggufrq.profile import LayerProfile, Profile


def layer_profiles(wish: str | Path | Profile | Literal["weights"], config: Any) -> dict[int, LayerProfile]:
    """``models.profiles.layer_profiles`` for the model of this configuration."""
    text = config.get_text_config(decoder=True)
    commit = getattr(config, "_commit_hash", None)
    return profiles.layer_profiles(
        wish, text.model_type, text.num_hidden_layers, config.name_or_path, commit=commit
    )

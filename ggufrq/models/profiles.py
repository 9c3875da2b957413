"""Profiles for models in Hugging Face form: the file that serves their GGUF files, or made from their
weights, in the order of channels that their own runtimes have."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from ggufrq.base import log, paths
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.build.builds import require_build
from ggufrq.models import as_gguf, convert, resolve
from ggufrq.profile import LayerProfile, Profile, profile_from_weights, read_profile

#: Models of transformers (``model_type``) whose RoPE turns channels j and j + half together, and the rows of
#: whose Q and K llama.cpp's converter puts into another order, in which it turns neighbours.
REORDERED = frozenset(
    {"arcee", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "llama", "mistral", "mixtral"}
    | {"olmo", "smollm3"}
)
#: Models whose rows stay as they are.
AS_THEY_ARE = frozenset(
    {
        "apertus",
        "cohere",
        "cohere2",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon",
        "gemma",
        "gemma2",
    }
    | {
        "gemma3",
        "gemma3_text",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "gpt_oss",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
    }
    | {"lfm2", "lfm2_moe", "minimax_m2", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3"}
    | {"qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss"}
    | {"stablelm", "starcoder2"}
)


def layer_profiles(
    wish: str | Path | Profile | Literal["weights"],
    kind: str,
    layers: int,
    model: str,
    *,
    commit: str | None = None,
) -> dict[int, LayerProfile]:
    """The profile of each of the ``layers`` with K of its own, in the order of channels that transformers and
    mlx-lm have: a file, a profile as it is in a file, or made from the weights of ``model``, on the Hub
    those of ``commit``. ``kind`` is the ``model_type`` in the configuration.

    Raises ModelError when it is damaged, cannot be made, or lies in an order that is not known; UsageError
    when ``model`` is empty and the weights are needed.
    """
    if kind not in REORDERED | AS_THEY_ARE:
        raise ModelError(
            f"it is not known in which order llama.cpp has the channels of {kind}, so that no profile can be "
            "used for it",
            remedy="leave out profile",
        )
    if isinstance(wish, Profile):
        found = wish
    elif wish == "weights":
        found = _from_weights(model, commit)
    else:
        found = read_profile(paths.expanded(str(wish)))
    chosen = {il: layer for il, layer in found.layers.items() if il < layers}
    return {il: _halves(layer) for il, layer in chosen.items()} if kind in REORDERED else chosen


def _halves(layer: LayerProfile) -> LayerProfile:
    """A layer whose RoPE turns neighbours as one whose RoPE turns j and j + half."""
    dim = layer.k_map.shape[1]
    order = np.arange(dim).reshape(dim // 2, 2).T.reshape(dim)
    k_map, q_map = (part[:, order][:, :, order] for part in (layer.k_map, layer.q_map))
    return LayerProfile(k_map, q_map, None if layer.k_mean is None else layer.k_mean[:, order])


def _from_weights(model: str, commit: str | None) -> Profile:
    """The profile from the weights in a folder or on the Hub, made now unless it is kept. Raises ModelError,
    and BuildError without a build, whose tree has the converter."""
    if not model:
        raise UsageError(
            "the configuration does not say where the model's weights are",
            remedy="that of a model that was loaded, or a file: ggufrq calibrate makes one from a GGUF",
        )
    found = resolve.resolve(model)
    # the weights of the very commit that the model was loaded at, whatever its branch is at now
    source = as_gguf.find(found, commit if found.kind == "hub" else None, as_gguf.Options())
    if source.hf is None:
        raise UsageError(f"{model} is not a model of transformers")
    kept = paths.own_dir("profiles") / f"hf-{hashlib.sha256(source.key.encode()).hexdigest()[:16]}-1.gguf"
    try:
        return read_profile(kept)
    except ModelError:
        log.say(f"making the profile of {source.hf.called} from its weights")
    with TemporaryDirectory(prefix="ggufrq-", dir=kept.parent) as folder:
        gguf = convert.convert(
            source.hf,
            Path(folder) / "keys.gguf",
            require_build().source,
            pre_tokenizer=convert.declared_pre_tokenizer(source.hf.folder) or convert.ANY_TOKENIZER,
            mtp=False,
            what="keys",
        )
        made = profile_from_weights(gguf)
    made.write(kept)
    return made

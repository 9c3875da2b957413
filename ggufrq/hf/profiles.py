"""Profiles for models of transformers, by their configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ggufrq.models import profiles
from ggufrq.profile import LayerProfile, Profile


def layer_profiles(wish: str | Path | Profile | Literal["weights"], config: Any) -> dict[int, LayerProfile]:
    """``models.profiles.layer_profiles`` for the model of this configuration."""
    text = config.get_text_config(decoder=True)
<<<<<<< HEAD
    return profiles.layer_profiles(wish, text.model_type, text.num_hidden_layers, config.name_or_path)
=======
    if text.model_type not in REORDERED | AS_THEY_ARE:
        raise ModelError(
            f"it is not known in which order llama.cpp has the channels of {text.model_type}, so that no "
            "profile can be used for it",
            remedy="leave out profile",
        )
    if isinstance(wish, Profile):
        found = wish
    elif wish == "weights":
        found = _from_weights(config)
    else:
        found = read_profile(paths.expanded(str(wish)))
    layers = {il: layer for il, layer in found.layers.items() if il < text.num_hidden_layers}
    return {il: _halves(layer) for il, layer in layers.items()} if text.model_type in REORDERED else layers


def _halves(layer: LayerProfile) -> LayerProfile:
    """A layer whose RoPE turns neighbours as one whose RoPE turns j and j + half."""
    dim = layer.k_map.shape[1]
    order = np.arange(dim).reshape(dim // 2, 2).T.reshape(dim)
    k_map, q_map = (part[:, order][:, :, order] for part in (layer.k_map, layer.q_map))
    return LayerProfile(k_map, q_map, None if layer.k_mean is None else layer.k_mean[:, order])


def _from_weights(config: Any) -> Profile:
    """The profile from the weights in the folder or on the Hub that the model was loaded from, made now
    unless it is kept. Raises ModelError, and BuildError without a build, whose tree has the converter."""
    if not config.name_or_path:
        raise UsageError(
            "the configuration does not say where the model's weights are",
            remedy="that of a model that was loaded, or a file: ggufrq calibrate makes one from a GGUF",
        )
    model = resolve.resolve(config.name_or_path)
    # the weights of the very commit that the model was loaded at, whatever its branch is at now
    commit = getattr(config, "_commit_hash", None) if model.kind == "hub" else None
    source = as_gguf.find(model, commit, as_gguf.Options())
    if source.hf is None:
        raise UsageError(f"{config.name_or_path} is not a model of transformers")
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
>>>>>>> hf

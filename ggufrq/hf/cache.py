"""The caches: one class per family of rotations."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.codec.rotate import Family
from ggufrq.codec.tables import load
from ggufrq.hf import attention, saved
from ggufrq.hf.fixed import FixedAttentionLayer
from ggufrq.hf.layer import QuantizedAttentionLayer
from ggufrq.hf.profiles import layer_profiles
from ggufrq.hf.side import Settings
from ggufrq.profile.file import LayerProfile, Profile

#: Kinds of layers whose K and V are kept in blocks.
_BLOCKS = ("full_attention", "sliding_attention", "chunked_attention")


class QuantizedCache(Cache):
    """K and V in the types of ggufrq; what is not attention (linear layers of hybrid models) as it is.

    ``bits`` of K, and of V where ``v_bits`` does not say otherwise: 2 to 5. ``recent`` of the newest
    and ``first`` of the first tokens each query sees as they were. ``config`` is the model's: with it
    layers keep no more than their windows, without it they come about as the model uses them. ``profile``
    is a file (``NAME-kv.gguf``), a ``Profile``, or ``"weights"`` to make it from the model's weights; it
    takes ``config``. With ``max_cache_len`` layers have a fixed size, room for so many tokens, for
    ``torch.compile``; it takes ``config``, too. ``triton``: kernels in Triton encode, and attend for single
    queries, on CUDA; they were not run on a card yet.

    Raises UsageError for numbers that make no sense, and ModelError for models whose layers cannot be kept,
    and for a profile that is damaged or of another model.
    """

    family: ClassVar[Family]

    def __init__(
        self,
        bits: int = 3,
        v_bits: int | None = None,
        *,
        recent: int = 32,
        first: int = 1,
        profile: str | Path | Profile | Literal["weights"] | None = None,
        config: PreTrainedConfig | None = None,
        max_cache_len: int | None = None,
        triton: bool = False,
    ) -> None:
        v_bits = bits if v_bits is None else v_bits
        for number in (bits, v_bits):
            if str(number) not in load()["codes"]:
                raise UsageError(
                    f"there is no code of {number} bits", remedy=f"one of {', '.join(load()['codes'])}"
                )
        if recent < 0 or first < 0:
            raise UsageError(f"recent={recent}, first={first}: how many tokens, at least 0")
        if max_cache_len is not None and (config is None or max_cache_len < 1):
            raise UsageError(
                f"max_cache_len={max_cache_len}: for how many tokens, at least 1, and it takes the model's "
                "configuration",
                remedy="config=model.config",
            )
        if triton and (max_cache_len is not None or importlib.util.find_spec("triton") is None):
            raise UsageError(
                "triton=True takes Triton, and layers that grow",
                remedy="pip install triton, no max_cache_len",
            )
        self.size, self.triton = max_cache_len, triton
        self.model = None if config is None else saved.facts_of(config)
        self.settings = Settings(self.family, bits, v_bits, recent, first)
        self.profiles: dict[int, LayerProfile] = {}
        if profile is not None:
            if config is None:
                raise UsageError("a profile takes the model's configuration", remedy="config=model.config")
            self.profiles = layer_profiles(profile, config)
        super().__init__(layers=[] if config is None else self._of_config(config))
        self.fixed = config is not None
        attention.register()

    def _of_config(self, config: PreTrainedConfig) -> list[Any]:
        layers: list[Any] = []
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        for kind, named in zip(kinds, options, strict=True):
            if kind in _BLOCKS:
                layers.append(self._attention(len(layers), named.get("sliding_window")))
            elif not issubclass(DYNAMIC_LAYER_TYPE_MAPPING.get(kind, CacheLayerMixin), CacheLayerMixin):
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**named))
            else:
                raise ModelError(
                    f"layers of the kind {kind} cannot be kept in types of ggufrq",
                    remedy="a cache of transformers: DynamicCache",
                )
        return layers

    def _attention(self, index: int, window: int | None = None) -> CacheLayerMixin:
        profile = self.profiles.get(index)
        if self.size is not None:
            return FixedAttentionLayer(self.settings, profile, window, self.size)
        return QuantizedAttentionLayer(self.settings, profile, window, self.triton)

    def layer(self, kind: str, index: int, window: int | None = None) -> Any:
        """A new layer for ``index``: ``attention``, with its window if it has one, ``linear`` or ``none``."""
        if kind == "attention":
            return self._attention(index, window)
        if kind == "linear":
            return LinearAttentionLayer()
        return DYNAMIC_LAYER_TYPE_MAPPING.get("dummy", LinearAttentionLayer)()

    def _reach(self, index: int, kind: str) -> None:
        """Without a configuration layers come as the model uses them; what it leaves out holds nothing."""
        if not self.fixed and len(self.layers) <= index:
            self.layers += [self.layer("none", i) for i in range(len(self.layers), index)]
            self.layers.append(self.layer(kind, index))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store K and V of new tokens, see ``QuantizedAttentionLayer.update``."""
        self._reach(layer_idx, "attention")
        found: tuple[Any, Any] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As of any cache; a layer that asks for it is a linear one."""
        self._reach(layer_idx, "linear")
        found: torch.Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return found

    def nbytes(self) -> int:
        """Bytes that are held for tokens: all but the rotations and the profile."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors()}
        return sum(storages.values())

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that are held for tokens, states of linear layers included."""
        found: list[torch.Tensor] = []
        for layer in self.layers:
            if isinstance(layer, saved.Attention):
                found += layer.tensors()
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                states = (*layer.conv_states.values(), *layer.recurrent_states.values())
                found += [state for state in states if state is not None]
        return found

    def save(self, path: str | Path) -> None:
        """Write all that is held into a file in the form of safetensors."""
        saved.save(self.layers, saved.kind_of(self.settings, self.profiles), self.model, Path(path))

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Take what another cache of the same settings, profile and model wrote, in place of what is held, to
        the device of the model.

        Raises ModelError when the file is damaged or of a cache with others; what is held is then as before.
        """
        kind = saved.kind_of(self.settings, self.profiles)
        self.layers = saved.load(self.layers, self.layer, kind, self.model, Path(path), device)


class PlanarQuantCache(QuantizedCache):
    """K and V in ``planar2`` to ``planar5``; see ``QuantizedCache``."""

    family = "planar"


class IsoQuantCache(QuantizedCache):
    """K and V in ``iso2`` to ``iso5``; see ``QuantizedCache``."""

    family = "iso"


class RotorQuantCache(QuantizedCache):
    """K and V in ``rotor2`` to ``rotor5``; see ``QuantizedCache``."""

    family = "rotor"

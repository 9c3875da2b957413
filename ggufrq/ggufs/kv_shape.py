"""Values of K and V by layer, for models whose cache holds every token in every layer that has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.files import model_headers
from ggufrq.ggufs.memory_shape import memory_shape


@dataclass(frozen=True)
class KvShape:
    """Values of K and of V that one token takes, by the layers that keep any, and of a head of them (none:
    all fill blocks of 128)."""

    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]
    k_heads: tuple[int, ...] = ()
    v_heads: tuple[int, ...] = ()

    @property
    def k_values(self) -> int:
        """Values of K over all layers."""
        return sum(self.k_layers)

    @property
    def v_values(self) -> int:
        """Values of V over all layers."""
        return sum(self.v_layers)

    @property
    def layers(self) -> int:
        """How many layers keep any."""
        return len(self.k_layers)

    def bits_for(self, size: int, tokens: int) -> float:
        """Bits per value of a cache of ``size`` bytes for that many tokens."""
        return 8 * size / ((self.k_values + self.v_values) * tokens)


def kv_shape(path: Path) -> KvShape:
    """The shape of a GGUF model's cache, from its metadata.

    Raises ModelError for models whose cache is not simply K and V of every token: compressed, with sliding
    windows, or none.
    """
    shape = memory_shape(model_headers(path))
    if shape.window or shape.mla or not shape.cached:
        raise ModelError(f"the cache of {path.name} is not simply K and V of every token")
    return KvShape(shape.k_layers, shape.v_layers, shape.k_heads, shape.v_heads)


def find_kv_shape(path: Path) -> KvShape | None:
    """The shape of a GGUF model's cache, None where ``kv_shape`` cannot tell it."""
    try:
        return kv_shape(path)
    except ModelError:
        return None

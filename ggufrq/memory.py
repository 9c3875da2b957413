"""What the KV cache of a model takes, computed from the model itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ggufrq.errors import ModelError
from ggufrq.kv import KvPair

_KEY = re.compile(r"^blk\.(\d+)\.attn_([kv])\.weight$")


@dataclass(frozen=True)
class KvShape:
    """Values of K and of V that one token takes, by the layers that keep any."""

    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]

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

    def bytes_for(self, pair: KvPair, tokens: int) -> int:
        """Bytes of a cache for that many tokens. ValueError when a row does not fill whole blocks."""
        return pair.bytes_for(self.k_values * tokens, self.v_values * tokens)

    def bits_for(self, size: int, tokens: int) -> float:
        """Bits per value of a cache of ``size`` bytes for that many tokens."""
        return 8 * size / ((self.k_values + self.v_values) * tokens)


def kv_shape(path: Path) -> KvShape:
    """The shape of a GGUF model's cache, from the rows of its K and V projections.

    Raises ModelError for models whose cache is not simply that: projections fused or compressed, sliding
    windows, or layers that predict several tokens.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    special = [
        key
        for key in reader.fields
        if key.endswith((".attention.sliding_window", ".attention.kv_lora_rank", ".nextn_predict_layers"))
    ]
    rows: dict[str, dict[int, int]] = {"k": {}, "v": {}}
    for tensor in reader.tensors:
        found = _KEY.match(tensor.name)
        if found:
            rows[found[2]][int(found[1])] = int(tensor.shape[1])
    if special or not rows["k"] or rows["k"].keys() != rows["v"].keys():
        raise ModelError(f"the shape of the cache of {path.name} cannot be told from its tensors alone")
    return KvShape(*(tuple(rows[side][layer] for layer in sorted(rows[side])) for side in ("k", "v")))

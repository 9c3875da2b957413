"""What was published on the memory of a model, and is wrong, beside what it is."""

from __future__ import annotations

from ggufrq import codec
from ggufrq.cache.kv import kv_type
from ggufrq.ggufs.memory_shape import MemoryShape
from ggufrq.measure import claims

#: The published sizes are of a model with this many layers and values in each.
_LAYERS, _WIDTH = 64, 5120


def published(shape: MemoryShape) -> list[str]:
    """Sentences on the published figures that arithmetic contradicts: the compression of cache types, and
    sizes where they were published for a model of this shape. Sources are in ``claims.toml``."""
    told = claims.published()
    found = []
    for claim in told["compression"]["claims"]:
        kind = kv_type(claim["type"])
        if 16 / kind.bits < claim["times"]:
            bits = codec.cache_type(kind.name).bits
            times = f"16 / {kind.bits:g} = {16 / kind.bits:.2f}, scales counted"
            found.append(f"{claim['times']:g} times less at {bits} bits: it is {times}")
    values = sum(layer.k + layer.v for layer in shape.cached)
    if values == told["sizes"]["kv_values"] and (len(shape.layers), shape.embedding) == (_LAYERS, _WIDTH):
        for result in claims.sizes(told):
            if result["verdict"] == claims.FAILS:
                low, high = result["lowest"], result["measured"]
                real = f"{high:.1f}" if low == high else f"{low:.1f} to {high:.1f}"
                found.append(
                    f"{result['claim'].removesuffix(', GB')}, {result['published']:g} GB: it is {real} GB, "
                    f"{result['how']}"
                )
    return found

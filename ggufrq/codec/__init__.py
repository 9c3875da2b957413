"""Codes and rotations of the cache types: the numbers (tables.json) and the numpy reference.

The reference is the specification; the C code under patches/overlay is held to it bit for bit.
"""

from ggufrq.codec.quant import dequantize, quantize
from ggufrq.codec.rotate import rotate, rotation_matrix
from ggufrq.codec.tables import CacheType, cache_type, cache_types, sibling, siblings

__all__ = [
    "CacheType",
    "cache_type",
    "cache_types",
    "dequantize",
    "quantize",
    "rotate",
    "rotation_matrix",
    "sibling",
    "siblings",
]

"""Caches for transformers in the types of ggufrq: ``pip install 'ggufrq[hf]'``; see docs/transformers.md."""

from ggufrq.hf.cache import IsoQuantCache, PlanarQuantCache, QuantizedCache, RotorQuantCache

__all__ = ["IsoQuantCache", "PlanarQuantCache", "QuantizedCache", "RotorQuantCache"]

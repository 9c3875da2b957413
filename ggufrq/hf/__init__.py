"""Caches for transformers in the types of ggufrq: ``pip install 'ggufrq[hf]'``; see docs/transformers.md."""

try:
    from ggufrq.hf.cache import IsoQuantCache, PlanarQuantCache, QuantizedCache, RotorQuantCache
except ImportError as error:
    raise ImportError(
        f"ggufrq.hf takes torch and transformers 5.22 or newer ({error}): pip install 'ggufrq[hf]'"
    ) from error

__all__ = ["IsoQuantCache", "PlanarQuantCache", "QuantizedCache", "RotorQuantCache"]

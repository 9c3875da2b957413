"""Caches for mlx-lm in the types of ggufrq: ``pip install 'ggufrq[mlx]'``; see docs/mlx.md."""

from ggufrq.mlx.cache import IsoQuantCache, PlanarQuantCache, QuantizedCache, RotorQuantCache
from ggufrq.mlx.models import load
from ggufrq.mlx.prompt import install, make_cache

install()

__all__ = ["IsoQuantCache", "PlanarQuantCache", "QuantizedCache", "RotorQuantCache", "load", "make_cache"]

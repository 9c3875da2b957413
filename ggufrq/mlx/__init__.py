"""Caches for mlx-lm in the types of ggufrq: ``pip install 'ggufrq[mlx]'``; see docs/mlx.md."""

try:
    from ggufrq.mlx.cache import IsoQuantCache, PlanarQuantCache, QuantizedCache, RotorQuantCache
    from ggufrq.mlx.models import load
    from ggufrq.mlx.prompt import install, make_cache
except ImportError as error:
    raise ImportError(
        f"ggufrq.mlx takes mlx and mlx-lm 0.32.2 or newer ({error}): pip install 'ggufrq[mlx]'"
    ) from error

install()

__all__ = ["IsoQuantCache", "PlanarQuantCache", "QuantizedCache", "RotorQuantCache", "load", "make_cache"]

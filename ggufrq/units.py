"""Sizes as people read them."""

from __future__ import annotations


def size_text(size: int) -> str:
    """Bytes as kB, MB or GB, decimal, as the Hub shows them."""
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

"""Model cards of families: written from metadata, measurements and commands that were run, never from
claims."""

from ggufrq.card.core import Card, Wishes, make

__all__ = ["Card", "Wishes", "make"]

"""The pieces in which a model is made that is larger than the disk, and what they take of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Shards of the source that are on the disk together.
SHARDS = 2


@dataclass(frozen=True)
class Piece:
    """Tensors of the converted model, their bytes, and the files of the source that they are made of."""

    names: tuple[str, ...]
    bytes: int
    files: frozenset[str]


@dataclass(frozen=True)
class Pieces:
    """All pieces of a model in the order in which they are made, and bytes of the source's files by name."""

    every: tuple[Piece, ...]
    shards: Mapping[str, int]

    @property
    def disk(self) -> int:
        """Bytes of disk beside the files that are made: two shards, or what a tensor takes that is made of
        more, and a piece twice: in 16 bits, and what is made of it."""
        largest = sum(sorted(self.shards.values())[-SHARDS:])
        needed = max((sum(self.shards[name] for name in piece.files) for piece in self.every), default=0)
        return max(largest, needed) + 2 * max((piece.bytes for piece in self.every), default=0)


def cut(tensors: Sequence[Mapping[str, Any]], shards: Mapping[str, int]) -> Pieces:
    """The tensors (``name``, ``bytes`` and ``files`` of each) in pieces that take no more of two shards than
    half the largest one, but for single tensors that do."""
    most = max(shards.values(), default=0) // 2
    found: list[Piece] = []
    for tensor in tensors:
        one = Piece((tensor["name"],), tensor["bytes"], frozenset(tensor["files"]))
        last = found[-1] if found else None
        if last and last.bytes + one.bytes <= most and len(last.files | one.files) <= SHARDS:
            found[-1] = Piece(last.names + one.names, last.bytes + one.bytes, last.files | one.files)
        else:
            found.append(one)
    return Pieces(tuple(found), shards)

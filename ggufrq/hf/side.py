"""K or V of a layer as it is held, and where the rows of a batch begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.codec.quant import LARGEST_FP16
from ggufrq.codec.rotate import Family
from ggufrq.hf.basis import Basis
from ggufrq.hf.blocks import Blocks
from ggufrq.hf.codec import Codec, codec

#: Magnitudes beyond it are stored as it is, as the codes do.
_LARGEST = float(LARGEST_FP16)


def in_16_bits(stored: torch.Tensor) -> torch.Tensor:
    """Rows in a basis as the newest and first tokens are kept."""
    return stored.clamp(-_LARGEST, _LARGEST).half()


@dataclass(frozen=True)
class Settings:
    """What all layers of a cache share: the rotation, bits of K and V, and how many of the newest and of the
    first tokens a query sees as they were."""

    family: Family
    bits: int
    v_bits: int
    recent: int
    first: int


@dataclass
class Side:
    """K or V of a layer, by kernels in Triton or not: its blocks, and in 16 bits, in the same basis, the
    rows ``recent`` [batch, heads, n, dim], which are the newest, and ``first`` [batch, heads, first,
    dim]."""

    basis: Basis
    bits: int
    recent: torch.Tensor
    first: torch.Tensor
    triton: bool = False
    blocks: Blocks = field(default_factory=Blocks)

    @property
    def codec(self) -> Codec:
        """The code of the blocks."""
        return codec(self.bits, self.first.shape[3], self.first.device, self.triton)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of a model as the newest and first tokens are kept."""
        return in_16_bits(self.basis.store(x))

    def tensors(self) -> list[torch.Tensor]:
        """All that is held for tokens."""
        return [*self.blocks.chunks, self.recent, self.first]

    def change(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace what is held by what ``rows`` makes of it."""
        self.blocks.change(rows)
        self.recent, self.first = rows(self.recent), rows(self.first)


def require_alike(held: torch.Tensor, new: torch.Tensor) -> None:
    """Raise ModelError when new rows [batch, heads, cells, dim] are not like those that are held."""
    sizes = [(x.shape[0], x.shape[1], x.shape[3]) for x in (held, new)]
    if sizes[0] != sizes[1]:
        there, here = ("{} × {} heads of {} values".format(*one) for one in sizes)
        raise ModelError(
            f"the cache holds {there} for each token, and {here} come: another model's, or another batch",
            remedy="a new cache",
        )


def require_negative(tokens_to_remove: int) -> None:
    """Raise UsageError for the argument of ``crop`` of older versions."""
    if tokens_to_remove > 0:
        raise UsageError(
            f"crop({tokens_to_remove}) is the call of older versions", remedy="crop(-N) takes N tokens back"
        )


@dataclass(frozen=True)
class State:
    """What a layer holds of the cells ``start`` … ``length`` - 1, as it is saved: where rows of the batch
    begin [batch], and for K and V blocks [batch, heads, cells, bytes], and in 16 bits the newest rows and
    the first ones [batch, heads, n, dim]."""

    start: int
    length: int
    rows: torch.Tensor
    k: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    v: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def begin(rows: torch.Tensor, visible: torch.Tensor | None, first: int) -> torch.Tensor:
    """The cells [batch] where the rows of a batch begin, -1 where that is not known yet: ``rows``, and of
    those that are not known the first cell that some query sees. ``visible`` [batch or 1, queries, cells]
    is from the cell ``first`` on, None where all is seen."""
    found = torch.full_like(rows, first)
    if visible is not None:
        seen = visible.any(dim=1)
        found = torch.where(seen.any(dim=1), seen.int().argmax(dim=1) + first, -1).expand_as(found)
    return torch.where(rows < 0, found, rows)


def first_cells(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The cells [batch, count] of the first tokens of rows that begin at ``rows``; below 0 where that is not
    known."""
    return torch.where(rows[:, None] < 0, -1, rows[:, None] + torch.arange(count, device=rows.device))


def among_first(rows: torch.Tensor, count: int, cells: torch.Tensor) -> torch.Tensor:
    """Whether cells [n] are among the first tokens, [batch, 1, 1, n]."""
    after = cells - rows[:, None, None, None]
    return (rows >= 0)[:, None, None, None] & (after >= 0) & (after < count)


class Starts:
    """Where the rows of a batch begin behind their padding, which is learnt from what queries see. The first
    ``count`` tokens of each are those from there on."""

    def __init__(self, rows: torch.Tensor, count: int) -> None:
        self.count = count
        self.set(rows)

    def set(self, rows: torch.Tensor) -> None:
        """The cells [batch] where rows begin, -1 where that is not known yet."""
        self.rows = rows
        self.known = bool((rows >= 0).all())
        #: The cell behind the last one of the first tokens of all rows.
        self.end = int(rows.max()) + self.count

    def learn(self, visible: torch.Tensor | None, first: int) -> None:
        """Learn what ``begin`` finds."""
        if not self.known:
            self.set(begin(self.rows, visible, first))

    def crop(self, length: int) -> None:
        """Forget where rows begin that have no token before the cell ``length``."""
        self.set(torch.where(self.rows >= length, -1, self.rows))

    def cells(self) -> torch.Tensor:
        """See ``first_cells``."""
        return first_cells(self.rows, self.count)

    def among(self, cells: torch.Tensor) -> torch.Tensor:
        """See ``among_first``."""
        return among_first(self.rows, self.count, cells)

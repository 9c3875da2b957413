"""K or V of a layer as it is held, and where the rows of a batch begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ggufrq.codec.quant import LARGEST_FP16
from ggufrq.codec.rotate import Family
from ggufrq.hf.basis import Basis
from ggufrq.hf.blocks import Blocks
from ggufrq.hf.codec import Codec, codec

#: Magnitudes beyond it are stored as it is, as the codes do.
_LARGEST = float(LARGEST_FP16)


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
    """K or V of a layer: its blocks, and in 16 bits, in the same basis, the rows ``recent`` [batch, heads, n,
    dim], which are the newest, and ``first`` [batch, heads, first, dim]."""

    basis: Basis
    bits: int
    recent: torch.Tensor
    first: torch.Tensor
    blocks: Blocks = field(default_factory=Blocks)

    @property
    def codec(self) -> Codec:
        """The code of the blocks."""
        return codec(self.bits, self.first.shape[3], self.first.device)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of a model as the newest and first tokens are kept."""
        return self.basis.store(x).clamp(-_LARGEST, _LARGEST).half()

    def tensors(self) -> list[torch.Tensor]:
        """All that is held for tokens."""
        return [*self.blocks.chunks, self.recent, self.first]

    def change(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace what is held by what ``rows`` makes of it."""
        self.blocks.change(rows)
        self.recent, self.first = rows(self.recent), rows(self.first)


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
        """Rows begin at the first cell that some query sees. ``visible`` [batch or 1, queries, cells] is from
        the cell ``first`` on, None where all is seen."""
        if self.known:
            return
        found = torch.full_like(self.rows, first)
        if visible is not None:
            seen = visible.any(dim=1)
            found = torch.where(seen.any(dim=1), seen.int().argmax(dim=1) + first, -1).expand_as(found)
        self.set(torch.where(self.rows < 0, found, self.rows))

    def cells(self) -> torch.Tensor:
        """The cells [batch, count] of the first tokens; below 0 where a row's are not known."""
        each = torch.arange(self.count, device=self.rows.device)
        return torch.where(self.rows[:, None] < 0, -1, self.rows[:, None] + each)

    def among(self, cells: torch.Tensor) -> torch.Tensor:
        """Whether cells [n] are among the first tokens, [batch, 1, 1, n]."""
        after = cells - self.rows[:, None, None, None]
        return (self.rows >= 0)[:, None, None, None] & (after >= 0) & (after < self.count)

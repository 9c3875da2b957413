"""What ``update`` of a layer returns: it stands for K and V of all tokens without being dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from ggufrq.hf.blocks import Blocks
from ggufrq.hf.side import Side, Starts

#: Cells that are decoded at a time.
TILE = 2048


@dataclass(frozen=True)
class View:
    """K or V at one moment: blocks of all tokens, the newest ones before these tokens as they were, and these
    tokens themselves, ``new`` [batch, heads, cells, dim], as the model made them."""

    side: Side
    blocks: Blocks
    recent: torch.Tensor
    new: torch.Tensor

    @property
    def before(self) -> int:
        """The first of the new cells."""
        return self.blocks.end - self.new.shape[2]

    @property
    def first_exact(self) -> int:
        """The first of the cells that are held as they were, up to the last one."""
        return self.before - self.recent.shape[2]

    def exact(self, first: int, end: int) -> torch.Tensor:
        """Rows of the cells ``first`` … ``end`` - 1 as they were, in the side's basis and 16 bits."""
        before = self.before
        old = self.recent[:, :, max(first - self.first_exact, 0) : max(end - self.first_exact, 0)]
        new = self.side.exact(self.new[:, :, max(first - before, 0) : max(end - before, 0)])
        return torch.cat([old, new], dim=2)


@dataclass(frozen=True)
class Kept:
    """K and V of a layer at one moment, in models' type ``dtype``. Each query sees ``recent`` of the newest
    tokens as they were, and the first ones behind ``starts``."""

    recent: int
    starts: Starts
    k: View
    v: View
    dtype: torch.dtype

    def learn(self, visible: torch.Tensor | None) -> None:
        """Keep those of the first tokens that are among the new ones; ``visible`` [batch or 1, queries,
        cells] tells where rows begin, None where all is seen."""
        if self.starts.count == 0 or (self.starts.known and self.k.before >= self.starts.end):
            return
        self.starts.learn(visible, self.k.blocks.start)
        cells = self.starts.cells()
        inside = (cells >= self.k.before) & (cells < self.k.blocks.end)
        if not bool(inside.any()):
            return
        for view in (self.k, self.v):
            at = rows_at(cells - view.before, view.new)
            rows = view.side.exact(view.new.gather(2, at))
            view.side.first = torch.where(inside[:, None, :, None], rows, view.side.first)


def rows_at(cells: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Cells [batch, n] as an index of rows of x [batch, heads, cells, dim]; those outside are any."""
    return cells.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


class Held(ABC):
    """Stands for the tensor of K or V [batch, heads, cells, dim] that a layer holds. Whoever takes it for a
    tensor gets a dense one, made for the occasion: all from the blocks but the newest and first tokens that
    the last query sees as they were."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """As of the tensor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """As of the tensor."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """As of the tensor."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The tensor."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Functions of torch get the dense tensor."""
        return func(*(_dense(x) for x in args), **{name: _dense(x) for name, x in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.dense()[index]


class Stored(Held):
    """That of a layer that grows."""

    def __init__(self, kept: Kept, view: View) -> None:
        self.kept = kept
        self.view = view

    @property
    def shape(self) -> torch.Size:
        """As of the tensor."""
        batch, heads, _, dim = self.view.new.shape
        return torch.Size((batch, heads, self.view.blocks.end - self.view.blocks.start, dim))

    @property
    def dtype(self) -> torch.dtype:
        """As of the tensor."""
        return self.kept.dtype

    @property
    def device(self) -> torch.device:
        """As of the tensor."""
        return self.view.new.device

    def dense(self) -> torch.Tensor:
        """The tensor."""
        view, side, blocks = self.view, self.view.side, self.view.blocks
        self.kept.learn(None)
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for first, tile in blocks.tiles(TILE):
            here = first - blocks.start
            out[:, :, here : here + tile.shape[2]] = side.basis.restore(side.codec.decode(tile)).to(
                self.dtype
            )
        newest = max(view.first_exact, blocks.end - self.kept.recent, blocks.start)
        if self.kept.recent:
            rows = side.basis.restore(view.exact(newest, blocks.end).float())
            out[:, :, newest - blocks.start :] = rows.to(self.dtype)
        if self.kept.starts.count:
            cells = self.kept.starts.cells()
            inside = ((cells >= blocks.start) & (cells < newest))[:, None, :, None]
            at = rows_at(cells - blocks.start, out)
            rows = side.basis.restore(side.first.float()).to(self.dtype)
            out.scatter_(2, at, torch.where(inside, rows, out.gather(2, at)))
        return out


def _dense(x: Any) -> Any:
    """An argument of a function of torch, also a list of tensors, as ``torch.cat`` takes it."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(_dense, x)) if any(isinstance(one, Held) for one in x) else x
    return x.dense() if isinstance(x, Held) else x
